"""The tensors and settings of one adapter: read from its modules, and checked one by one."""

import copy
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from bayestune.adapters import BayesLoraConfig
from bayestune.adapters.config import INITS
from bayestune.adapters.model import check_linear
from bayestune.errors import ConfigError, PosteriorError

ADAPTERS: dict[str, type[LoraConfig]] = {"point": LoraConfig, "variational": BayesLoraConfig}
"""The configuration of each kind of adapter: plain LoRA, and a distribution over LoRA's matrices."""
MAX_RANK = 1 << 16

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# Settings that may have any value. Every other one must have its default: some change the base weights, some change
# the forward, one names a module for PEFT to import.
_FREE = frozenset(
    ("peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode")
    + ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    + ("rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out", "use_rslora", "init_lora_weights")
    + ("prior_std", "rho_init", "estimator", "distribution")
)


def active_adapter(model: nn.Module) -> tuple[PeftModel, str, str]:
    """Return `model`, the name of its active adapter, and the adapter's kind, a key of `ADAPTERS`.

    Raises:
        ConfigError: `model` is not a PeftModel or does not have exactly one active adapter, or the adapter has a name
            that is unfit for a path or is of another PEFT method.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(f"found a {type(model).__name__}, expected a PeftModel: make one with get_peft_model.")
    if len(model.active_adapters) != 1:
        raise ConfigError(f"active adapters: found {model.active_adapters}, expected one: call set_adapter(name).")
    name = model.active_adapters[0]
    check_name(name)
    config = model.peft_config[name]
    if isinstance(config, BayesLoraConfig):
        return model, name, "variational"
    if type(config) is LoraConfig:
        return model, name, "point"
    raise ConfigError(f"adapter {name!r}: found a {type(config).__name__}, expected a BayesLoraConfig or LoraConfig.")


def check_name(adapter: str) -> None:
    """Raise an error for an adapter name that PEFT would treat as a path, or that some file system refuses.

    Raises:
        ConfigError: the name is not 1 to 64 letters, digits and . _ -, of which the first is a letter or digit.
    """
    if not _NAME.fullmatch(adapter):
        raise ConfigError(f"adapter name: found {adapter!r}, expected at most 64 letters, digits and . _ - only.")


def adapter_config(model: PeftModel, adapter: str) -> LoraConfig:
    """Return the configuration of an adapter that `active_adapter` has accepted."""
    config = model.peft_config[adapter]
    assert isinstance(config, LoraConfig)
    return config


def adapter_tensors(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """Return every tensor of `adapter` by its key in a saved file, which does not depend on the adapter's name."""
    tensors: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for name in module.adapter_layer_names:
                container = model.get_submodule(f"{path}.{name}")
                if isinstance(container, nn.ModuleDict) and adapter in container:
                    tensors |= {f"{path}.{name}.{k}": v for k, v in container[adapter].state_dict().items()}
                elif isinstance(container, nn.ParameterDict) and adapter in container:
                    tensors[f"{path}.{name}"] = container[adapter].detach()
        elif isinstance(module, ModulesToSaveWrapper) and adapter in module.modules_to_save:
            tensors |= {f"{path}.{k}": v for k, v in module.modules_to_save[adapter].state_dict().items()}
    return tensors


def parameter_names(model: PeftModel, adapter: str) -> dict[str, str]:
    """Return, by key, the name in ``model.named_parameters()`` of each tensor of `adapter` that is a parameter."""
    names = {parameter.data_ptr(): name for name, parameter in model.named_parameters()}
    tensors = adapter_tensors(model, adapter)
    return {key: names[tensor.data_ptr()] for key, tensor in tensors.items() if tensor.data_ptr() in names}


def lora_layers(model: PeftModel, adapter: str) -> dict[str, LoraLayer]:
    """Return the layers that `adapter` adapts, by their path in the base model."""
    modules = model.get_base_model().named_modules()
    return {path: module for path, module in modules if isinstance(module, LoraLayer) and adapter in module.r}


def owned_heads(model: PeftModel, adapter: str) -> list[str]:
    """Return the names in the base model of the modules that `adapter` replaces as a whole (`modules_to_save`)."""
    modules = model.get_base_model().named_modules()
    return [n for n, m in modules if isinstance(m, ModulesToSaveWrapper) and adapter in m.modules_to_save]


