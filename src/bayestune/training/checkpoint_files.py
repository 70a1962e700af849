"""The folder of a checkpoint: it appears whole or not at all, and a checksum covers every byte of it.

It is written in the folder `.unfinished` beside the finished ones. When every process has written its files, the main
process adds `checkpoint.json` with the size and sha256 of each file, flushes them all to disk and renames the folder.
After that, the oldest checkpoints are removed. If a crash leaves a whole checkpoint in `.unfinished`, the next save
publishes it. The checksums detect corruption, not tampering.
"""

import itertools
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

FORMAT = 1
MANIFEST = "checkpoint.json"
UNFINISHED = ".unfinished"
ADAPTER = "adapter_model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAINING = "training.json"
STATE = "trainer_state.json"


def last_complete(folder: Path) -> Path | None:
    """Return the newest whole checkpoint in `folder`; a `BayestuneWarning` names each newer one that is not whole."""
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
    instead = "no older checkpoint is whole" if whole is None else f"{whole.name} is used instead"
    for fault in faults:
        warnings.warn(f"{fault}; {instead}.", BayestuneWarning, stacklevel=2)
    return whole


def check_checkpoint(checkpoint: Path) -> set[str]:
    """Return the names of the files of a checkpoint if each is as it was written; other files are not opened.

    Raises:
        TrainingError: a file is missing, altered, or a link.
    """
    paths = {path.relative_to(checkpoint).as_posix(): path for path in sorted(checkpoint.rglob("*"))}
    for name, path in paths.items():
        if path.is_symlink():
            raise _broken(checkpoint, f"{name} is a symbolic link")
    records = _records(checkpoint)
    for name, record in records.items():
        if name not in paths or not paths[name].is_file():
            raise _broken(checkpoint, f"found no {name}")
        if file_record(paths[name]) != record:
            raise _broken(checkpoint, f"{name} was cut or altered")
    try:
        processes = json.loads((checkpoint / TRAINING).read_bytes())["settings"]["processes"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise _broken(checkpoint, f"{TRAINING} does not say how many processes wrote it") from None
    states = (f"rng_{rank}.{suffix}" for rank in range(processes) for suffix in ("json", "safetensors"))
    for name in itertools.chain((OPTIMIZER, TRAINING, STATE), states):
        if name not in records:
            raise _broken(checkpoint, f"found no {name}")
    return set(records)


@contextmanager
def unfinished(run: Path) -> Iterator[None]:
    """Make `.unfinished` an empty folder for the next checkpoint of `run`, and remove it and its content afterwards.

    Raises:
        ConfigError: another process is saving a checkpoint of `run`.
    """
    run.mkdir(parents=True, exist_ok=True)
    with alone(run / UNFINISHED):
        _clear(run)
        (run / UNFINISHED).mkdir()
        try:
            yield
        finally:
            _clear(run)


def seal(checkpoint: Path) -> None:
    """Write the manifest of `checkpoint`, and flush all of it to disk."""
    paths = {path.relative_to(checkpoint).as_posix(): path for path in checkpoint.rglob("*") if path.is_file()}
    files = {name: file_record(path) for name, path in paths.items() if name != MANIFEST}
    (checkpoint / MANIFEST).write_bytes(sealed({"format": FORMAT, "files": files}))
    flush(checkpoint)


def publish(written: Path, run: Path) -> None:
    """Move a sealed checkpoint from `.unfinished` to its place; an older folder there is moved away first."""
    rename_whole(written, run / written.name, written.with_name(f"replaced-{written.name}"))


def rotate(run: Path, limit: int | None, keep: set[Path]) -> None:
    """Move the oldest checkpoints beyond `limit`, but none of `keep`, to `.unfinished`; without a limit, move none."""
    if limit is None or limit <= 0:
        return
    found = sorted(_checkpoints(run), key=_step)
    others = [checkpoint for checkpoint in found if checkpoint not in keep]
    for checkpoint in others[: max(0, len(found) - limit)]:
        os.rename(checkpoint, run / UNFINISHED / f"removed-{checkpoint.name}")


def _clear(run: Path) -> None:
    """Publish each whole checkpoint in `.unfinished`, and remove the rest."""
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
    """Return the size and sha256 of each file, by the manifest."""
    try:
        files = read_sealed(checkpoint / MANIFEST, version=FORMAT).get("files")
    except FileNotFoundError:
        raise _broken(checkpoint, f"found no {MANIFEST}") from None
    except ValueError as error:
        raise _broken(checkpoint, f"{MANIFEST} {error}") from None
    if not isinstance(files, dict):
        raise _broken(checkpoint, f"{MANIFEST} lists no files")
    return files


def _broken(checkpoint: Path, fault: str) -> TrainingError:
    return TrainingError(
        f"{checkpoint} cannot be resumed: {fault}, expected a complete checkpoint of this trainer as it was written"
    )
