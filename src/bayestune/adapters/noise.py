"""Training noise: sampled before each forward for all layers together, from keyed generators."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.adapters.config import Estimator
from bayestune.adapters.layers import is_disabled, is_merged, random_layers
from bayestune.adapters.random import LayerNoise, RandomLinear, row_major_sizes
from bayestune.errors import DrawError
from bayestune.functional import derive_seed, training_generator


@dataclass
class TrainingNoise:
    """Gives every random layer of one model its noise before a forward in training mode.

    The noise is a pure function of (`seed`, `step`, `micro`, `rank`, position of the layer); each forward then
    increments `micro`. A trainer sets `seed` and `rank` once, and `step` and ``micro = 0`` at the start of an
    update, so a resumed run sees the same noise. Forwards with disabled adapters do not count.

    A layer whose input does not run over rows first (see `row_major_sizes`), or that sits in an expert, uses one draw
    for the whole input.

    With gradient checkpointing a backward must follow each forward: recomputation reads the noise of the latest one.

    Attributes:
        estimator: as in `BayesLoraConfig`.
        seed: seed of the run.
        rank: index of the process.
        step: index of the update.
        micro: index of the forward within the update.
        rows: independent draws per forward, one per example; None for the size of dimension 0 of the first tensor
            input. Set it where that dimension counts more than examples (choices flattened into rows).
    """

    estimator: Estimator
    seed: int = 0
    rank: int = 0
    step: int = 0
    micro: int = 0
    rows: int | None = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of the base model."""
        layers = random_layers(module) if module.training and not is_disabled(module) else {}
        if not layers:
            return
        if is_merged(module):
            raise DrawError("a merged adapter cannot be trained or sampled: call unmerge_adapter() first.")
        shape = _input_shape(args, kwargs)
        rows = shape[0] if self.rows is None else self.rows
        key = (self.seed, self.step, self.micro, self.rank)
        self.micro += 1
        if self.estimator == "flipout_token":
            noise = _normal(layers, 1, key)
            for name, layer in layers.items():
                layer.noise = LayerNoise(noise[name], token_seed=derive_seed("signs", *key, name))
            return
        noise = _normal(layers, rows, key) if self.estimator == "independent" else _flipout(layers, rows, key)
        for name, layer in layers.items():
            layer.noise = LayerNoise(noise[name], sizes=row_major_sizes(shape, rows))


def training_noise(model: nn.Module) -> TrainingNoise:
    """Return the `TrainingNoise` of `model`, or raise a `DrawError` if it has no random layer."""
    noise = next(filter(None, map(find_noise, model.modules())), None)
    if noise is not None:
        return noise
    raise DrawError("this model has no random adapter: make it with get_peft_model(base, BayesLoraConfig(...)).")


def find_noise(base: nn.Module) -> TrainingNoise | None:
    """Return the `TrainingNoise` that is hooked to `base` itself, if there is one."""
    return next((hook for hook in base._forward_pre_hooks.values() if isinstance(hook, TrainingNoise)), None)


def _input_shape(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor) and value.dim() > 0:
            return tuple(value.shape)
    raise DrawError("the model was called without a tensor, so the number of rows is unknown: pass a tensor.")


def _normal(layers: Mapping[str, RandomLinear], rows: int, key: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Return standard normal noise [rows, r, n] for every layer, from one generator call per device."""
    noise: dict[str, Tensor] = {}
    for index, (device, names) in enumerate(_by_device(layers).items()):
        sizes = [rows * layers[name].weight.numel() for name in names]
        generator = training_generator(*key, device, index)
        flat = torch.randn(sum(sizes), generator=generator, device=device, dtype=layers[names[0]].weight.dtype)
        for name, values in zip(names, flat.split(sizes), strict=True):
            noise[name] = values.view(rows, *layers[name].weight.shape)
    return noise


def _flipout(layers: Mapping[str, RandomLinear], rows: int, key: tuple[int, int, int, int]) -> dict[str, Tensor]:
    """Return ``t u^T * E``: one normal E per batch, signs u [rows, n], t [rows, r] (Wen et al. 2018, equation 4)."""
    shared = _normal(layers, 1, key)
    noise: dict[str, Tensor] = {}
    for index, (device, names) in enumerate(_by_device(layers).items()):
        generator = torch.Generator(device).manual_seed(derive_seed("signs", *key, index))
        sizes = [rows * size for name in names for size in layers[name].weight.shape]
        flat = torch.randint(0, 2, (sum(sizes),), generator=generator, device=device)
        signs = iter((flat.to(layers[names[0]].weight.dtype) * 2 - 1).split(sizes))
        for name in names:
            t, u = next(signs).view(rows, -1, 1), next(signs).view(rows, 1, -1)
            noise[name] = shared[name] * t * u
    return noise


def _by_device(layers: Mapping[str, RandomLinear]) -> dict[torch.device, list[str]]:
    groups: dict[torch.device, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer.weight.device, []).append(name)
    return groups
