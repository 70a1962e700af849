"""Export a posterior as ordinary LoRA adapters: one folder, or one GGUF file, for the mean and for each draw.

Plain PEFT, servers that read LoRA folders, and llama.cpp load them without this library.
"""

import json
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn

from bayestune.adapters import random_layers, tied_head
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.files import new_folder
from bayestune.functional import prediction_noise
from bayestune.sampling import Point, Posterior, Variational
from bayestune.sampling.base import SubstitutedDraws
from bayestune.serving.gguf import gguf_layers, write_gguf
from bayestune.storage import state
from bayestune.storage.manifest import CONFIG_FILE, TENSOR_FILE, write_manifest
from bayestune.storage.saving import as_posterior


def export_lora(
    model: nn.Module | Posterior,
    path: str | os.PathLike[str],
    *,
    draws: int = 10,
    seed: int = 0,
    overwrite: bool = False,
    format: str = "peft",
) -> list[Path]:
    """Write the mean and `draws` draws of a posterior, or of a model's active adapter, as LoRA adapters under `path`.

    Draw k is ``A = M + G^2 * noise(seed, k, layer)``, the weights of ``draw(model, index=k, seed=seed)``. Every layer
    is written with the largest rank (zero padded), ``lora_alpha = r``, and its scale folded into B, so that programs
    that ignore ``rank_pattern``, ``alpha_pattern`` or ``use_rslora`` compute the same function.

    Args:
        model: a PeftModel with one active adapter, or a `Posterior`. Plain LoRA has a mean only (``draws=0``); the
            draws of an ensemble are its members, and it has no mean.
        path: the folder to make.
        draws: number of draws; 0 writes the mean alone.
        seed: seed of the draws.
        overwrite: replace a folder that bayestune wrote before.
        format: "peft" for PEFT folders, or "gguf" for llama.cpp's files in float32 (needs the package gguf).

    Returns:
        The paths: ``path/mean``, ``path/draw_0``, ``path/draw_1``, ..., with the suffix .gguf for that format.

    Raises:
        ConfigError: `path` exists, `draws` is negative, the adapter has nothing to draw from or has settings that
            plain LoRA or the format cannot express, or its draws are not weights, as for a linearized model.
        DrawError: an ensemble has fewer members than `draws`.
        PosteriorError: the adapter holds NaN, infinities, or a standard deviation of 0.
    """
    posterior = as_posterior(model)
    lost = [] if posterior.temperature == 1.0 else [_temperature_lost(posterior.temperature)]
    return export_draws(posterior, path, draws=draws, seed=seed, overwrite=overwrite, format=format, limits=lost)


def export_draws(
    posterior: Posterior,
    path: str | os.PathLike[str],
    *,
    draws: int,
    seed: int,
    overwrite: bool = False,
    format: str,
    limits: list[str],
) -> list[Path]:
    """Like `export_lora`; also warn of `limits`, which the adapters cannot express, and note them in the manifest."""
    model, adapter, kind = state.active_adapter(posterior.model)
    _check_exportable(posterior, adapter, kind, draws)
    suffix, write = _writer(model, adapter, format)
    substituted = _substituted(posterior, adapter, draws, seed)
    notes = _notes(posterior, adapter, limits)
    names: dict[str, int | None] = {"mean": None} if posterior.has_mean else {}
    names |= {f"draw_{index}": index for index in range(draws)}
    with new_folder(path, overwrite=overwrite, kind="exported") as folder:
        for name, index in names.items():
            tensors = _tensors(model, adapter, seed, index, substituted)
            source = {"draw": "mean"} if index is None else {"draw": str(index), "seed": str(seed)}
            rank = _fold(model, adapter, tensors)
            write(folder / f"{name}{suffix}", tensors, rank=rank, source=source)
        content = {"exported": {"kind": posterior.kind, "draws": draws, "seed": seed}, "notes": notes}
        write_manifest(folder, content, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])
    return [Path(path) / f"{name}{suffix}" for name in names]


def _writer(model: PeftModel, adapter: str, format: str) -> tuple[str, Callable[..., None]]:
    """Return the suffix of an adapter's file or folder in this format, and the function that writes it."""
    if format == "peft":
        return "", partial(_write_folder, model, adapter)
    if format == "gguf":
        return ".gguf", partial(write_gguf, *gguf_layers(model, adapter))
    raise ConfigError(f"format: found {format!r}, expected 'peft' or 'gguf'.")


def _check_exportable(posterior: Posterior, adapter: str, kind: str, draws: int) -> None:
    if draws < 0:
        raise ConfigError(f"draws: found {draws}, expected 0 (the mean alone) or more.")
    if draws and isinstance(posterior, Point):
        raise ConfigError(
            f"draws: found {draws}, but adapter {adapter!r} is plain LoRA, a point without a posterior: pass draws=0."
        )
    fault = state.config_fault(state.adapter_config(posterior.model, adapter), kind)
    if fault:
        raise ConfigError(f"the adapter cannot be exported as plain LoRA: {fault}.")
    state.check_values(state.adapter_tensors(posterior.model, adapter))


