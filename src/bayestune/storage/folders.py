"""Saving a posterior as a folder, and loading it with every byte checked."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from bayestune.adapters import is_merged
from bayestune.adapters.card import add_notice
from bayestune.errors import ConfigError, PosteriorError
from bayestune.files import existing_folder, new_folder, strict_json
from bayestune.sampling.base import Posterior
from bayestune.sampling.posteriors import Point, Variational
from bayestune.storage.adapter_files import write_adapter
from bayestune.storage.fingerprint import fingerprint, settings, settings_difference, weights_difference
from bayestune.storage.manifest import (
    CONFIG_FILE,
    CONFIG_LIMIT,
    PART_FILE,
    STD,
    TENSOR_FILE,
    file_record,
    member_folder,
    read_files,
    read_manifest,
    versions,
    write_manifest,
)
from bayestune.storage.parts import assemble, write_parts
from bayestune.storage.state import (
    ADAPTERS,
    active_adapter,
    adapted,
    adapter_config,
    adapter_tensors,
    check_values,
    describe,
    owned_heads,
    settings_fault,
    skeleton,
    tensor_fault,
    value_fault,
)


def save_posterior(model: nn.Module | Posterior, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Save a posterior, or the active adapter of a model, to the folder `path`, whole or not at all.

    The folder holds what PEFT writes (``PeftModel.from_pretrained`` loads it, after ``import bayestune``), files of
    the posterior's own, and a manifest with the sha256 of each file and a fingerprint of the base model. Nothing is
    pickled. Other adapters of the model are not saved.

    Args:
        model: a `Posterior`, or a PeftModel with one active BAYES_LORA or LORA adapter; not merged.
        path: the folder to make; its parents are made too.
        overwrite: replace a folder that bayestune wrote before. An interrupted save leaves the old one loadable.

    Raises:
        ConfigError: `path` exists, or the adapter has settings or a name that cannot be saved faithfully.
        PosteriorError: the adapter holds NaN, infinities, or a standard deviation of 0.
    """
    posterior = model if isinstance(model, Posterior) else _of_adapter(model)
    model, adapter, adapter_kind = active_adapter(posterior.model)
    kind = posterior.kind
    if posterior.adapter != adapter_kind:
        raise ConfigError(f"a {kind!r} posterior: found a {adapter_kind!r} adapter, expected {posterior.adapter!r}.")
    tensors = adapter_tensors(model, adapter)
    _check_savable(model, tensors)
    with new_folder(path, overwrite=overwrite) as folder:
        write_adapter(model, adapter, folder)
        if adapter_kind == "variational":
            add_notice(folder)
        _check_written(folder, adapter_kind, tensors)
        parts = write_parts(posterior, folder)
        base = {"name": adapter_config(model, adapter).base_model_name_or_path, **fingerprint(model)}
        content = {
            **versions(),
            "posterior": kind,
            "std": STD if adapter_kind == "variational" else None,
            "base": base,
            "files": {name: file_record(folder / name) for name in sorted(_files(folder))},
            "tensors": describe(tensors),
            **parts,
        }
        write_manifest(folder, content=content)


def _of_adapter(model: nn.Module) -> Posterior:
    found, _, kind = active_adapter(model)
    return Variational(found) if kind == Variational.adapter else Point(found)


def _files(folder: Path) -> list[str]:
    """The files that the manifest of `folder` is to vouch for."""
    names = (CONFIG_FILE, TENSOR_FILE, PART_FILE)
    return [str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.name in names]


