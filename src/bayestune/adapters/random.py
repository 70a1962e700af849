"""`RandomLinear`: a linear layer with random weights, and the draws that are active in a thread.

What a forward uses is decided before it starts; the layer only reads it:

=====================================  ==========================================================
a draw is active in this thread        the drawn weights of that draw (`drawn_weights`)
training mode                          one noise matrix per row, set by `TrainingNoise`
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
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.errors import DrawError

_Layer = TypeVar("_Layer", bound="FullPrecisionLinear")
_Random = TypeVar("_Random", bound="RandomLinear")


class _ThreadDraw(threading.local):
    """The drawn weights of this thread, by `id` of their layer; other threads see their own, or none."""

    def __init__(self) -> None:
        # On the instance, not the class: torch.compile guards only what it finds there.
        self.weights: Mapping[int, Tensor] | None = None
        self.sizes: frozenset[int] | None = None
        self.key: tuple[int, int] | None = None


_ACTIVE = _ThreadDraw()


@contextmanager
def drawn_weights(
    weights: Mapping["RandomLinear", Tensor],
    *,
    sizes: frozenset[int] | None = None,
    key: tuple[int, int] | None = None,
) -> Iterator[None]:
    """Context in which each layer of `weights` uses the given matrix.

    With K stacked draws the batch must hold K copies of the rows, the draw being the outermost index. Only the current
    thread is affected. Contexts nest, and the previous state is restored on exit, also after an exception.

    Args:
        weights: a matrix [r, n] per layer, or [K, r, n] for K stacked draws.
        sizes: allowed sizes of dimension 0 of a layer's input of stacked draws (see `row_major_sizes`); None for any.
        key: (seed, index) of a single draw, which key-value caches remember.
    """
    before = _ACTIVE.weights, _ACTIVE.sizes, _ACTIVE.key
    _ACTIVE.weights = {**(before[0] or {}), **{id(layer): weight for layer, weight in weights.items()}}
    _ACTIVE.sizes, _ACTIVE.key = sizes, key
    try:
        yield
    finally:
        _ACTIVE.weights, _ACTIVE.sizes, _ACTIVE.key = before


def current_draw() -> tuple[int, int] | None:
    """Return (seed, index) of the draw that `bayestune.draw` holds in this thread; None for the mean."""
    return _ACTIVE.key


def refuse_in_draw(call: str) -> None:
    """Raise a DrawError if weights are drawn in this thread, where `call` would use the mean."""
    if _ACTIVE.weights is not None:
        raise DrawError(
            f"{call} inside draw(...): found drawn weights, but the mean would be merged: leave the draw first, or "
            "write the draw as plain LoRA with export_lora and merge that."
        )


def row_major_sizes(shape: tuple[int, ...], groups: int) -> frozenset[int]:
    """Return the sizes that dimension 0 of a layer's input can have if it runs over rows first.

    These are rows, rows x choices, rows x choices x tokens, if they split into equal groups. An input of another size
    (tokens first, relative positions, packed tokens) cannot be separated by rows.

    Args:
        shape: shape of the model's input.
        groups: number of groups of rows: draws, or rows with separate noise.
    """
    sizes = {math.prod(shape[: i + 1]) for i in range(len(shape))} | {groups}
    return frozenset(size for size in sizes if size % groups == 0)


@dataclass(frozen=True)
class LayerNoise:
    """Training noise of one layer.

    Attributes:
        epsilon: standard normal, [rows, r, n]; [1, r, n], shared by the batch, for the estimator "flipout_token".
        sizes: sizes of dimension 0 of an input to which the rows of `epsilon` apply one by one.
        token_seed: seed of the signs per token of "flipout_token", so that a recomputed forward sees the same signs.
    """

    epsilon: Tensor
    sizes: frozenset[int] = frozenset()
    token_seed: int | None = None


class FullPrecisionLinear(nn.Linear):
    """A linear layer whose parameters stay in float32 (or float64) when the model is cast to half precision."""

    @classmethod
    def taking_over(cls: type[_Layer], linear: nn.Linear) -> _Layer:
        """Make a layer that owns the parameters of `linear`, in float32 if they were narrower."""
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
    """``h = W x`` with random weights W, which `drawn` computes from standard normal noise.

    Attributes:
        weight: the mean of W, [r, n].
        name: path of the layer in the base model; (seed, index, name) is the key of a draw's noise.
        routed: whether the layer sits in an expert, which sees a selection of tokens; its inputs then share one draw.
        noise: the noise of the next training forward, set by `TrainingNoise`.
    """

    name: str
    routed: bool
    noise: LayerNoise | None

    @classmethod
    def named(cls: type[_Random], linear: nn.Linear, name: str) -> _Random:
        """Make a layer that owns the parameters of `linear` and has no noise yet."""
        layer = cls.taking_over(linear)
        layer.name, layer.noise, layer.routed = name, None, "experts" in name.split(".")
        return layer

    @abstractmethod
    def drawn(self, epsilon: Float[Tensor, "*draws r n"]) -> Float[Tensor, "*draws r n"]:
        """Return W for standard normal noise on any device and in any floating dtype."""

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
        """Return the output in training: one draw per row, or one for all if the input is not ordered by rows."""
        epsilon = noise.epsilon
        if self.routed or x.dim() < 2 or x.shape[0] not in noise.sizes:
            epsilon = epsilon[0]
        return _rowwise_linear(x, self.drawn(epsilon))


def _drawn_linear(x: Tensor, weight: Tensor, sizes: frozenset[int] | None) -> Tensor:
    """Return ``x A^T`` for one drawn A [r, n], or for K stacked ones, whose inputs must be K copies of the rows."""
    if weight.dim() == 3 and (x.shape[0] % len(weight) if sizes is None else x.shape[0] not in sizes):
        raise DrawError(
            f"a layer got {x.shape[0]} rows for {len(weight)} stacked draws: expected the same rows for each draw."
        )
    return _rowwise_linear(x, weight)


def _rowwise_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x A^T`` for one matrix A [r, n], or for one matrix per group of rows, [groups, r, n].

    With groups, dimension 0 of `x` is split into that many equal parts, so choices and tokens of a row stay together.
    """
    if weight.dim() == 2:
        return F.linear(x, weight)
    grouped = x.reshape(weight.shape[0], -1, x.shape[-1])
    return torch.matmul(grouped, weight.transpose(1, 2)).reshape(*x.shape[:-1], weight.shape[1])


def _at_least_float32(parameter: Tensor) -> nn.Parameter:
    if isinstance(parameter, nn.Parameter) and parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)
