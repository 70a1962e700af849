"""LoRA adapters as GGUF files for llama.cpp. The only file that imports gguf.

llama.cpp rotates neighboring rows of a query or key projection where transformers rotates the two halves of a head.
Its converter therefore reorders these rows in models of some architectures, and an adapter must be reordered likewise.
"""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peft import PeftModel
from peft.tuners.lora import Embedding
from torch import Tensor
from transformers import PreTrainedModel

from bayestune.adapters import tied_head
from bayestune.errors import ConfigError
from bayestune.storage import state

CONVERTER = "python convert_lora_to_gguf.py --base BASE DRAW_FOLDER"
"""The command of llama.cpp that converts one folder of a PEFT export."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How llama.cpp stores the models of one architecture.

    Attributes:
        name: GGUF's name of the architecture.
        permuted: the layers whose rows are reordered, with the config setting that holds their number of heads.
    """

    name: str
    permuted: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


_ROTATED = MappingProxyType({"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"})

ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType(
    {
        "gemma": Architecture(name="gemma"),
        "gemma2": Architecture(name="gemma2"),
        "gemma3_text": Architecture(name="gemma3"),
        "llama": Architecture(name="llama", permuted=_ROTATED),
        "mistral": Architecture(name="llama", permuted=_ROTATED),
        "qwen2": Architecture(name="qwen2"),
        "qwen3": Architecture(name="qwen3"),
        "smollm3": Architecture(name="smollm3", permuted=_ROTATED),
    }
)
"""The architectures that can be written, by transformers' ``model_type``."""


@dataclass(frozen=True, kw_only=True)
class GgufLayer:
    """An adapted layer in a GGUF file.

    Attributes:
        name: GGUF's name of the layer's weight.
        heads: number of heads whose rows are reordered; 0 if the rows keep their order.
    """

    name: str
    heads: int


def check_gguf_package() -> None:
    """Raise an error unless the package gguf is installed.

    Raises:
        ConfigError: the package is missing.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("format 'gguf': found no package gguf, expected it installed; run: pip install '.[serve]'")


def gguf_layers(model: PeftModel, adapter: str) -> tuple[Architecture, dict[str, GgufLayer]]:
    """Return the architecture of a model's base, and the GGUF name of each layer that `adapter` adapts.

    Args:
        model: the model with the adapter.
        adapter: name of the adapter.

    Returns:
        The architecture, and the layers by their path in the base model.

    Raises:
        ConfigError: the package gguf is missing, or llama.cpp cannot load the adapter: the architecture is unknown
            here, whole modules are replaced (`modules_to_save`), a weight is tied, or a layer has no GGUF name.

    References:
        llama.cpp, commit 0c1e57098, ``conversion/llama.py`` (``undo_permute``) and ``convert_lora_to_gguf.py``.
    """
    check_gguf_package()
    import gguf

    base = model.get_base_model()
    config: dict[str, Any] = {"model_type": type(base).__name__}
    if isinstance(base, PreTrainedModel):
        config = base.config.to_dict()
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        raise ConfigError(
            f"format 'gguf': found the architecture {config['model_type']!r}, expected one of "
            f"{', '.join(ARCHITECTURES)}; export with format 'peft' and convert each folder: {CONVERTER}"
        )
    _check_modules(model, adapter)
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture.name], config["num_hidden_layers"])
    layers = {}
    for path in state.lora_layers(model, adapter):
        name, heads = names.get_name(path), architecture.permuted.get(path.rpartition(".")[2])
        if name is None:
            raise ConfigError(
                f"format 'gguf': found an adapter on {path}, expected a layer that GGUF names in the architecture "
                f"{architecture.name!r}; adapt other layers, or export with format 'peft'."
            )
        layers[path] = GgufLayer(name=f"{name}.weight", heads=config[heads] if heads else 0)
    return architecture, layers


def _check_modules(model: PeftModel, adapter: str) -> None:
    """Raise an error for an adapter on modules that llama.cpp refuses or computes differently."""
    heads = state.owned_heads(model, adapter)
    if heads:
        raise ConfigError(
            f"format 'gguf': found modules_to_save {heads}, expected LoRA layers alone, since a llama.cpp adapter "
            "cannot replace a module; export with format 'peft'."
        )
    layers, tied = state.lora_layers(model, adapter), tied_head(model)
    if tied in layers:
        raise ConfigError(
            f"format 'gguf': found an adapter on {tied}, whose weight is tied to another layer's, expected a weight "
            "of its own, since llama.cpp refuses such adapters; adapt other layers, or export with format 'peft'."
        )
    for path, layer in layers.items():
        if isinstance(layer, Embedding):
            raise ConfigError(
                f"format 'gguf': found an adapter on the embeddings {path}, expected linear layers alone; adapt "
                "other layers, or export with format 'peft'."
            )


def permuted_rows(weight: Tensor, heads: int) -> Tensor:
    r"""Return a query or key projection's rows in llama.cpp's order, in which rotated pairs are neighbors.

    .. math:: W'_{(h, i, p)} = W_{(h, p, i)}, \quad p \in \{0, 1\}, \quad 0 \le i < d / 2

    Args:
        weight: weight or lora_B of the projection, ``[heads * d, inputs]``, where d is the even size of a head.
        heads: number of heads; for a key projection, of key-value heads.

    Returns:
        The same rows in another order, ``[heads * d, inputs]``.

    Example:
        >>> import torch
        >>> permuted_rows(torch.arange(8).view(8, 1), heads=2).flatten().tolist()
        [0, 2, 1, 3, 4, 6, 5, 7]

    References:
        llama.cpp, commit 0c1e57098, ``conversion/llama.py``, ``LlamaModel.permute``.
    """
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_gguf(
    architecture: Architecture,
    layers: Mapping[str, GgufLayer],
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    rank: int,
    source: Mapping[str, str],
) -> None:
    """Write one adapter as a GGUF file in float32.

    llama.cpp scales an adapter by ``alpha / rank``. Alpha is written as the rank, since B includes LoRA's scale.

    Args:
        architecture: architecture of the base model.
        layers: the adapted layers, by their path in the base model, as `gguf_layers` returns them.
        path: the file to write.
        tensors: lora_A ``[rank, inputs]`` and lora_B ``[outputs, rank]`` of each layer, by PEFT's key; B is scaled.
        rank: rank of every layer.
        source: origin of the adapter: ``draw`` and, for a draw, ``seed``.
    """
    import gguf

    writer = gguf.GGUFWriter(path, architecture.name)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(rank))
    for key, value in source.items():
        writer.add_string(f"bayestune.{key}", value)
    for layer, place in layers.items():
        a, b = (tensors[f"base_model.model.{layer}.lora_{side}.weight"].float().cpu() for side in "AB")
        b = permuted_rows(b, place.heads) if place.heads else b
        for suffix, tensor in (("lora_a", a), ("lora_b", b)):
            writer.add_tensor(f"{place.name}.{suffix}", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
