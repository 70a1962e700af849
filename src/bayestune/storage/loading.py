"""Load a posterior from a folder, and check every byte before the base model is changed."""

import copy
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn

from bayestune.errors import ConfigError, PosteriorError, one_line
from bayestune.files import existing_folder, strict_json
from bayestune.sampling.base import Posterior
from bayestune.sampling.posteriors import Point, Variational
from bayestune.storage import state
from bayestune.storage.fingerprint import fingerprint, settings, settings_difference, weights_difference
from bayestune.storage.manifest import (
    CONFIG_FILE,
    CONFIG_LIMIT,
    KNOWN,
    PART_FILE,
    STD,
    TENSOR_FILE,
    member_folder,
    read_files,
    read_manifest,
)


def load_posterior(base_model: nn.Module, path: str | os.PathLike[str], *, trainable: bool = False) -> PeftModel:
    """Load the adapter that `save_posterior` wrote onto `base_model`, or raise an error and leave it unchanged.

    These are checked first: the manifest and its checksum; the size and sha256 of each file; that there are no other
    files or links; every setting; that keys, shapes and dtypes are those that the base and the settings ask for; that
    values are finite; and that `base_model` is the base that the posterior was trained on (by settings and a sample of
    every weight; the same checkpoint in another dtype is the same base). Only JSON and safetensors are read, and
    nothing in the folder can cause an import or a download.

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
    saved = _read(base_model, path)
    own, kind = saved.manifest["settings"], saved.manifest["posterior"]
    alone = {posterior.kind: posterior for posterior in (Point, Variational)}
    if kind not in alone or own.get("temperature", 1.0) != 1.0:
        found = f"a posterior of kind {kind!r}" + (f" with settings {own}" if own else "")
        raise PosteriorError(
            f"{saved.folder}: found {found}, expected an adapter alone: without the rest, its answers would differ. "
            "Load it with bayestune.methods.load."
        )
    saved.check_adapter(alone[kind])
    return saved.onto(base_model, trainable=trainable)


def load(base_model: nn.Module, path: str | os.PathLike[str], *, kinds: Mapping[str, type[Posterior]]) -> Posterior:
    """Load a posterior of one of `kinds` that `save_posterior` wrote, frozen and in evaluation mode.

    All files of the folder are checked as in `load_posterior`.

    Raises:
        ConfigError, PosteriorError: as `load_posterior`.
    """
    saved = _read(base_model, path)
    name = saved.manifest["posterior"]
    if name not in kinds:
        raise PosteriorError(f"{saved.folder}: found a posterior of kind {name!r}, expected one of {sorted(kinds)}.")
    saved.check_adapter(kinds[name])
    tensors = saved.tensors(PART_FILE, "parts") if PART_FILE in saved.contents else {}
    members = []
    for number in range(1, 1 + sum(file.endswith(f"/{TENSOR_FILE}") for file in saved.contents)):
        member = member_folder(number)
        if saved.contents[f"{member}/{CONFIG_FILE}"] != saved.contents[CONFIG_FILE]:
            raise PosteriorError(
                f"{saved.folder / member / CONFIG_FILE}: found other settings than those of member 0."
            )
        members.append(saved.tensors(f"{member}/{TENSOR_FILE}", "tensors"))
    model = saved.onto(base_model, trainable=False)
    try:
        return _assemble(kinds[name], model, saved.manifest["settings"], tensors, members)
    except PosteriorError as error:
        model.unload()
        raise PosteriorError(f"{saved.folder}: {error}") from error


def _read(base_model: nn.Module, path: str | os.PathLike[str]) -> "_Saved":
    """Read the manifest and files of a folder that is to be loaded onto `base_model`."""
    folder = existing_folder(path)
    if isinstance(base_model, PeftModel) or any(isinstance(m, BaseTunerLayer) for m in base_model.modules()):
        raise ConfigError("the base model already carries an adapter: load it anew, or call unload() first.")
    try:
        manifest = read_manifest(folder)
        return _Saved(folder, manifest, read_files(folder, manifest["files"]))
    except OSError as error:  # the folder changed while it was read
        raise PosteriorError(f"{folder} cannot be read ({error}): if it is being replaced, load it again.") from error


@dataclass(frozen=True)
class _Saved:
    """A saved folder whose files match its manifest."""

    folder: Path
    manifest: dict[str, Any]
    contents: dict[str, bytes]

    def check_adapter(self, posterior: type[Posterior]) -> None:
        """Raise an error unless the folder holds the kind of adapter that this kind of posterior uses."""
        expected = None if posterior.adapter == Point.adapter else STD
        if self.manifest["std"] != expected:
            raise PosteriorError(
                f"{self.folder}: found the parameterization std = {self.manifest['std']}, expected std = {expected} "
                f"for a posterior of kind {posterior.kind!r}."
            )

    def onto(self, base: nn.Module, *, trainable: bool) -> PeftModel:
        """Return `base` with the adapter, or raise an error and leave it unchanged."""
        offloaded = next((name for name, parameter in base.named_parameters() if parameter.is_meta), None)
        if offloaded is not None:
            raise ConfigError(
                f"the base model: found {offloaded} without memory, as offloading leaves it (device_map), expected "
                "every layer on a device, since an adapter stays with its layer: load it without 'disk' in its map."
            )
        config = self.config()
        config.inference_mode = not trainable
        tensors = self.tensors(TENSOR_FILE, "tensors")
        half = any(".lora_" in key and t.dtype in (torch.float16, torch.bfloat16) for key, t in tensors.items())
        self._check_fit(base, config, tensors, autocast=not half)
        model = state.adapted(base, config, autocast=not half)
        set_peft_model_state_dict(model, tensors)
        filled = state.adapter_tensors(model, "default")
        wrong = [key for key, tensor in tensors.items() if not torch.equal(filled[key].cpu(), tensor)]
        if wrong:
            model.unload()
            raise PosteriorError(f"PEFT did not load tensor {wrong[0]!r}: this version of PEFT is not supported.")
        return model if trainable else model.eval()

    def config(self) -> LoraConfig:
        kind = "point" if self.manifest["std"] is None else "variational"
        try:
            values = strict_json(self.contents[CONFIG_FILE], limit=CONFIG_LIMIT)
            fault = state.settings_fault(values, kind)
            if fault:
                raise ValueError(fault)
            # The base is the given one: the origin that the file names is ignored.
            unused = {"auto_mapping": None, "base_model_name_or_path": None, "revision": None}
            return state.ADAPTERS[kind](**{**values, **unused})
        except (ValueError, TypeError) as error:
            raise PosteriorError(f"{self.folder / CONFIG_FILE}: {one_line(error)}") from error

    def tensors(self, name: str, entry: str) -> dict[str, Tensor]:
        """Return the tensors in the file `name`, checked against the manifest's `entry`."""
        path, data = self.folder / name, self.contents[name]
        try:
            size = int.from_bytes(data[:8], "little")
            strict_json(data[8 : 8 + size], limit=len(data))  # refuses duplicate keys, which safetensors does not
            tensors = safetensors.torch.load(data)
        except (ValueError, KeyError, TypeError, SafetensorError) as error:
            raise PosteriorError(f"{path} is not a safetensors file ({error}): restore the folder.") from error
        fault = state.tensor_fault(self.manifest[entry], state.describe(tensors)) or state.value_fault(tensors)
        if fault:
            raise PosteriorError(f"{path}: {fault}.")
        return tensors

    def _check_fit(self, base: nn.Module, config: LoraConfig, tensors: dict[str, Tensor], *, autocast: bool) -> None:
        """Raise an error unless `tensors` fit `config` and `base`, and `base` is the one that they were trained on."""
        expected = self.manifest["base"]
        advice = f"Load the base model the posterior was trained on (saved from {expected.get('name')!r})."
        difference = settings_difference(expected, settings(base))
        if difference:
            raise PosteriorError(f"{self.folder} belongs to another base model: {difference}. {advice}")
        try:
            model = skeleton(base, config, autocast=autocast)
        except Exception as error:  # whatever PEFT raises when settings and base do not go together
            raise PosteriorError(
                f"{self.folder / CONFIG_FILE} does not fit the base model: {one_line(error)}"
            ) from error
        fault = state.tensor_fault(state.describe(state.adapter_tensors(model, "default")), state.describe(tensors))
        if fault:
            raise PosteriorError(f"{self.folder / TENSOR_FILE}: {fault}. {advice}")
        difference = weights_difference(expected, fingerprint(base, heads=state.owned_heads(model, "default")))
        if difference:
            raise PosteriorError(f"{self.folder} belongs to another base model: {difference}. {advice}")


