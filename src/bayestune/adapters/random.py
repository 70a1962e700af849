"""`RandomLinear`: a linear layer whose weights are a distribution, and the draws that a thread is in.

What a forward does is decided before it starts, and the layer only reads it:

=====================================  ==========================================================
a draw is active in this thread        the drawn weights of that draw (`drawn_weights`)
training mode                          one noise matrix a row, put there by `TrainingNoise`
otherwise (evaluation mode)            the mean
=====================================  ==========================================================

Shape legend: r rank, n inputs of the layer, rows examples of the batch, K stacked draws.
"""

import math
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.errors import DrawError


class _ThreadDraw(threading.local):
    """The drawn weights this thread sees, by `id` of their layer. Other threads see their own, or none."""

    def __init__(self) -> None:
        # On the instance, not the class: torch.compile guards only what it finds there.
        self.weights: Mapping[int, Tensor] | None = None
        self.sizes: frozenset[int] | None = None


_ACTIVE = _ThreadDraw()


@contextmanager
def drawn_weights(weights: Mapping["RandomLinear", Tensor], *, sizes: frozenset[int] | None = None) -> Iterator[None]:
    """Inside, each layer of `weights` uses the matrix given: [r, n], or [K, r, n] for K stacked draws.

    With K stacked draws the batch must hold K copies of the rows, the draw being the outermost index; `sizes` are the
    values that dimension 0 of a layer's input can then have (see `row_major_sizes`), None for any. Only the current
    thread is affected. Contexts nest; the previous state is restored on exit, also after an exception.
    """
    before = _ACTIVE.weights, _ACTIVE.sizes
    _ACTIVE.weights = {**(before[0] or {}), **{id(layer): weight for layer, weight in weights.items()}}
    _ACTIVE.sizes = sizes
    try:
        yield
    finally:
        _ACTIVE.weights, _ACTIVE.sizes = before


def row_major_sizes(shape: tuple[int, ...], groups: int) -> frozenset[int]:
    """What dimension 0 of a layer's input can be if it runs over rows first, for a model input of `shape`.

    Rows, rows x choices, rows x choices x tokens, as far as they split into `groups` equal runs. An input of another
    size (tokens first, relative positions, tokens packed together) cannot be told apart by rows.
    """
    sizes = {math.prod(shape[: i + 1]) for i in range(len(shape))} | {groups}
    return frozenset(size for size in sizes if size % groups == 0)


@dataclass(frozen=True)
class LayerNoise:
    """Training noise of one layer: `epsilon` [rows, r, n], standard normal, for inputs of one of the `sizes`.

    With `token_seed` (estimator "flipout_token") `epsilon` is [1, r, n], shared by the batch, and the signs of every
    token come from a generator seeded with it, so that a recomputed forward sees the same signs.
    """

    epsilon: Tensor
    sizes: frozenset[int] = frozenset()
    token_seed: int | None = None


class FullPrecisionLinear(nn.Linear):
    """A linear layer whose parameters stay in float32 (or float64) when the model around it is cast to half."""

    @classmethod
    def taking_over(cls, linear: nn.Linear) -> "FullPrecisionLinear":
        """A layer that owns the parameters of `linear`, in float32 if they were narrower."""
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = _at_least_float32(linear.weight)
        layer.bias = None if linear.bias is None else _at_least_float32(linear.bias)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FullPrecisionLinear":
        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(keep_precision, recurse)


class RandomLinear(FullPrecisionLinear):
    """``h = W x`` with random weights W, a function `drawn` of standard normal noise.

    Attributes:
        weight: the mean of W, [r, n].
        name: path of the layer in the base model; with (seed, index) it names the noise of a draw.
        routed: the layer sits in an expert and is fed a choice of tokens; all its inputs of a forward share one draw.
        noise: what the next training forward adds; written by `TrainingNoise`, only read here.
    """

    name: str
    routed: bool
    noise: LayerNoise | None

    def take_name(self, name: str) -> None:
        """Set what identifies the layer, and that it has no noise yet."""
        self.name, self.noise = name, None
        self.routed = "experts" in name.split(".")

    @abstractmethod
    def drawn(self, epsilon: Float[Tensor, "*draws r n"]) -> Float[Tensor, "*draws r n"]:
        """W for standard normal noise on any device and in any floating dtype."""

    def forward(self, x: Tensor) -> Tensor:
        drawn = _ACTIVE.weights
        if drawn is not None and id(self) in drawn:
            return _drawn_linear(x, drawn[id(self)], _ACTIVE.sizes)
        if not self.training:
            return F.linear(x, self.weight)
        if self.noise is None:
            raise DrawError(
                f"layer {self.name!r} is in training mode but got no noise: call the model it was put into, not a "
                "part of it, or eval() for the mean."
            )
        return self.perturbed(x, self.noise)

    def perturbed(self, x: Tensor, noise: LayerNoise) -> Tensor:
        """The output in training: one draw a row, or one for all where the input does not run over rows first."""
        epsilon = noise.epsilon
        if self.routed or x.dim() < 2 or x.shape[0] not in noise.sizes:
            epsilon = epsilon[0]
        return _rowwise_linear(x, self.drawn(epsilon))


def _drawn_linear(x: Tensor, weight: Tensor, sizes: frozenset[int] | None) -> Tensor:
    """``x A^T`` with one drawn A [r, n], or with K stacked ones, whose inputs must be K copies of the rows."""
    if weight.dim() == 3 and (x.shape[0] % len(weight) if sizes is None else x.shape[0] not in sizes):
        raise DrawError(
            f"a layer got {x.shape[0]} rows for {len(weight)} stacked draws: expected the same rows for each draw."
        )
    return _rowwise_linear(x, weight)


def _rowwise_linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x A^T`` for one matrix A [r, n], or for one matrix a group of rows, [groups, r, n].

    With groups, dimension 0 of `x` is split into that many equal runs; the inner ones (choices, tokens) stay together.
    """
    if weight.dim() == 2:
        return F.linear(x, weight)
    grouped = x.reshape(weight.shape[0], -1, x.shape[-1])
    return torch.matmul(grouped, weight.transpose(1, 2)).reshape(*x.shape[:-1], weight.shape[1])


def _at_least_float32(parameter: Tensor) -> nn.Parameter:
    if isinstance(parameter, nn.Parameter) and parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
