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
_SETTINGS = (
    ("model_type", "vocab_size", "type_vocab_size", "tie_word_embeddings", "is_encoder_decoder")
    + ("hidden_size", "n_embd", "d_model", "d_kv", "head_dim", "intermediate_size", "n_inner", "d_ff")
    + ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers")
    + ("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "num_experts", "num_experts_per_tok")
    + ("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj")
    + ("layer_norm_eps", "layer_norm_epsilon", "rms_norm_eps", "max_position_embeddings", "n_positions")
    + ("rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "relative_attention_num_buckets")
)


def fingerprint(model: nn.Module, *, heads: Collection[str] = ()) -> dict[str, Any]:
    """The identity of a base model, as values that JSON holds; the same for the same base loaded again.

    Of a `PeftModel` it is that of the model underneath: adapters and the heads its active adapter owns
    (`modules_to_save`) are left out. `heads` names modules to leave out of a base that carries no adapter.

    Returns:
        ``architecture`` (class name), ``config`` (settings of the Hugging Face configuration that change what the
        model computes) and ``weights``: for each parameter ``"dtype exact rounded"``, the last two hashes of at most
        64 values spread evenly over it, as float32 and as bfloat16; None where its values are packed by a quantiser
        or not in memory, so that such a parameter is known by its name only.
    """
    adapters: list[str] = []
    if isinstance(model, PeftModel):
        model, adapters = model.get_base_model(), model.active_adapters
    return {
        **settings(model),
        "weights": {name: _hashes(value) for name, value in _parameters(model, "", adapters, heads)},
    }


def settings(base: nn.Module) -> dict[str, Any]:
    """The part of `fingerprint` that needs no weights: ``architecture`` and ``config``."""
    config = base.config.to_dict() if isinstance(base, PreTrainedModel) else {}
    shaping = {name: config[name] for name in _SETTINGS if name in config}
    return {"architecture": type(base).__name__, "config": json.loads(json.dumps(shaping, default=str))}


def settings_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """How the architecture or settings of `found` differ from `expected`, in words; None where they agree.

    Settings that only one side has, because another version of transformers wrote it, are not compared.
    """
    if found["architecture"] != expected["architecture"]:
        return f"found a {found['architecture']}, expected a {expected['architecture']}"
    for name in (name for name in _SETTINGS if name in expected["config"] and name in found["config"]):
        if found["config"][name] != expected["config"][name]:
            return f"found {name}={found['config'][name]!r}, expected {expected['config'][name]!r}"
    return None


def weights_difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """How the sampled weights of `found` differ from `expected`, in words; None where they agree.

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


def _parameters(
    module: nn.Module, prefix: str, adapters: Sequence[str], heads: Collection[str]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of the base by the names they have without PEFT."""
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
        yield from _parameters(child, f"{prefix}{name}.", adapters, heads)


def _hashes(parameter: nn.Parameter) -> str | None:
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.is_meta:
        return None  # packed by a quantiser, or offloaded
    count = min(SAMPLES, parameter.numel())
    places = torch.arange(count, device=parameter.device) * (parameter.numel() - 1) // max(1, count - 1)
    values = parameter.detach().reshape(-1)[places].cpu().float()
    dtype = str(parameter.dtype).removeprefix("torch.")
    return f"{dtype} {_digest(values)} {_digest(values.bfloat16().float())}"


def _digest(values: torch.Tensor) -> str:
    return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]
