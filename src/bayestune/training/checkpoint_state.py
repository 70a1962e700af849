"""Save and load the contents of a checkpoint as safetensors and JSON: adapter, optimizer and random states.

JSON keeps floats exactly, so a resumed run repeats the uninterrupted one bit for bit.
"""

import json
import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from bayestune.errors import BayestuneWarning, ConfigError, PosteriorError, TrainingError
from bayestune.training.checkpoint_files import ADAPTER, FORMAT, OPTIMIZER, TRAINING
from bayestune.training.sharding import sharded_like, whole

_SPLIT = ("processes", "gradient_accumulation_steps")
"""Settings that may change together when a run is resumed, if each update keeps its rows."""


def whole_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the state dict of `optimizer`; if its tensors are sharded, every process must call this."""
    state = optimizer.state_dict()
    gathered = {
        number: {name: whole(value) if isinstance(value, Tensor) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": gathered}


def save_optimizer(folder: Path, state: dict[str, Any], scheduler: LRScheduler, settings: dict[str, Any]) -> None:
    """Write the `whole_state` of an optimizer, the state of `scheduler`, and the `settings` that the run depends on.

    Raises:
        ConfigError: a state holds something other than tensors and plain JSON values.
    """
    tensors: dict[str, Tensor] = {}
    others: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.contiguous()
            else:
                others.setdefault(str(number), {})[name] = value
    save_file(tensors, folder / OPTIMIZER)
    training = {
        "format": FORMAT,
        "settings": settings,
        "optimizer": {"param_groups": state["param_groups"], "state": others},
        "scheduler": scheduler.state_dict(),
    }
    try:
        text = json.dumps(training)
    except TypeError as error:
        raise ConfigError(
            f"{TRAINING} cannot hold the state of this optimizer or learning-rate scheduler ({error}): "
            "use adamw_torch and a scheduler with plain numbers."
        ) from error
    (folder / TRAINING).write_text(text, encoding="utf-8")


def load_optimizer(folder: Path, optimizer: Optimizer, scheduler: LRScheduler, settings: dict[str, Any]) -> None:
    """Read what `save_optimizer` wrote.

    Raises:
        TrainingError: a file is missing, or was written with different `settings`.
    """
    saved = json.loads(_existing(folder / TRAINING).read_bytes())
    _check_settings(folder, saved["settings"], settings)
    state: dict[int, dict[str, Any]] = {int(key): value for key, value in saved["optimizer"]["state"].items()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in load_file(_existing(folder / OPTIMIZER)).items():
        number, name = key.split(".", 1)
        parameter = parameters[int(number)]
        each = tensor.shape == parameter.shape  # one value for each weight
        state.setdefault(int(number), {})[name] = sharded_like(tensor, parameter) if each else tensor
    optimizer.load_state_dict({"state": state, "param_groups": saved["optimizer"]["param_groups"]})
    scheduler.load_state_dict(saved["scheduler"])


def _check_settings(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise an error if a run with the settings `now` could not continue the one with the settings `before`."""
    updates = [math.prod(settings.get(name, 0) for name in (*_SPLIT, "batch_size")) for settings in (before, now)]
    # If the rows do not divide evenly, several processes pad the last update of an epoch with its first rows.
    moved = updates[0] == updates[1] > 0 and now.get("rows", 1) % updates[0] == 0
    for name, value in now.items():
        if before.get(name) == value or (moved and name in _SPLIT):
            continue
        again = "Start as many processes as before" if name == "processes" else "Use the same setting"
        raise TrainingError(
            f"{folder} was written with {name}={before.get(name)!r}, this run has {value!r}: "
            f"it could not continue the same run. {again}, or start anew from its adapter."
        )
    if before["processes"] != now["processes"]:
        warnings.warn(
            f"{folder} was written with processes={before['processes']}, this run has {now['processes']}: the rows of "
            "each update stay the same, but dropout masks and BLoB's noise do not.",
            BayestuneWarning,
            stacklevel=2,
        )


def load_adapter(model: PeftModel, adapter: str, folder: Path) -> None:
    """Load the weights in `folder` into `adapter` of `model`: exactly its tensors and shapes, or none of them.

    Raises:
        TrainingError: the folder has no `adapter_model.safetensors`.
        PosteriorError: a tensor is missing, unexpected, or has another shape.
    """
    loaded = load_file(_existing(folder / ADAPTER))
    expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for name in sorted(loaded.keys() | expected.keys()):
        found = tuple(loaded[name].shape) if name in loaded else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise PosteriorError(f"{folder / ADAPTER}, tensor {name}: found {found}, expected {wanted}.")
    set_peft_model_state_dict(model, loaded, adapter_name=adapter)


def save_random_state(stem: Path, device: torch.device) -> None:
    """Write the states of Python's, numpy's and torch's global generators to `stem`.safetensors and `stem`.json."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    save_file(tensors, stem.with_suffix(".safetensors"))
    rest = {"numpy": [name, int(position), int(has_gauss), float(cached)], "python": random.getstate()}
    stem.with_suffix(".json").write_text(json.dumps(rest), encoding="utf-8")


def load_random_state(stem: Path, device: torch.device) -> None:
    """Restore the states that `save_random_state` wrote.

    Raises:
        TrainingError: a file is missing.
    """
    tensors = load_file(_existing(stem.with_suffix(".safetensors")))
    rest = json.loads(_existing(stem.with_suffix(".json")).read_bytes())
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    name, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise TrainingError(
            f"{path.parent} cannot be resumed: found no {path.name}. Expected a complete checkpoint of this trainer; "
            "pickled files are not read. Choose another checkpoint."
        )
    return path
