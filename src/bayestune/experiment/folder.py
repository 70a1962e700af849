"""The folder of a run: check that it may be written, lock it, and replace a run that is already there.

`--overwrite` moves the old run to `.NAME.before`, beside its folder, until the new run is finished. Each move is one
rename, so a crash leaves the old run complete in one of the two places. The lock of a running experiment is
`.NAME.lock` beside the folder, or a file inside the folder if its parent is not writable.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from bayestune.errors import ConfigError
from bayestune.experiment.settings import BEFORE_PROMPTS, REPORTING, Experiment
from bayestune.files import MANIFEST, alone, check_writable, read_json, remove, write_json

POSTERIOR, CHECKPOINTS, RESULT, EXPERIMENT = "posterior", "checkpoints", "result.json", "experiment.json"
TRAINED = "trained.json"
"""The part of result.json about the training, kept in this file until result.json is written."""
ADAPTER = "adapter"
"""The plain LoRA adapter that a run trained as the start of "laplace", "tfb" or "swag"."""

SHOTS = "shots.jsonl"
"""The rows that the prompt shows with their answers."""

_OWN = (POSTERIOR, CHECKPOINTS, ADAPTER, RESULT, EXPERIMENT, TRAINED, SHOTS)
_INSIDE = "run"
"""The lock is called `.run.lock` when it is inside the folder."""


def earlier_run(output: Path) -> Path:
    """Return the folder in which the old run of `output` is kept while it is being replaced."""
    output = output.resolve()
    return output.with_name(f".{output.name}.before")


def is_trained(output: Path) -> bool:
    """Return whether the run has a complete posterior but is not finished: temperature or scores may be missing."""
    return (output / POSTERIOR / MANIFEST).is_file() and (output / TRAINED).is_file()


def check_output(output: Path, experiment: Experiment, *, overwrite: bool, resume: bool) -> None:
    """Check that a run may use `output`; finish or undo an interrupted replacement.

    Raises:
        ConfigError: the folder holds something else, or another process is writing a run there.
    """
    if overwrite and resume:
        raise ConfigError("found overwrite and resume, expected one of them: replace the run, or continue it.")
    try:
        str(output.absolute()).encode()
    except UnicodeEncodeError:
        found = f"output {str(output.absolute())!r}: found a path that is not UTF-8"
        raise ConfigError(f"{found}, which safetensors cannot read; choose another folder.") from None
    adapter = None if experiment.adapter is None else Path(experiment.adapter).resolve()
    if adapter is not None and output.resolve() in (adapter, *adapter.parents):
        raise ConfigError(f"output {output}: found the adapter to start from in it; choose another folder.")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output}: found a file, expected a folder or nothing.")
    check_writable(output, f"output {output}")
    if output.resolve().parent.is_dir():
        with _alone(output.resolve()):
            _recover(output.resolve(), overwrite=False)  # an unfinished run is kept until the new one starts
            _check_content(output, experiment, overwrite=overwrite, resume=resume)


def _alone(output: Path) -> AbstractContextManager[None]:
    """Lock the run in `output`. The lock is inside the folder if its parent is not writable (a mounted folder)."""
    return alone(output if os.access(output.parent, os.W_OK | os.X_OK) else output / _INSIDE)


def _check_content(output: Path, experiment: Experiment, *, overwrite: bool, resume: bool) -> None:
    """The part of `check_output` that needs the lock."""
    found = _names(output)
    if resume:
        _check_resumed(output, experiment)
    elif found and not overwrite:
        begun = EXPERIMENT in found and RESULT not in found
        hint = " It holds an unfinished run: --resume continues it." if begun else ""
        raise ConfigError(f"output {output}: the folder is not empty; choose another, or pass --overwrite.{hint}")
    elif found and not _is_run(output):
        raise ConfigError(f"output {output}: found files but no {EXPERIMENT} of a run; nothing is overwritten.")


def _check_resumed(output: Path, experiment: Experiment) -> None:
    if (output / RESULT).exists():
        raise ConfigError(f"output {output}: this run is finished, there is nothing to resume.")
    recorded = read_json(output / EXPERIMENT, "the settings of the run to resume")
    saved = Experiment.from_dict(recorded, where=str(output / EXPERIMENT)).as_dict()
    free = ("activation_checkpointing", *REPORTING)
    if experiment.adapter is not None:
        free += ("rank", "lora_alpha", "target_modules")  # those of the adapter
    for name, value in experiment.as_dict().items():
        older = name not in recorded and BEFORE_PROMPTS.get(name) == value
        if name not in free and saved.get(name) != value and not older:
            raise ConfigError(
                f"output {output}: cannot resume with {name}={value!r}, the run has {saved.get(name)!r}; use its "
                "settings, or another --output."
            )


def _is_run(folder: Path) -> bool:
    """Return whether the folder holds an experiment.json with the fields that every run has."""
    if not (folder / EXPERIMENT).is_file():
        return False
    return {"model", "task", "method"} <= read_json(folder / EXPERIMENT, "the settings of a run").keys()


def _recover(output: Path, *, overwrite: bool) -> None:
    """Finish or undo an interrupted replacement."""
    before = earlier_run(output)
    if not before.is_dir():
        return
    if not _is_run(before):
        raise ConfigError(f"{before}: found files that are not a run, expected nothing or an old run; move it away.")
    if not output.exists():
        os.rename(before, output)
    elif (output / RESULT).is_file():
        _drop(before, output)
    elif overwrite or not (output / EXPERIMENT).is_file():
        _put_back(before, output)


@contextmanager
def run_folder(output: Path, experiment: Experiment, *, overwrite: bool, resume: bool) -> Iterator[None]:
    """Lock `output` and write the settings of this run to it.

    The old run is moved aside. It is removed when the new run is finished, and restored if the new run fails before
    it has a checkpoint, an adapter or a posterior. Files that are not part of a run are kept.

    Raises:
        ConfigError: another process is writing a run there, or has written one since `check_output`.
    """
    output = output.resolve()
    output.parent.mkdir(parents=True, exist_ok=True)
    with _alone(output):
        _recover(output, overwrite=overwrite)
        _check_content(output, experiment, overwrite=overwrite, resume=resume)
        with _in_place(output, experiment, resume=resume):
            yield


@contextmanager
def _in_place(output: Path, experiment: Experiment, *, resume: bool) -> Iterator[None]:
    """Do what `run_folder` does after its checks."""
    before = earlier_run(output)
    if not resume and _names(output):
        os.rename(output, before)
    try:
        output.mkdir(exist_ok=True)
        write_json(output / EXPERIMENT, experiment.as_dict())
        yield
    except BaseException:
        if before.is_dir() and not _has_something(output):
            _put_back(before, output)
        raise
    if before.is_dir():
        _drop(before, output)


def _names(output: Path) -> set[str]:
    """Return the names of the files in the folder, without the lock."""
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    return found - {f".{_INSIDE}.lock"}


def _has_something(output: Path) -> bool:
    """Return whether an unfinished run left a posterior, an adapter or a checkpoint file."""
    if any((output / name).is_dir() for name in (POSTERIOR, ADAPTER)):
        return True
    checkpoints = output / CHECKPOINTS
    found = (path.relative_to(checkpoints) for path in checkpoints.rglob("*") if path.is_file())
    return any("runs" not in path.parts for path in found)  # TensorBoard's logs lie in "runs"


def _put_back(before: Path, output: Path) -> None:
    """Replace the new run, which has nothing worth keeping, with the earlier one."""
    if output.exists():
        _drop(output, before)
    os.rename(before, output)


def _drop(run: Path, kept: Path) -> None:
    """Remove a run; move the files in its folder that are not part of a run to the folder of the other run."""
    for path in list(run.iterdir()):
        if path.name not in _OWN and not (kept / path.name).exists():
            os.rename(path, kept / path.name)
    remove(run)