def _assemble(
    kind: type[Posterior],
    model: PeftModel,
    settings: Mapping[str, Any],
    tensors: dict[str, Tensor],
    members: list[dict[str, Tensor]],
) -> Posterior:
    own = {name: value for name, value in settings.items() if name != "temperature"}
    temperature = settings.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise PosteriorError(f"temperature: found {temperature!r}, expected a number above 0.")
    known = tensors.pop(KNOWN, None)
    posterior = kind.from_saved(model, own, tensors, members)
    if own != posterior.settings() or tensors.keys() != posterior.tensors().keys():
        raise PosteriorError(f"found settings {own} and tensors {sorted(tensors)}, not those of kind {kind.kind!r}.")
    posterior.temperature, posterior.known = float(temperature), known
    return posterior


def skeleton(base: nn.Module, config: LoraConfig, *, autocast: bool) -> PeftModel:
    """Return a copy of `base` without its weights, with the adapter that `config` describes; `base` is unchanged."""
    memo: dict[int, Any] = {}
    for tensor in (*base.parameters(), *base.buffers()):
        memo[id(tensor)] = tensor  # if packed by a quantizer: shared
        if type(tensor) is nn.Parameter:
            memo[id(tensor)] = nn.Parameter(torch.empty_like(tensor, device="meta"), tensor.requires_grad)
        elif type(tensor) is Tensor:
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT will repeat the warnings for the base itself
        return state.adapted(copy.deepcopy(base, memo), copy.deepcopy(config), autocast=autocast)
