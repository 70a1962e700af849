"""A posterior as ordinary LoRA adapters: one folder for the mean and one for each draw.

They need nothing of this library: plain PEFT and the servers that read LoRA folders load them.
"""

import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from bayestune.adapters import RandomLinear
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.files import new_folder
from bayestune.functional import prediction_noise
from bayestune.sampling import Point, Posterior, Variational
from bayestune.sampling.base import SubstitutedDraws
from bayestune.storage.manifest import CONFIG_FILE, TENSOR_FILE, write_manifest
from bayestune.storage.state import (
    active_adapter,
    adapter_config,
    adapter_tensors,
    check_values,
    config_fault,
    lora_layers,
    owned_heads,
    parameter_names,
)


def export_lora(
    model: nn.Module | Posterior,
    path: str | os.PathLike[str],
    *,
    draws: int = 10,
    seed: int = 0,
    overwrite: bool = False,
) -> list[Path]:
    """Write the mean and `draws` draws of a posterior, or of a model's active adapter, as LoRA folders under `path`.

    Draw k is ``A = M + G^2 * noise(seed, k, layer)``, the weights of ``draw(model, index=k, seed=seed)``. The
    rank-stabilized scale alpha/sqrt(r) is folded into B, so that programs that know only alpha/r agree.

    Args:
        model: a PeftModel with one active adapter, or a `Posterior`. Plain LoRA has a mean only (``draws=0``); the
            draws of an ensemble are its members, and it has no mean.
        path: the folder to make.
        draws: number of draws; 0 writes the mean alone.
        seed: seed of the draws.
        overwrite: replace a folder that bayestune wrote before.

    Returns:
        The folders written: ``path/mean``, ``path/draw_0``, ``path/draw_1``, ...

    Raises:
        ConfigError: `path` exists, `draws` is not a count, the adapter has nothing to draw from, or has settings that
            plain LoRA cannot express; or its draws are no weights, as those of a linearised model.
        DrawError: an ensemble has fewer members.
        PosteriorError: the adapter holds NaN, infinities, or a standard deviation of 0.
    """
    posterior = model if isinstance(model, Posterior) else None
    model, adapter, kind = active_adapter(model.model if isinstance(model, Posterior) else model)
    weights = _whole_draws(posterior, adapter, draws, seed)
    _check_exportable(model, adapter, kind, draws, weights)
    mean = [None] if posterior is None or posterior.has_mean else []
    indices: list[int | None] = [*mean, *range(draws)]
    names = ["mean" if index is None else f"draw_{index}" for index in indices]
    config = _plain_config(model, adapter)
    lost = _temperature_note(posterior)
    for note in lost:
        warnings.warn(f"export_lora: {note}", BayestuneWarning, stacklevel=2)
    with new_folder(path, overwrite=overwrite) as folder:
        for name, index in zip(names, indices, strict=True):
            tensors = _plain_tensors(model, adapter, seed, index, weights or {})
            check_values(tensors)
            _write(folder / name, config, tensors, seed, index)
        exported = {"kind": posterior.kind if posterior else kind, "draws": draws, "seed": seed}
        files = [f"{name}/{file}" for name in names for file in (CONFIG_FILE, TENSOR_FILE)]
        write_manifest(folder, {"exported": exported, "notes": [*_notes(model, adapter), *lost]}, files)
    return [Path(path) / name for name in names]


def _check_exportable(
    model: PeftModel, adapter: str, kind: str, draws: int, weights: dict[int, dict[str, Tensor]] | None
) -> None:
    """Refuse what plain LoRA adapters cannot express."""
    if draws and kind == Point.adapter and weights is None:
        raise ConfigError(
            f"draws: found {draws}, but adapter {adapter!r} is plain LoRA, a point without a posterior: pass draws=0."
        )
    fault = config_fault(adapter_config(model, adapter), kind)
    if fault:
        raise ConfigError(f"the adapter cannot be exported as plain LoRA: {fault}.")
    check_values(adapter_tensors(model, adapter))


