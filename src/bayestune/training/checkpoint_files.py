"""The folder of a checkpoint: it appears whole or not at all, and every byte of it is vouched for.

It is written in the folder `.unfinished` beside the others. When every process has written its files, the main one
adds `checkpoint.json` with the size and sha256 of each, flushes them all to disk and renames the folder; only then are
the oldest removed. What a crash leaves in `.unfinished` is finished by the next save if it is whole, else removed.
The sums find damage, not malice: who can write a file can write its sum.
"""

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bayestune.errors import BayestuneWarning, TrainingError
from bayestune.files import alone, file_record, flush, read_sealed, sealed
from bayestune.files import publish as rename_whole
from bayestune.tasks.rows import shown

FORMAT = 1
MANIFEST = "checkpoint.json"
UNFINISHED = ".unfinished"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINING = "training.json"
STATE = "trainer_state.json"
_LIMIT = 1 << 24


def last_complete(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that is whole. Newer ones that are not are named in a `BayestuneWarning`."""
    work = folder / UNFINISHED
    waiting = [] if work.is_symlink() else _checkpoints(work)  # whole, if a save was killed at its very end
    faults, whole = [], None
    for checkpoint in sorted([*_checkpoints(folder), *waiting], key=_step, reverse=True):
        try:
            check_checkpoint(checkpoint)
        except TrainingError as error:
            if checkpoint not in waiting:
                faults.append(str(error))
        else:
            whole = checkpoint
            break
    instead = "there is no older one that is whole" if whole is None else f"{whole.name} is taken instead"
    for fault in faults:
        warnings.warn(f"{fault}; {instead}.", BayestuneWarning, stacklevel=2)
    return whole


def check_checkpoint(checkpoint: Path) -> set[str]:
    """Names of the files of a checkpoint, if each is as it was written. Other files in it are not opened.

    Raises:
        TrainingError: a file is missing, altered, or a link, or `training.json` is not of the form that is written.
    """
    entries = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*"))}
    for name, path in entries.items():
        if path.is_symlink():
            raise _broken(checkpoint, f"{name} is a symbolic link")
    present = {name for name, path in entries.items() if path.is_file()}
    for needed in (ADAPTER, OPTIMIZER, TRAINING, STATE, MANIFEST):
        if not any(name == needed or name.endswith(f"/{ADAPTER}") and needed == ADAPTER for name in present):
            raise _broken(checkpoint, f"found no {needed}")
    records = _records(checkpoint)
    for name, record in records.items():
        if name not in present:
            raise _broken(checkpoint, f"found no {name}")
        found = file_record(entries[name])
        if found != record:
            raise _broken(checkpoint, f"{name} was cut or altered")
    for name in sorted({OPTIMIZER, TRAINING, STATE} - records.keys()):
        raise _broken(checkpoint, f"{MANIFEST} does not list {name}")
    processes = _processes(checkpoint, len(records))
    states = {f"rng_{rank}.{kind}" for rank in range(processes) for kind in ("json", "safetensors")}
    for name in sorted(states - records.keys()):
        raise _broken(checkpoint, f"found no {name}, and {processes} processes wrote it")
    return set(records)


@contextmanager
def unfinished(run: Path) -> Iterator[Path]:
    """Yield an empty folder for a checkpoint of `run` to be written in; afterwards it is gone, and all left in it.

    Raises:
        ConfigError: another process is saving a checkpoint of `run`.
    """
    run.mkdir(parents=True, exist_ok=True)
    work = run / UNFINISHED
    with alone(work):
        _clear(run)
        work.mkdir()
        try:
            yield work
        finally:
            _clear(run)


def seal(checkpoint: Path) -> None:
    """Vouch for every file of `checkpoint`, and have all of it on the disk."""
    paths = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    files = {name: file_record(path) for name, path in paths.items() if name != MANIFEST}
    (checkpoint / MANIFEST).write_bytes(sealed({"format": FORMAT, "files": files}))
    flush(checkpoint)


def publish(written: Path, run: Path) -> None:
    """Move a sealed checkpoint from `.unfinished` to its place; what is there goes the other way first."""
    rename_whole(written, run / written.name, written.with_name(f"replaced-{written.name}"))


def rotate(run: Path, limit: int | None, keep: set[Path]) -> None:
    """Move the oldest checkpoints beyond `limit`, but none of `keep`, to `.unfinished`; without a limit none."""
    if limit is None or limit <= 0:
        return
    found = sorted(_checkpoints(run), key=_step)
    others = [checkpoint for checkpoint in found if checkpoint not in keep]
    for checkpoint in others[: max(0, len(found) - limit)]:
        os.rename(checkpoint, run / UNFINISHED / f"removed-{checkpoint.name}")


def _clear(run: Path) -> None:
    """Publish what is whole in `.unfinished`, and remove the rest."""
    work = run / UNFINISHED
    if work.is_symlink():
        work.unlink()
    for written in _checkpoints(work):
        try:
            check_checkpoint(written)
        except TrainingError:
            continue
        publish(written, run)
    shutil.rmtree(work, ignore_errors=True)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if re.fullmatch("checkpoint-[0-9]+", path.name)]


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _records(checkpoint: Path) -> dict[str, Any]:
    """Size and sha256 of each file, as the manifest has them."""
    try:
        files = read_sealed(checkpoint / MANIFEST, version=FORMAT).get("files")
    except ValueError as error:
        raise _broken(checkpoint, f"{MANIFEST} {error}") from None
    if not isinstance(files, dict):
        raise _broken(checkpoint, f"{MANIFEST} lists no files")
    return files


def _processes(checkpoint: Path, files: int) -> int:
    """How many processes wrote a checkpoint of so many `files`, by its `training.json`, whose form is checked."""
    path = checkpoint / TRAINING
    if path.stat().st_size > _LIMIT:
        raise _broken(checkpoint, f"{TRAINING} has more than {_LIMIT} bytes")
    try:
        found = json.loads(path.read_bytes())  # not strictly: the scheduler of plateaus keeps infinities
    except (ValueError, RecursionError) as error:
        raise _broken(checkpoint, f"{TRAINING} is not JSON ({error})") from None
    parts = {"settings": dict, "optimizer": dict, "scheduler": dict, "format": int}
    if not isinstance(found, dict) or any(type(found.get(name)) is not kind for name, kind in parts.items()):
        raise _broken(checkpoint, f"{TRAINING} is not an object with {', '.join(parts)}")
    if found["format"] != FORMAT:
        raise _broken(checkpoint, f"{TRAINING} has format {shown(found['format'])}, expected {FORMAT}")
    processes, optimizer = found["settings"].get("processes"), found["optimizer"]
    if type(optimizer.get("state")) is not dict or type(optimizer.get("param_groups")) is not list:
        raise _broken(checkpoint, f"{TRAINING} has an optimizer without state or param_groups")
    if type(processes) is not int or not 1 <= processes <= files:
        raise _broken(checkpoint, f"{TRAINING} has processes={shown(processes)}, expected 1 to {files}, the files")
    return processes


def _broken(checkpoint: Path, fault: str) -> TrainingError:
    return TrainingError(
        f"{checkpoint} cannot be resumed: {fault}, expected a complete checkpoint of this trainer as it was written"
    )