def _substituted(posterior: Posterior, adapter: str, draws: int, seed: int) -> list[dict[str, Tensor]]:
    """Return the tensors of each draw, by key, if the posterior's draws replace whole adapters; otherwise none."""
    if isinstance(posterior, Point | Variational) or (draws == 0 and posterior.has_mean):
        return []
    sampler = posterior.sampler(draws=draws, seed=seed)
    if not isinstance(sampler, SubstitutedDraws):
        raise ConfigError(
            f"draws: found {draws} of a {posterior.kind!r} posterior, whose draws are not LoRA weights: pass draws=0."
        )
    keys = {name: key for key, name in state.parameter_names(posterior.model, adapter).items()}
    return [{keys[name]: tensor for name, tensor in drawn.items()} for drawn in sampler.weights]


def _tensors(
    model: PeftModel, adapter: str, seed: int, index: int | None, substituted: list[dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the tensors of the mean, or of draw `index`, by key."""
    tensors = {key: t for key, t in state.adapter_tensors(model, adapter).items() if not key.endswith(".rho")}
    if index is None:
        return tensors
    return tensors | (substituted[index] if substituted else _drawn(model, seed, index))


def _drawn(model: PeftModel, seed: int, index: int) -> dict[str, Tensor]:
    """Return the random matrices of draw `index`, by key."""
    tensors = {}
    for name, layer in random_layers(model).items():
        key = name if name.endswith(".lora_B") else f"{name}.lora_A"
        noise = prediction_noise(seed, index, name, tuple(layer.weight.shape))
        tensors[f"base_model.model.{key}.weight"] = layer.drawn(noise).detach()
    return tensors


def _fold(model: PeftModel, adapter: str, tensors: dict[str, Tensor]) -> int:
    """Zero-pad every layer in `tensors` to the largest rank and fold its scale into B; return that rank."""
    state.check_values(tensors)
    layers = state.lora_layers(model, adapter)
    rank = max(layer.r[adapter] for layer in layers.values())
    for path, layer in layers.items():
        a, b = sorted(key for key in tensors if key.startswith(f"base_model.model.{path}.lora_"))
        missing = rank - layer.r[adapter]
        tensors[a] = torch.cat([tensors[a], tensors[a].new_zeros(missing, *tensors[a].shape[1:])])
        scaled = tensors[b] * layer.scaling[adapter]
        tensors[b] = torch.cat([scaled, scaled.new_zeros(len(scaled), missing, *scaled.shape[2:])], dim=1)
    return rank


def _write_folder(
    model: PeftModel, adapter: str, folder: Path, tensors: dict[str, Tensor], *, rank: int, source: dict[str, str]
) -> None:
    """Write one adapter as PEFT does."""
    config = state.adapter_config(model, adapter)
    plain = LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
        r=rank,
        lora_alpha=rank,
        lora_dropout=config.lora_dropout,
        fan_in_fan_out=config.fan_in_fan_out,
        modules_to_save=config.modules_to_save,
    )
    values = plain.to_dict() | {"target_modules": _targets(model, adapter)}
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
    save_file(tensors, folder / TENSOR_FILE, metadata={"format": "pt", **source})


def _targets(model: PeftModel, adapter: str) -> list[str]:
    """Return names that match only the adapted layers: their last components if these suffice."""
    layers = state.lora_layers(model, adapter).keys()
    modules = [name for name, _ in model.get_base_model().named_modules()]
    shared = {name.rpartition(".")[2] for name in modules if name not in layers}
    return sorted({name if name.rpartition(".")[2] in shared else name.rpartition(".")[2] for name in layers})


def _temperature_lost(temperature: float) -> str:
    return f"the posterior divides its logits by a temperature of {temperature}, which LoRA cannot hold."


def _notes(posterior: Posterior, adapter: str, limits: list[str]) -> list[str]:
    """Warn of what the exported adapters cannot express, and return it with what a server may refuse."""
    limits, heads = list(limits), state.owned_heads(posterior.model, adapter)
    tied = tied_head(posterior.model)
    if tied in state.lora_layers(posterior.model, adapter):
        limits.append(
            f"{tied} is adapted and its weight is tied to another layer's, such as the embeddings: use the adapters "
            "unmerged, since merging one changes both layers."
        )
    for limit in limits:
        warnings.warn(f"export_lora: {limit}", BayestuneWarning, stacklevel=4)
    refused = (
        f"modules_to_save {heads} are stored as PEFT stores them; some servers refuse adapters with such modules."
    )
    return [refused, *limits] if heads else limits