def load_posterior(base_model: nn.Module, path: str | os.PathLike[str], *, trainable: bool = False) -> PeftModel:
    """Load the adapter that `save_posterior` wrote onto `base_model`, or fail before anything is changed.

    Checked first: the manifest and its checksum, size and sha256 of each file, that no other file or link is there,
    every setting, the keys, shapes and dtypes that this base and the settings ask for, finite values, and that
    `base_model` is the base the posterior was trained on (settings and a sample of every weight; the same checkpoint
    in another dtype is the same base). Only JSON and safetensors are read. Nothing in the folder can make a module
    be imported or anything be fetched: the base is the one given.

    Args:
        base_model: the pretrained model, without adapters; it is modified in place, as PEFT does.
        path: the folder.
        trainable: make the adapter trainable; otherwise it is frozen and in evaluation mode.

    Returns:
        The model with the adapter active under the name "default", answering with the posterior mean.

    Raises:
        ConfigError: `base_model` already carries an adapter.
        PosteriorError: the folder is incomplete, altered, of a newer format, or made for another base; or it holds
            more than an adapter (members, variances, a temperature), which `load` reads.
    """
    folder = existing_folder(path)
    manifest, contents = _read(base_model, folder)
    settings, kind = manifest["settings"], manifest["posterior"]
    alone = {found.kind: found for found in (Point, Variational)}
    if kind not in alone or settings.get("temperature", 1.0) != 1.0:
        found = f"a posterior of kind {kind!r}" + (f" with settings {settings}" if settings else "")
        raise PosteriorError(
            f"{folder}: found {found}, expected an adapter and no more: its model alone would answer otherwise. "
            "Load it with bayestune.methods.load."
        )
    _check_adapter(folder, manifest, alone[kind])
    return _onto(base_model, folder, manifest, contents, trainable=trainable)


def load(base_model: nn.Module, path: str | os.PathLike[str], *, kinds: Mapping[str, type[Posterior]]) -> Posterior:
    """Load a posterior of one of `kinds` that `save_posterior` wrote; frozen and in evaluation mode.

    Everything is checked as by `load_posterior`, and every other file of the folder in the same way.

    Raises:
        ConfigError, PosteriorError: as `load_posterior`.
    """
    folder = existing_folder(path)
    manifest, contents = _read(base_model, folder)
    if manifest["posterior"] not in kinds:
        raise PosteriorError(
            f"{folder}: found a posterior of kind {manifest['posterior']!r}, expected one of {sorted(kinds)}."
        )
    _check_adapter(folder, manifest, kinds[manifest["posterior"]])
    parts = _tensors(folder / PART_FILE, contents[PART_FILE], manifest["parts"]) if PART_FILE in contents else {}
    members = []
    for number in range(1, 1 + sum(name.endswith(f"/{TENSOR_FILE}") for name in contents)):
        path = folder / member_folder(number)
        data = contents[f"{path.name}/{TENSOR_FILE}"]
        if contents[f"{path.name}/{CONFIG_FILE}"] != contents[CONFIG_FILE]:
            raise PosteriorError(f"{path / CONFIG_FILE}: found other settings than those of member 0.")
        members.append(_tensors(path / TENSOR_FILE, data, manifest["tensors"]))
    model = _onto(base_model, folder, manifest, contents, trainable=False)
    try:
        return assemble(kinds[manifest["posterior"]], model, manifest["settings"], parts, members)
    except PosteriorError as error:
        model.unload()
        raise PosteriorError(f"{folder}: {error}") from error


def _check_adapter(folder: Path, manifest: dict[str, Any], posterior: type[Posterior]) -> None:
    """Refuse a kind of posterior that does not live on the kind of adapter in the folder."""
    if manifest["std"] not in (STD, None) or (manifest["std"] is None) != (posterior.adapter == Point.adapter):
        expected = None if posterior.adapter == Point.adapter else STD
        raise PosteriorError(
            f"{folder}: found the parameterisation std = {manifest['std']}, expected std = {expected} for a posterior "
            f"of kind {posterior.kind!r}."
        )


