"""An adapter as PEFT writes it, in files that loading needs no regular expression for."""

import json
import os
import shutil
from pathlib import Path

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from bayestune.files import strict_json
from bayestune.storage.manifest import CONFIG_FILE, CONFIG_LIMIT, TENSOR_FILE


def write_adapter(model: PeftModel, adapter: str, folder: Path) -> None:
    """Settings and tensors of one adapter, in `folder` itself whatever its name."""
    # Embeddings are saved only as modules_to_save: PEFT's own guess would store frozen base weights, and ask the Hub.
    model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
    if adapter != "default":
        for name in (CONFIG_FILE, TENSOR_FILE):
            os.replace(folder / adapter / name, folder / name)
        shutil.rmtree(folder / adapter)
    _list_layers(model, adapter, folder / CONFIG_FILE)


def _list_layers(model: PeftModel, adapter: str, path: Path) -> None:
    """Put the names of the adapted layers in the place of a regular expression, which loading would have to run."""
    values = strict_json(path.read_bytes(), limit=CONFIG_LIMIT)
    if not (isinstance(values["target_modules"], str) or isinstance(values.get("exclude_modules"), str)):
        return
    names = {name for name, _ in model.get_base_model().named_modules()}
    layers = sorted(name for name in names if _is_adapted(model.get_base_model().get_submodule(name), adapter))
    if any(name.endswith(f".{layer}") for name in names for layer in layers):
        return  # PEFT takes a name for the end of others too
    path.write_text(json.dumps({**values, "target_modules": layers, "exclude_modules": None}, indent=2))


def _is_adapted(module: nn.Module, adapter: str) -> bool:
    return isinstance(module, LoraLayer) and adapter in module.lora_A
