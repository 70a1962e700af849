"""Save a posterior as a folder."""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from bayestune.adapters import is_merged
from bayestune.adapters.card import write_card
from bayestune.errors import ConfigError, PosteriorError
from bayestune.files import new_folder, strict_json
from bayestune.sampling.base import Posterior
from bayestune.sampling.posteriors import Point, Variational
from bayestune.storage import state
from bayestune.storage.fingerprint import fingerprint
from bayestune.storage.manifest import (
    CONFIG_FILE,
    CONFIG_LIMIT,
    KNOWN,
    PART_FILE,
    STD,
    TENSOR_FILE,
    member_folder,
    write_manifest,
)


def save_posterior(model: nn.Module | Posterior, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Save a posterior, or the active adapter of a model, to the folder `path`, whole or not at all.

    The folder holds what PEFT writes (``PeftModel.from_pretrained`` loads it, after ``import bayestune``), further
    files of the posterior, and a manifest with the sha256 of each file and a fingerprint of the base model. Nothing is
    pickled. Other adapters of the model are not saved.

    Args:
        model: a `Posterior`, or a PeftModel with one active BAYES_LORA or LORA adapter; not merged.
        path: the folder to make; its parents are made too.
        overwrite: replace a folder that bayestune wrote before. An interrupted save leaves the old one loadable.

    Raises:
        ConfigError: `path` exists, or the adapter has settings or a name that cannot be saved faithfully.
        PosteriorError: the adapter holds NaN, infinities, or a standard deviation of 0.
    """
    posterior = as_posterior(model)
    model, adapter, kind = state.active_adapter(posterior.model)
    if posterior.adapter != kind:
        raise ConfigError(f"a {posterior.kind!r} posterior: found a {kind!r} adapter, expected {posterior.adapter!r}.")
    config, tensors = state.adapter_config(model, adapter), state.adapter_tensors(model, adapter)
    _check_savable(model, tensors)
    with new_folder(path, overwrite=overwrite, kind="posterior") as folder:
        _write_adapter(model, adapter, folder)
        adapter_only = posterior.kind in (Point.kind, Variational.kind) and posterior.temperature == 1.0
        write_card(folder, model.get_base_model(), config, posterior.kind, adapter_only=adapter_only)
        _check_written(folder, kind, tensors)
        content = {
            "posterior": posterior.kind,
            "std": STD if kind == Variational.adapter else None,
            "base": {"name": config.base_model_name_or_path, **fingerprint(model)},
            "tensors": state.describe(tensors),
            **_write_parts(posterior, folder),
        }
        names = (CONFIG_FILE, TENSOR_FILE, PART_FILE)
        written = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.name in names]
        write_manifest(folder, content, written)


def as_posterior(model: nn.Module | Posterior) -> Posterior:
    """Return the posterior that the active adapter of a model holds; a `Posterior` is returned as it is.

    Raises:
        ConfigError: as `active_adapter`.
    """
    if isinstance(model, Posterior):
        return model
    found, _, kind = state.active_adapter(model)
    return Variational(found) if kind == Variational.adapter else Point(found)


def _check_savable(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    if is_merged(model):
        raise ConfigError("the adapter is merged into the base weights: call unmerge_adapter() before saving.")
    state.check_values(tensors)
    adapters = {t.data_ptr() for name in model.peft_config for t in state.adapter_tensors(model, name).values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in adapters:
            raise ConfigError(
                f"{name} is trainable but not part of the adapter, so it would be lost: "
                "name its module in modules_to_save, or freeze it."
            )


def _write_adapter(model: PeftModel, adapter: str, folder: Path) -> None:
    """Write settings and tensors of one adapter as PEFT does, but in `folder` itself whatever the adapter's name."""
    # Embeddings are saved only as modules_to_save: PEFT's own guess would store frozen base weights, and ask the Hub.
    model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
    if adapter != "default":
        for name in (CONFIG_FILE, TENSOR_FILE):
            os.replace(folder / adapter / name, folder / name)
        shutil.rmtree(folder / adapter)
    _list_layers(model, adapter, folder / CONFIG_FILE)


def _list_layers(model: PeftModel, adapter: str, path: Path) -> None:
    """Replace a regular expression with the names of the adapted layers, since loading would have to run it."""
    values = strict_json(path.read_bytes(), limit=CONFIG_LIMIT)
    if not (isinstance(values["target_modules"], str) or isinstance(values.get("exclude_modules"), str)):
        return
    layers = sorted(state.lora_layers(model, adapter))
    names = [name for name, _ in model.get_base_model().named_modules()]
    if any(name.endswith(f".{layer}") for name in names for layer in layers):
        return  # PEFT would also adapt the modules whose names end like this
    path.write_text(json.dumps({**values, "target_modules": layers, "exclude_modules": None}, indent=2))


def _check_written(folder: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    """Check that PEFT wrote exactly `tensors`, and settings that `load_posterior` will accept."""
    fault = state.settings_fault(strict_json((folder / CONFIG_FILE).read_bytes(), limit=CONFIG_LIMIT), kind)
    if fault:
        raise ConfigError(f"the adapter cannot be saved as a posterior: {fault}.")
    written = safetensors.torch.load_file(folder / TENSOR_FILE)
    fault = state.tensor_fault(state.describe(tensors), state.describe(written))
    if fault or not all(torch.equal(written[key], tensor.cpu()) for key, tensor in tensors.items()):
        raise ConfigError(
            f"PEFT did not write this adapter whole ({fault or 'other values'}): is an adapter of the model named "
            "like one of its modules? Give it another name."
        )


def _write_parts(posterior: Posterior, folder: Path) -> dict[str, Any]:
    """Write what a posterior holds besides one adapter, and return the manifest's entries for it.

    Every member of an ensemble after the first has its own LoRA folder, ``member_1`` and so on.
    """
    if not 0 < posterior.temperature < math.inf:
        raise PosteriorError(f"temperature: found {posterior.temperature}, expected a number above 0.")
    known = {} if posterior.known is None else {KNOWN: posterior.known}
    tensors, *members = (
        {key: tensor.detach().cpu().contiguous() for key, tensor in group.items()}
        for group in ({**posterior.tensors(), **known}, *posterior.more_members())
    )
    for group in (tensors, *members):
        fault = state.value_fault(group)
        if fault:
            raise PosteriorError(f"{fault}: this posterior is not written.")
    if tensors:
        save_file(tensors, folder / PART_FILE)
    for number, member in enumerate(members, start=1):
        path = folder / member_folder(number)
        path.mkdir()
        shutil.copyfile(folder / CONFIG_FILE, path / CONFIG_FILE)
        save_file(member, path / TENSOR_FILE)
    settings = {**posterior.settings(), "temperature": posterior.temperature}
    return {"settings": settings, "parts": state.describe(tensors), "members": len(members) + 1}