def _whole_draws(
    posterior: Posterior | None, adapter: str, draws: int, seed: int
) -> dict[int, dict[str, Tensor]] | None:
    """The weights of each draw, by index and key, of a posterior whose draws replace whole adapters; else None."""
    if draws < 0:
        raise ConfigError(f"draws: found {draws}, expected 0 (the mean alone) or more.")
    if posterior is None or isinstance(posterior, Point | Variational) or (draws == 0 and posterior.has_mean):
        return None
    sampler = posterior.sampler(draws=draws, seed=seed)
    if not isinstance(sampler, SubstitutedDraws):
        raise ConfigError(
            f"draws: found {draws} of a {posterior.kind!r} posterior, whose draws are no LoRA weights: pass draws=0."
        )
    keys = {name: key for key, name in parameter_names(posterior.model, adapter).items()}
    return {k: {keys[name]: t for name, t in drawn.items()} for k, drawn in enumerate(sampler.weights)}


def _plain_tensors(
    model: PeftModel, adapter: str, seed: int, index: int | None, weights: dict[int, dict[str, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of the mean (`index` None) or of one draw, by their keys in a LoRA file.

    `weights` are those of each draw, where a draw is a whole set of weights.
    """
    tensors = {key: t for key, t in adapter_tensors(model, adapter).items() if not key.endswith(".rho")}
    if index is not None:
        tensors |= weights.get(index, {})
    rank_stabilised = adapter_config(model, adapter).use_rslora
    for path, layer in lora_layers(model, adapter).items():
        for part, matrices in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            random = matrices[adapter] if adapter in matrices else None
            if index is not None and isinstance(random, RandomLinear):
                noise = prediction_noise(seed, index, random.name, tuple(random.weight.shape))
                tensors[f"base_model.model.{path}.{part}.weight"] = random.drawn(noise).detach()
        for key in (f"base_model.model.{path}.lora_B.weight", f"base_model.model.{path}.lora_embedding_B"):
            if rank_stabilised and key in tensors:
                tensors[key] = tensors[key] * math.sqrt(layer.r[adapter])
    return {key: tensor.cpu().contiguous().clone() for key, tensor in tensors.items()}


def _plain_config(model: PeftModel, adapter: str) -> dict[str, Any]:
    """The adapter_config.json of the plain LoRA adapter."""
    config = adapter_config(model, adapter)
    plain = LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        rank_pattern=config.rank_pattern,
        alpha_pattern=config.alpha_pattern,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
    )
    return plain.to_dict() | {"target_modules": _targets(model, adapter)}


def _targets(model: PeftModel, adapter: str) -> list[str]:
    """Names that match the adapted layers and no other module: their last components where these suffice."""
    layers = lora_layers(model, adapter).keys()
    modules = [name for name, _ in model.get_base_model().named_modules()]
    shared = {name.rpartition(".")[2] for name in modules if name not in layers}
    return sorted({name if name.rpartition(".")[2] in shared else name.rpartition(".")[2] for name in layers})


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], seed: int, index: int | None) -> None:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    source = {"draw": "mean"} if index is None else {"draw": str(index), "seed": str(seed)}
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt", **source})


def _temperature_note(posterior: Posterior | None) -> list[str]:
    if posterior is None or posterior.temperature == 1.0:
        return []
    return [f"the posterior divides its logits by a temperature of {posterior.temperature}, which LoRA cannot hold."]


def _notes(model: PeftModel, adapter: str) -> list[str]:
    config = adapter_config(model, adapter)
    notes = []
    if owned_heads(model, adapter):
        notes.append(
            f"modules_to_save {owned_heads(model, adapter)} are stored as PEFT stores them; programs that serve LoRA "
            "only, such as vLLM, refuse an adapter with such modules."
        )
    if config.rank_pattern or config.alpha_pattern:
        notes.append(
            "rank_pattern or alpha_pattern is set; programs with one rank and alpha for all layers misread it."
        )
    return notes
