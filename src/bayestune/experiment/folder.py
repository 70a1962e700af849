"""The folder of a run: whether it may be written to, and what becomes of a run that is in it already."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bayestune.errors import ConfigError
from bayestune.experiment.record import read_json, write_json
from bayestune.experiment.settings import Experiment

POSTERIOR, CHECKPOINTS, RESULT, EXPERIMENT = "posterior", "checkpoints", "result.json", "experiment.json"
ADAPTER = "adapter"
"""The plain LoRA adapter that a run trained as the start of "laplace", "tfb" or "swag"."""

_OWN = (POSTERIOR, CHECKPOINTS, ADAPTER, RESULT, EXPERIMENT)
_BEFORE = ".before"
_WORTH_KEEPING = (POSTERIOR, ADAPTER)


def check_output(output: Path, experiment: Experiment, *, overwrite: bool, resume: bool) -> None:
    """Refuse to touch a folder that is not ours to touch.

    Raises:
        ConfigError: naming the folder, what is in it, and what to do.
    """
    adapter = None if experiment.adapter is None else Path(experiment.adapter).resolve()
    if adapter is not None and output.resolve() in (adapter, *adapter.parents):
        raise ConfigError(f"output {output}: found the adapter to start from in it; choose another folder.")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output}: found a file, expected a folder or nothing.")
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if resume:
        _check_resumed(output, experiment)
    elif found and not overwrite:
        raise ConfigError(f"output {output}: the folder is not empty; choose another, or pass --overwrite.")
    elif found and not _is_run(output):
        raise ConfigError(f"output {output}: found files but no run's {EXPERIMENT}; nothing is overwritten.")


def _check_resumed(output: Path, experiment: Experiment) -> None:
    if (output / RESULT).exists():
        raise ConfigError(f"output {output}: this run is finished, there is nothing to resume.")
    saved = read_json(output / EXPERIMENT, "the settings of the run to resume")
    sizes = () if experiment.adapter is None else ("rank", "lora_alpha", "target_modules")  # those of the adapter
    for name, value in experiment.as_dict().items():
        if name not in sizes and saved.get(name) != value:
            raise ConfigError(
                f"output {output}: cannot resume with {name}={value!r}, the run has {saved.get(name)!r}; use its "
                "settings, or another --output."
            )


def _is_run(output: Path) -> bool:
    """Whether this library made the folder: its settings have the fields that every run has."""
    if (output / _BEFORE).is_dir():
        return True
    if not (output / EXPERIMENT).is_file():
        return False
    return {"model", "task", "method"} <= read_json(output / EXPERIMENT, "the settings of a run").keys()


@contextmanager
def run_folder(output: Path, experiment: Experiment, *, resume: bool) -> Iterator[None]:
    """Inside, `output` is the folder of this run, with its settings in it.

    A run that was there is set aside. It is removed when the new one is finished, and is back if that one ends by any
    exception before it has a checkpoint or an adapter to show.
    """
    output.mkdir(parents=True, exist_ok=True)
    before = output / _BEFORE
    if not resume:
        if before.is_dir():  # an overwriting run was killed: what it left is not what was there before
            _remove(output)
        else:
            _move(output, before)
        write_json(output / EXPERIMENT, experiment.as_dict())
    try:
        yield
    except BaseException:
        if before.is_dir() and not _has_something(output):
            _remove(output)
            _move(before, output)
            before.rmdir()
        raise
    if before.is_dir():
        shutil.rmtree(before)


def _move(source: Path, target: Path) -> None:
    for name in _OWN:
        if (source / name).exists():
            target.mkdir(exist_ok=True)
            os.replace(source / name, target / name)


def _remove(output: Path) -> None:
    for name in _OWN:
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        else:
            (output / name).unlink(missing_ok=True)


def _has_something(output: Path) -> bool:
    checkpoints = output / CHECKPOINTS
    return any((output / name).is_dir() for name in _WORTH_KEEPING) or (
        checkpoints.is_dir() and any(checkpoints.iterdir())
    )
