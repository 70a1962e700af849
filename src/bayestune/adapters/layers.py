"""Finding the random layers of a model."""

from collections.abc import Sequence

from peft.tuners.lora import LoraLayer
from torch import nn

from bayestune.adapters.gaussian import GaussianLinear
from bayestune.adapters.random import RandomLinear


def random_layers(model: nn.Module, adapters: Sequence[str] | None = None) -> dict[str, RandomLinear]:
    """The random layers of the active adapters of `model` (or of `adapters`), by name, sorted.

    The name is the path of the adapted layer in the base model (with ".lora_B" appended for a B matrix), so it does
    not depend on what the adapter is called. Where several adapters are active at once, those of the second and later
    ones get "#1", "#2", ... appended: each has noise of its own. Empty for a model without random adapters.
    """
    found: dict[str, RandomLinear] = {}
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for position, adapter in enumerate(module.active_adapters if adapters is None else adapters):
            for part in (module.lora_A, module.lora_B):
                layer = part[adapter] if adapter in part else None
                if isinstance(layer, RandomLinear):
                    found[layer.name + (f"#{position}" if position else "")] = layer
    return dict(sorted(found.items()))


def gaussian_layers(model: nn.Module, adapters: Sequence[str] | None = None) -> dict[str, GaussianLinear]:
    """Those of `random_layers` that are Gaussian, and so have a KL."""
    layers = random_layers(model, adapters)
    return {name: layer for name, layer in layers.items() if isinstance(layer, GaussianLinear)}


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is folded into the base weights, where no noise can reach it."""
    return any(isinstance(module, LoraLayer) and module.merged for module in model.modules())


def is_disabled(model: nn.Module) -> bool:
    """Whether the adapters are switched off, so that a forward is that of the base model."""
    return any(isinstance(module, LoraLayer) and module.disable_adapters for module in model.modules())