def describe(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """Return ``{key: [shape, dtype]}``, as the manifest holds it."""
    return {key: [list(t.shape), str(t.dtype).removeprefix("torch.")] for key, t in sorted(tensors.items())}


def tensor_fault(expected: Mapping[str, list[Any]], found: Mapping[str, list[Any]]) -> str | None:
    """Return the first difference between two descriptions of tensors, in words; None if they agree."""
    for key in sorted(expected.keys() - found.keys()):
        return f"tensor {key!r} is missing"
    for key in sorted(found.keys() - expected.keys()):
        return f"tensor {key!r} is not one that the base and the configuration ask for"
    for key, (shape, dtype) in expected.items():
        if found[key][0] != shape:
            return f"tensor {key!r}: found shape {found[key][0]}, expected {shape}"
        if found[key][1] != dtype:
            return f"tensor {key!r}: found {found[key][1]}, expected {dtype} (load the base in that dtype)"
    return None


def value_fault(tensors: Mapping[str, Tensor]) -> str | None:
    """Return which tensor is the first with values that a posterior cannot have, in words; None if there is none."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            return f"tensor {key!r} holds NaN or infinite values"
        if key.endswith((".lora_A.rho", ".lora_B.rho")) and not torch.all(tensor != 0):
            return f"tensor {key!r} holds zeros, a standard deviation of 0: expected |rho| > 0"
    return None


def check_values(tensors: Mapping[str, Tensor]) -> None:
    """Raise a PosteriorError if a tensor holds NaN, infinities, or a standard deviation of 0."""
    fault = value_fault(tensors)
    if fault:
        raise PosteriorError(f"{fault}: this adapter is not written. Go back to the last good checkpoint.")


def settings_fault(values: Any, kind: str) -> str | None:
    """Return the first setting of an adapter_config.json that is not supported, in words; None if there is none."""
    if not isinstance(values, dict):
        return f"found a {type(values).__name__}, expected a JSON object"
    peft_type = "BAYES_LORA" if kind == "variational" else "LORA"
    if values.get("peft_type") != peft_type:
        return f"peft_type: found {values.get('peft_type')!r}, expected {peft_type!r} for a {kind!r} adapter"
    defaults = json.loads(json.dumps(ADAPTERS[kind]().to_dict()))
    for name, value in {**defaults, **values}.items():
        if name not in defaults:
            return f"{name}: not a setting of {ADAPTERS[kind].__name__} here; if a newer peft wrote it, upgrade peft"
        if name not in _FREE and value != defaults[name]:
            return f"{name}: found {value!r}, expected {defaults[name]!r}, the only value a saved posterior may have"
    for rank in (values.get("r", 1), *(values.get("rank_pattern") or {}).values()):
        if type(rank) is not int or not 1 <= rank <= MAX_RANK:
            return f"rank: found {rank!r}, expected 1 to {MAX_RANK}"
    if values.get("init_lora_weights", True) not in INITS:
        return f"init_lora_weights: found {values['init_lora_weights']!r}, expected one of {INITS}"
    return None


def config_fault(config: LoraConfig, kind: str) -> str | None:
    """Return the `settings_fault` of a configuration in memory."""
    return settings_fault(json.loads(json.dumps(config.to_dict(), default=sorted)), kind)


def bayesian_config(model: PeftModel, adapter: str, **posterior: Any) -> BayesLoraConfig:
    """Return the configuration of the plain LoRA `adapter` as a Bayesian one with the settings `posterior`.

    Raises:
        ConfigError: a setting, or a layer with the adapter, cannot have a posterior.
    """
    config = adapter_config(model, adapter)
    for name, layer in lora_layers(model, adapter).items():
        check_linear(name, layer.get_base_layer())
    values = {f.name: copy.deepcopy(getattr(config, f.name)) for f in dataclasses.fields(LoraConfig) if f.init}
    return BayesLoraConfig(**{**values, **posterior, "inference_mode": True})


@torch.no_grad()
def as_bayesian(model: PeftModel, adapter: str, **posterior: Any) -> PeftModel:
    """Unload `model`, and return its base with the plain LoRA `adapter` as a Bayesian one with the same weights.

    The result is named "default", frozen and in evaluation mode; its standard deviations are those of a new adapter.

    Args:
        model: a model with one plain LoRA adapter, not merged.
        adapter: name of the adapter.
        **posterior: settings of `BayesLoraConfig` that `LoraConfig` does not have.

    Raises:
        ConfigError: as `bayesian_config`; the model is unchanged.
    """
    bayesian = bayesian_config(model, adapter, **posterior)
    config, tensors, base = adapter_config(model, adapter), adapter_tensors(model, adapter), model.get_base_model()
    heads = {path: m.original_module for path, m in base.named_modules() if isinstance(m, ModulesToSaveWrapper)}
    model.unload()
    for path, head in heads.items():
        base.set_submodule(path, head)  # unload leaves the trained copy of the adapter there
    made = adapted(base, bayesian, autocast=True)  # A and B are float32 in any case
    adapter_config(made, "default").modules_to_save = copy.copy(config.modules_to_save)  # PEFT added the heads again
    for key, tensor in adapter_tensors(made, "default").items():
        if not key.endswith(".rho"):
            tensor.copy_(tensors[key])
    return made.eval()


def adapted(base: nn.Module, config: LoraConfig, *, autocast: bool) -> PeftModel:
    """Return `base` with a new adapter as `config` describes it; the global random state is unchanged."""
    with torch.random.fork_rng(devices=[]):
        model = get_peft_model(base, config, autocast_adapter_dtype=autocast)
    assert isinstance(model, PeftModel)
    return model
