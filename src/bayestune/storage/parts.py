"""What a posterior has beside one adapter: more members, factors, variances, a temperature; to a folder and back."""

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from bayestune.errors import PosteriorError
from bayestune.sampling.base import Posterior
from bayestune.storage.manifest import CONFIG_FILE, PART_FILE, TENSOR_FILE, member_folder
from bayestune.storage.state import describe, value_fault


def write_parts(posterior: Posterior, folder: Path) -> dict[str, Any]:
    """Write what `folder` lacks once the adapter is in it; the manifest's ``{"settings", "parts"}``.

    Every member of an ensemble after the first is a LoRA folder of its own, ``member_1`` and so on.

    Raises:
        PosteriorError: a tensor holds NaN or infinities, or the temperature is no number above 0.
    """
    if not 0 < posterior.temperature < math.inf:
        raise PosteriorError(f"temperature: found {posterior.temperature}, expected a number above 0.")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in posterior.tensors().items()}
    members = posterior.more_members()
    for found in (tensors, *members):
        fault = value_fault(found)
        if fault:
            raise PosteriorError(f"{fault}: this posterior is not written.")
    if tensors:
        save_file(tensors, folder / PART_FILE)
    for number, member in enumerate(members, start=1):
        path = folder / member_folder(number)
        path.mkdir()
        shutil.copyfile(folder / CONFIG_FILE, path / CONFIG_FILE)
        save_file({key: t.detach().cpu().contiguous() for key, t in member.items()}, path / TENSOR_FILE)
    settings = {**posterior.settings(), "temperature": posterior.temperature}
    return {"settings": settings, "parts": describe(tensors), "members": len(members) + 1}


def assemble(
    kind: type[Posterior],
    model: PeftModel,
    settings: Mapping[str, Any],
    tensors: dict[str, Tensor],
    members: list[dict[str, Tensor]],
) -> Posterior:
    """The posterior of `kind` from what a folder holds, the adapter of `model` included.

    Raises:
        PosteriorError: settings or tensors are not those of this kind.
    """
    own = {name: value for name, value in settings.items() if name != "temperature"}
    temperature = settings.get("temperature", 1.0)
    if isinstance(temperature, bool) or not isinstance(temperature, int | float) or not 0 < temperature < math.inf:
        raise PosteriorError(f"temperature: found {temperature!r}, expected a number above 0.")
    posterior = kind.from_saved(model, own, tensors, members)
    if own != posterior.settings() or tensors.keys() != posterior.tensors().keys():
        raise PosteriorError(f"found settings {own} and tensors {sorted(tensors)}, not those of kind {kind.kind!r}.")
    posterior.temperature = float(temperature)
    return posterior
