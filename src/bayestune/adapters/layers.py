"""Finding the Gaussian layers of a model."""

from collections.abc import Sequence

from peft.tuners.lora import LoraLayer
from torch import nn

from bayestune.adapters.gaussian import GaussianLinear


def gaussian_layers(model: nn.Module, adapters: Sequence[str] | None = None) -> dict[str, GaussianLinear]:
    """The Gaussian layers of the active adapters of `model` (or of `adapters`), by name, sorted.

    The name is the path of the adapted layer in the base model, so it does not depend on what the adapter is called.
    Where several adapters are active at once, those of the second and later ones get "#1", "#2", ... appended: each
    has noise of its own. Empty for a model without Gaussian adapters.
    """
    found: dict[str, GaussianLinear] = {}
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for position, adapter in enumerate(module.active_adapters if adapters is None else adapters):
            layer = module.lora_A[adapter] if adapter in module.lora_A else None
            if isinstance(layer, GaussianLinear):
                found[layer.name + (f"#{position}" if position else "")] = layer
    return dict(sorted(found.items()))


def is_merged(model: nn.Module) -> bool:
    """Whether an adapter is folded into the base weights, where no noise can reach it."""
    return any(isinstance(module, LoraLayer) and module.merged for module in model.modules())


def is_disabled(model: nn.Module) -> bool:
    """Whether the adapters are switched off, so that a forward is that of the base model."""
    return any(isinstance(module, LoraLayer) and module.disable_adapters for module in model.modules())