def _read(base_model: nn.Module, folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The checked manifest and files of a folder that is to be loaded onto `base_model`."""
    if isinstance(base_model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base_model.modules()):
        raise ConfigError("the base model already carries an adapter: load it anew, or call unload() first.")
    try:
        manifest = read_manifest(folder)
        return manifest, read_files(folder, manifest["files"])
    except OSError as error:  # not of a folder at rest
        raise PosteriorError(f"{folder} cannot be read ({error}): if it is being replaced, load it again.") from error


def _onto(
    base_model: nn.Module, folder: Path, manifest: dict[str, Any], contents: dict[str, bytes], *, trainable: bool
) -> PeftModel:
    """`base_model` with the adapter of a folder, or an error before it is changed."""
    config = _config(folder, contents[CONFIG_FILE], manifest)
    config.inference_mode = not trainable
    tensors = _tensors(folder / TENSOR_FILE, contents[TENSOR_FILE], manifest["tensors"])
    half = any(".lora_" in key and t.dtype in (torch.float16, torch.bfloat16) for key, t in tensors.items())
    _check_fit(folder, base_model, config, tensors, manifest, autocast=not half)
    model = adapted(base_model, config, autocast=not half)
    _fill(model, tensors)
    return model if trainable else model.eval()


def _check_savable(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    if is_merged(model):
        raise ConfigError("the adapter is merged into the base weights: call unmerge_adapter() before saving.")
    check_values(tensors)
    adapters = {t.data_ptr() for name in model.peft_config for t in adapter_tensors(model, name).values()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.data_ptr() not in adapters:
            raise ConfigError(
                f"{name} is trainable but no part of the adapter, so it would be lost: "
                "name its module in modules_to_save, or freeze it."
            )


def _check_written(folder: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    """That PEFT wrote all of `tensors` and nothing else, and settings that `load_posterior` will take."""
    fault = settings_fault(strict_json((folder / CONFIG_FILE).read_bytes(), limit=CONFIG_LIMIT), kind)
    if fault:
        raise ConfigError(f"the adapter cannot be saved as a posterior: {fault}.")
    written = safetensors.torch.load_file(folder / TENSOR_FILE)
    fault = tensor_fault(describe(tensors), describe(written))
    if fault or not all(torch.equal(written[key], tensor.cpu()) for key, tensor in tensors.items()):
        raise ConfigError(
            f"PEFT did not write this adapter whole ({fault or 'other values'}): is an adapter of the model named "
            "like one of its modules? Give it another name."
        )


def _config(folder: Path, text: bytes, manifest: dict[str, Any]) -> LoraConfig:
    kind = "point" if manifest["std"] is None else "variational"
    try:
        values = strict_json(text, limit=CONFIG_LIMIT)
        fault = settings_fault(values, kind)
        if fault:
            raise PosteriorError(f"{folder / CONFIG_FILE}: {fault}.")
        # The base is the one given: where the file says it came from is not followed.
        return ADAPTERS[kind](**{**values, "auto_mapping": None, "base_model_name_or_path": None, "revision": None})
    except PosteriorError:
        raise
    except (ValueError, TypeError) as error:
        raise PosteriorError(f"{folder / CONFIG_FILE}: {_one_line(error)}") from error


def _tensors(path: Path, data: bytes, described: dict[str, Any]) -> dict[str, Tensor]:
    try:
        size = int.from_bytes(data[:8], "little")
        strict_json(data[8 : 8 + size], limit=len(data))  # refuses a key given twice, which safetensors does not
        tensors = safetensors.torch.load(data)
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise PosteriorError(f"{path} is not a safetensors file ({error}): restore the folder.") from error
    fault = tensor_fault(described, describe(tensors)) or value_fault(tensors)
    if fault:
        raise PosteriorError(f"{path}: {fault}.")
    return tensors


def _check_fit(
    folder: Path,
    base: nn.Module,
    config: LoraConfig,
    tensors: dict[str, Tensor],
    manifest: dict[str, Any],
    *,
    autocast: bool,
) -> None:
    """That `tensors` are what `config` asks for on `base`, and that `base` is the one they were trained on."""
    advice = f"Load the base model the posterior was trained on (saved from {manifest['base'].get('name')!r})."
    difference = settings_difference(manifest["base"], settings(base))
    if difference:
        raise PosteriorError(f"{folder} belongs to another base model: {difference}. {advice}")
    try:
        model = skeleton(base, config, autocast=autocast)
    except Exception as error:  # whatever PEFT raises when settings and base do not go together
        raise PosteriorError(f"{folder / CONFIG_FILE} does not fit the base model: {_one_line(error)}") from error
    fault = tensor_fault(describe(adapter_tensors(model, "default")), describe(tensors))
    if fault:
        raise PosteriorError(f"{folder / TENSOR_FILE}: {fault}. {advice}")
    found = fingerprint(base, heads=owned_heads(model, "default"))
    difference = weights_difference(manifest["base"], found)
    if difference:
        raise PosteriorError(f"{folder} belongs to another base model: {difference}. {advice}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _fill(model: PeftModel, tensors: dict[str, Tensor]) -> None:
    set_peft_model_state_dict(model, tensors)
    filled = adapter_tensors(model, "default")
    wrong = [key for key, tensor in tensors.items() if not torch.equal(filled[key].cpu(), tensor)]
    if wrong:
        model.unload()
        raise PosteriorError(f"PEFT did not take over tensor {wrong[0]!r}: this version of PEFT is not supported.")
