"""Finding the random layers of a model."""

import math
from collections.abc import Collection, Sequence

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from bayestune.adapters.gaussian import GaussianLinear
from bayestune.adapters.random import RandomLinear
from bayestune.functional import std


def random_layers(model: nn.Module, adapters: Sequence[str] | None = None) -> dict[str, RandomLinear]:
    """Return the random layers of `model`, sorted by name; empty for a model without a random adapter.

    A name is the path of the adapted layer in the base model (with ".lora_B" appended for a B matrix), so it does not
    depend on the adapter's name. If several adapters are active, the names of the second and later ones end in "#1",
    "#2", ..., so that each has its own noise.

    Args:
        model: any model.
        adapters: names of adapters; by default the active ones.
    """
    layers: dict[str, RandomLinear] = {}
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for position, adapter in enumerate(module.active_adapters if adapters is None else adapters):
            for matrices in (module.lora_A, module.lora_B):
                layer = matrices[adapter] if adapter in matrices else None
                if isinstance(layer, RandomLinear):
                    layers[layer.name + (f"#{position}" if position else "")] = layer
    return dict(sorted(layers.items()))


def gaussian_layers(model: nn.Module, adapters: Sequence[str] | None = None) -> dict[str, GaussianLinear]:
    """Return those of `random_layers` that are Gaussian and therefore have a KL."""
    layers = random_layers(model, adapters)
    return {name: layer for name, layer in layers.items() if isinstance(layer, GaussianLinear)}


@torch.no_grad()
def mean_std(layers: Collection[GaussianLinear]) -> float:
    """Return the mean standard deviation ``Omega = G^2`` over all entries of `layers`, at least one, in float64."""
    entries = sum(layer.rho.numel() for layer in layers)
    return math.fsum(std(layer.rho.double()).sum().item() for layer in layers) / entries


def is_merged(model: nn.Module) -> bool:
    """Return whether an adapter is merged into the base weights, where no noise can reach it."""
    return any(isinstance(module, LoraLayer) and module.merged for module in model.modules())


def is_disabled(model: nn.Module) -> bool:
    """Return whether the adapters are disabled, so that a forward is that of the base model."""
    return any(isinstance(module, LoraLayer) and module.disable_adapters for module in model.modules())


def tied_head(model: nn.Module) -> str | None:
    """Return the name of an adapted layer whose base weight another module uses too, such as tied embeddings, if any.

    Merging an adapter into that weight changes both modules.
    """
    names = {module: name for name, module in model.named_modules()}
    for layer, name in names.items():
        if isinstance(layer, LoraLayer):
            weights = {id(parameter) for parameter in layer.get_base_layer().parameters()}
            users = [m for m in names if any(id(p) in weights for p in m.parameters(recurse=False))]
            if len(users) > 1:
                return name.removeprefix("base_model.model.")
    return None
