"""What identifies a base model: the settings that shape its function, and a sample of every weight."""

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

SAMPLES = 64
# Settings that do not change what given weights compute. All others count, since a list of those that do change
# it would miss the logit scale or soft cap of the next architecture.
_IRRELEVANT = frozenset(
    ("_name_or_path", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "architectures")
    + ("auto_map", "transformers_version", "dtype", "torch_dtype", "quantization_config", "use_cache", "torchscript")
    + ("task_specific_params", "output_attentions", "output_hidden_states", "return_dict", "gradient_checkpointing")
    + ("pruned_heads", "id2label", "label2id", "num_labels", "problem_type", "finetuning_task", "initializer_range")
    + ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "decoder_start_token_id", "tokenizer_class")
    + ("chunk_size_feed_forward",)
)
# If several settings differ, one of these is named first, since the others follow from it.
_FIRST = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")


def fingerprint(model: nn.Module, *, heads: Collection[str] = ()) -> dict[str, Any]:
    """Return the identity of a base model as JSON values; it is the same each time the base is loaded.

    For a `PeftModel` it describes the model underneath, without adapters and without the heads that the active
    adapter owns (`modules_to_save`). `heads` names modules to leave out of a base that carries no adapter.

    Returns:
        ``architecture`` (class name), ``config`` (settings of the Hugging Face configuration that change what the
        model computes) and ``weights``: for each parameter ``"dtype exact rounded"``, where the last two are hashes
        of at most 64 values spread evenly over it, as float32 and as bfloat16; None if its values are packed by a
        quantizer or not in memory, so that only the parameter's name is compared.
    """
    adapters: list[str] = []
    if isinstance(model, PeftModel):
        model, adapters = model.get_base_model(), model.active_adapters
    parameters = base_parameters(model, adapters=adapters, heads=heads)
    return settings(model) | {"weights": {name: _hashes(parameter) for name, parameter in parameters}}


def settings(base: nn.Module) -> dict[str, Any]:
    """Return the part of `fingerprint` that does not need weights: ``architecture`` and ``config``."""
    config = base.config.to_dict() if isinstance(base, PreTrainedModel) else {}
    return {"architecture": type(base).__name__, "config": json.loads(json.dumps(_relevant(config), default=str))}


def _relevant(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that count, also in nested configurations."""
    kept = {name: value for name, value in config.items() if name not in _IRRELEVANT and "drop" not in name}
    return {name: _relevant(value) if isinstance(value, dict) else value for name, value in kept.items()}


def settings_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Return how the architecture or settings of `found` differ from `expected`, in words; None if they agree.

    Settings that only one side has are not compared, since another version of transformers wrote them.
    """
    if found["architecture"] != expected["architecture"]:
        return f"found a {found['architecture']}, expected a {expected['architecture']}"
    shared = expected["config"].keys() & found["config"].keys()
    for name in (*(name for name in _FIRST if name in shared), *sorted(shared)):
        if found["config"][name] != expected["config"][name]:
            return f"found {name}={found['config'][name]!r}, expected {expected['config'][name]!r}"
    return None


def weights_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Return how the sampled weights of `found` differ from `expected`, in words; None if they agree.

    In the same dtype the samples must agree exactly. Across dtypes (a float32 checkpoint loaded as bfloat16) they
    must agree after rounding to bfloat16.
    """
    ours, theirs = found["weights"], expected["weights"]
    if ours.keys() != theirs.keys():
        names = sorted(ours.keys() ^ theirs.keys())
        here = "has" if names[0] in ours else "lacks"
        return f"the base given {here} a parameter {names[0]!r} ({len(names)} such names)"
    different = [name for name in theirs if not _same(theirs[name], ours[name])]
    if different:
        return (
            f"{len(different)} of {len(theirs)} parameters have other values, the first is {different[0]!r} "
            f"(found {ours[different[0]]}, expected {theirs[different[0]]})"
        )
    return None


def _same(expected: str | None, found: str | None) -> bool:
    if expected is None or found is None:
        return True
    dtype, exact, rounded = expected.split(" ")
    other_dtype, other_exact, other_rounded = found.split(" ")
    return exact == other_exact or (dtype != other_dtype and rounded == other_rounded)


def base_parameters(
    module: nn.Module, prefix: str = "", *, adapters: Sequence[str], heads: Collection[str] = ()
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of the base with the names that they have without PEFT."""
    if prefix.removesuffix(".") in heads:
        return
    if isinstance(module, ModulesToSaveWrapper):
        if any(adapter in module.modules_to_save for adapter in adapters):
            return
        module = module.original_module
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    for name, parameter in module.named_parameters(recurse=False):
        yield prefix + name, parameter
    for name, child in module.named_children():
        yield from base_parameters(child, f"{prefix}{name}.", adapters=adapters, heads=heads)


def _hashes(parameter: nn.Parameter) -> str | None:
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.is_meta:
        return None  # packed by a quantizer, or offloaded
    count = min(SAMPLES, parameter.numel())
    places = torch.arange(count, device=parameter.device) * (parameter.numel() - 1) // max(1, count - 1)
    values = parameter.detach().reshape(-1)[places].cpu().float()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return f"{dtype} {_digest(values)} {_digest(values.bfloat16().float())}"


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
