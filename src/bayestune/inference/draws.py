"""Draws: contexts inside which a Bayesian model is one deterministic function."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bayestune.adapters import GaussianLinear, drawn_weights, gaussian_layers, is_merged
from bayestune.errors import DrawError
from bayestune.functional import prediction_noise

_LOCK = threading.Lock()
_HELD: Counter[nn.Module] = Counter()  # modules that were in training mode, by how many contexts hold them out of it


@contextmanager
def draw(model: nn.Module, *, index: int = 0, seed: int = 0) -> Iterator[None]:
    """Inside, `model` answers with draw (`seed`, `index`): each Gaussian A is ``M + G^2 * noise(seed, index, layer)``.

    The weights are fixed at entry, without a gradient, and are the same for every token, row, batch size, device and
    process. The model is in evaluation mode inside; its modes and its mean are back on exit, also after an exception.
    Only the current thread is affected, so threads may hold different draws of one model.

    Raises:
        DrawError: the model has no Gaussian adapter, or it is merged into the base weights.
    """
    with evaluation_mode(model), drawn_weights(_weights(_named(model), [index], seed, stacked=False)):
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Inside, every module of `model` is in evaluation mode; on exit those that were not are back in training mode.

    Where several threads are inside at once, the modes are back when the last one leaves.
    """
    with _LOCK:
        held = [module for module in model.modules() if module.training or module in _HELD]
        _HELD.update(held)
        for module in held:
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            _HELD.subtract(held)
            for module in held:
                if _HELD[module] == 0:
                    del _HELD[module]
                    module.training = True


def sampled_layers(model: nn.Module) -> dict[str, GaussianLinear]:
    """The active Gaussian layers of `model`, by name.

    Raises:
        DrawError: there are none, or the adapter is merged.
    """
    layers = gaussian_layers(model)
    if not layers:
        raise DrawError(
            "the model has no active Gaussian adapter to draw from: use draws=0, or train one with BlobConfig."
        )
    if is_merged(model):
        raise DrawError("the adapter is merged into the base weights, where a draw cannot reach it: unmerge it first.")
    return layers


def stacked_weights(model: nn.Module, indices: Sequence[int], seed: int) -> dict[GaussianLinear, Tensor]:
    """The A matrices of several draws, [len(indices), r, n] a layer, for `drawn_weights`.

    Raises:
        DrawError: as `sampled_layers`.
    """
    return _weights(_named(model), indices, seed, stacked=True)


def _named(model: nn.Module) -> list[tuple[str, GaussianLinear]]:
    """Every Gaussian layer with the name of its noise: the active adapters', and each other's as if it were active.

    The others are reached by `adapter_names=[...]` or a `set_adapter` inside the draw.
    """
    active = sampled_layers(model)
    seen = {id(layer) for layer in active.values()}
    others = [m for m in model.modules() if isinstance(m, GaussianLinear) and id(m) not in seen]
    return [*active.items(), *((layer.name, layer) for layer in others)]


def _weights(
    layers: Sequence[tuple[str, GaussianLinear]], indices: Sequence[int], seed: int, *, stacked: bool
) -> dict[GaussianLinear, Tensor]:
    weights = {}
    with torch.no_grad():
        for name, layer in layers:
            noise = torch.stack([prediction_noise(seed, k, name, tuple(layer.weight.shape)) for k in indices])
            weights[layer] = layer.drawn(noise if stacked else noise[0])
    return weights
