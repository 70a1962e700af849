"""Which linear layers of a plain LoRA adapter a curvature covers, and what its factors take up in memory."""

from collections import Counter

import psutil
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from bayestune.adapters import is_merged
from bayestune.adapters.layers import is_disabled
from bayestune.errors import ConfigError
from bayestune.storage.state import active_adapter, lora_layers

LAYERS = ("all", "last")
EIGEN_COPIES = 4
"""Matrices of the size of the largest factor that its eigendecomposition holds: vectors, workspace of two, a copy."""


def covered_linears(model: nn.Module, *, layers: str) -> dict[str, nn.Linear]:
    """The linear layers, by name, whose weights are given a distribution.

    "all": the A and B of every layer that the active adapter adapts, ``<path in the base model>.lora_A`` and
    ``.lora_B``. "last": the linear layers of the head that the adapter trains as a whole (`modules_to_save`); without
    one, the A and B of the last adapted layer. Biases are not covered.

    Raises:
        ConfigError: not a plain LoRA adapter of linear layers, or it is merged or disabled; an unknown `layers`.
    """
    if layers not in LAYERS:
        raise ConfigError(f"layers: found {layers!r}, expected one of {LAYERS}.")
    model, adapter = plain_adapter(model)
    heads = _head_linears(model, adapter)
    if layers == "last" and heads:
        return heads
    adapted = lora_layers(model, adapter)
    if layers == "last":
        adapted = dict(list(adapted.items())[-1:])
    found: dict[str, nn.Linear] = {}
    for path, layer in adapted.items():
        if adapter in layer.lora_variant or "experts" in path.split("."):
            raise ConfigError(
                f"layer {path!r}: found an adapter variant (such as DoRA) or an expert, expected plain LoRA of a "
                "layer that sees every token: leave it out of target_modules."
            )
        for part, container in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            linear = container[adapter] if adapter in container else None
            if not isinstance(linear, nn.Linear):
                raise ConfigError(
                    f"layer {path!r}: found {part} of a {type(layer.get_base_layer()).__name__}, expected that of a "
                    "linear layer: leave it out of target_modules."
                )
            found[f"{path}.{part}"] = linear
    return found


def plain_adapter(model: nn.Module) -> tuple[PeftModel, str]:
    """`model` itself and the name of its active adapter.

    Raises:
        ConfigError: not a PeftModel with one active, plain LoRA adapter, neither merged nor disabled.
    """
    model, adapter, kind = active_adapter(model)
    if kind != "point":
        raise ConfigError(
            f"adapter {adapter!r}: found a BAYES_LORA adapter, which is a posterior already; a Laplace posterior "
            "is fitted to plain LoRA (LoraConfig)."
        )
    if is_merged(model):
        raise ConfigError(f"adapter {adapter!r} is merged into the base weights: call unmerge_adapter() first.")
    if is_disabled(model):
        raise ConfigError(
            f"adapter {adapter!r} is disabled: call enable_adapter_layers(), or leave disable_adapter()."
        )
    return model, adapter


def factor_bytes(model: nn.Module, *, layers: str = "all") -> int:
    """Bytes that a Laplace fit allocates for its factors at its peak, over all devices; nothing is allocated here.

    ``sum over layers of (m^2 + n^2)`` numbers for weights [m, n], plus `EIGEN_COPIES` times the largest of these
    matrices while it is decomposed. Activations and gradients of a batch come on top.

    Raises:
        ConfigError: as `covered_linears`.
    """
    return sum(_bytes_by_device(covered_linears(model, layers=layers)).values())


def refuse_if_too_large(model: nn.Module, *, layers: str, memory_limit: int | None) -> None:
    """Raise a ConfigError, with the numbers, where the factors exceed `memory_limit` bytes, or a device's free memory.

    `memory_limit` is for each device; None stands for what is free there now.
    """
    for device, needed in _bytes_by_device(covered_linears(model, layers=layers)).items():
        free = free_bytes(device) if memory_limit is None else memory_limit
        if needed > free:
            name = "free" if memory_limit is None else "allowed (memory_limit)"
            raise ConfigError(
                f"the Kronecker factors of layers={layers!r} need {needed:,} bytes on {device}, found {free:,} bytes "
                f"{name}: use layers='last', or adapt fewer or narrower layers."
            )


def factor_dtype(linear: nn.Linear) -> torch.dtype:
    """The dtype of a layer's factors: that of its weight, at least float32."""
    return torch.promote_types(linear.weight.dtype, torch.float32)


def free_bytes(device: torch.device) -> int:
    """Memory of `device` that can still be allocated."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def _bytes_by_device(linears: dict[str, nn.Linear]) -> dict[torch.device, int]:
    held: Counter[torch.device] = Counter()
    largest: Counter[torch.device] = Counter()
    for linear in linears.values():
        device, size = linear.weight.device, factor_dtype(linear).itemsize
        squares = linear.out_features**2 * size, linear.in_features**2 * size
        held[device] += sum(squares)
        largest[device] = max(largest[device], *squares)
    return {device: held[device] + EIGEN_COPIES * largest[device] for device in held}


def _head_linears(model: PeftModel, adapter: str) -> dict[str, nn.Linear]:
    return {
        f"{path}.{inner}" if inner else path: module
        for path, wrapper in model.get_base_model().named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save
        for inner, module in wrapper.modules_to_save[adapter].named_modules()
        if isinstance(module, nn.Linear)
    }
