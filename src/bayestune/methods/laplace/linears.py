"""Find the linear layers of a plain LoRA adapter that the curvature covers, and the memory that its factors need."""

from collections import Counter
from typing import Literal, get_args

import psutil
import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from bayestune.adapters.layers import is_disabled
from bayestune.errors import ConfigError
from bayestune.methods.base import plain_adapter
from bayestune.storage.state import lora_layers

Layers = Literal["all", "last"]
EIGEN_COPIES = 4
"""Matrices of its own size that a factor's eigendecomposition needs: the vectors, two for workspace, and a copy."""


def covered_linears(model: nn.Module, *, layers: str) -> dict[str, nn.Linear]:
    """Return the linear layers, by name, whose weights get a distribution.

    "all": the A and B of every layer that the active adapter adapts, ``<path in the base model>.lora_A`` and
    ``.lora_B``. "last": the linear layers of the head that the adapter trains in full (`modules_to_save`); without
    such a head, the A and B of the last adapted layer. Biases are not covered.

    Raises:
        ConfigError: the adapter is not plain LoRA of linear layers, or is merged or disabled; `layers` is unknown.
    """
    if layers not in get_args(Layers):
        raise ConfigError(f"layers: found {layers!r}, expected one of {get_args(Layers)}.")
    model, adapter = plain_adapter(model, by="laplace")
    if is_disabled(model):
        raise ConfigError(
            f"adapter {adapter!r} is disabled: call enable_adapter_layers(), or leave disable_adapter()."
        )
    heads = _head_linears(model, adapter)
    if layers == "last" and heads:
        return heads
    adapted = list(lora_layers(model, adapter).items())
    linears: dict[str, nn.Linear] = {}
    for path, layer in adapted[-1:] if layers == "last" else adapted:
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
            linears[f"{path}.{part}"] = linear
    return linears


def refuse_if_too_large(model: nn.Module, *, layers: str) -> None:
    """Raise a ConfigError if the factors exceed the free memory of a device; nothing is allocated."""
    linears = covered_linears(model, layers=layers)
    for device, needed in _bytes_by_device(linears).items():
        free = free_bytes(device)
        if needed <= free:
            continue
        there = {name: max(linear.weight.shape) for name, linear in linears.items() if linear.weight.device == device}
        widest = max(there, key=lambda name: there[name])
        advice = f"leave it out of {'target_modules' if '.lora_' in widest else 'modules_to_save'}"
        if layers == "all":
            last = _bytes_by_device(covered_linears(model, layers="last"))
            advice = f"use layers='last', or {advice}" if all(last[d] <= free_bytes(d) for d in last) else advice
        raise ConfigError(
            f"the Kronecker factors of layers={layers!r} need {needed:,} bytes on {device}, found {free:,} bytes "
            f"free; the largest is of {widest.split('.lora_')[0]!r}, {there[widest]} wide: {advice}."
        )


def _bytes_by_device(linears: dict[str, nn.Linear]) -> dict[torch.device, int]:
    """Return the bytes of ``sum over layers of (m^2 + n^2)`` numbers, plus `EIGEN_COPIES` times the largest matrix.

    Weights are [m, n]. The activations and gradients of a batch are not counted.
    """
    held: Counter[torch.device] = Counter()
    largest: Counter[torch.device] = Counter()
    for linear in linears.values():
        device, size = linear.weight.device, factor_dtype(linear).itemsize
        squares = linear.out_features**2 * size, linear.in_features**2 * size
        held[device] += sum(squares)
        largest[device] = max(largest[device], *squares)
    return {device: held[device] + EIGEN_COPIES * largest[device] for device in held}


def factor_dtype(linear: nn.Linear) -> torch.dtype:
    """Return the dtype of a layer's factors: that of its weight, but at least float32."""
    return torch.promote_types(linear.weight.dtype, torch.float32)


def free_bytes(device: torch.device) -> int:
    """Return the memory of `device` that can still be allocated."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


def _head_linears(model: PeftModel, adapter: str) -> dict[str, nn.Linear]:
    return {
        f"{path}.{inner}" if inner else path: module
        for path, wrapper in model.get_base_model().named_modules()
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter in wrapper.modules_to_save
        for inner, module in wrapper.modules_to_save[adapter].named_modules()
        if isinstance(module, nn.Linear)
    }
