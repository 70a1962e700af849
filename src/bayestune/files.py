"""Folders that appear on disk whole or not at all, and JSON that is read with limits."""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bayestune.errors import ConfigError

MANIFEST = "bayestune_manifest.json"
_DEPTH = 64


@contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place when the block ends without an exception.

    Everything is flushed to disk before the renames. An older folder is moved aside first and removed last, so a
    crash leaves the old one or the new one whole; where it falls between the two renames, the old one waits beside
    `path` and `existing_folder` finds it. With `overwrite` only an empty folder, or one holding a bayestune
    manifest, is replaced. What killed saves to `path` left behind is removed first.

    Raises:
        ConfigError: `path` exists and must not be replaced, or is a link; the place where the older folder waits
            is taken by something that bayestune did not write; or another process is saving to `path`.
    """
    target = Path(os.path.abspath(path))
    aside = _aside(target)
    _check_aside(aside)
    _check_target(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target):
        _remove_litter(target)
        if aside.is_dir() and not os.path.lexists(target):
            os.rename(aside, target)
        _check_target(target, overwrite)  # again: another process may have been first
        work = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        work.mkdir()
        try:
            yield work
            _take_modes(work)
            flush(work)
            _publish(work, target, aside)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Inside, no other process or thread that asks for the same is saving to `target`; its folder must exist.

    Raises:
        ConfigError: one is. The lock goes with its process, however that ends.
    """
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{target}: another process is saving to it: wait for that one, or choose another path."
        ) from None
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)  # while it is held: who has it open sees that it is gone
        finally:
            lock.release()


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """`path`, or the older folder that an interrupted replacement of `path` left beside it."""
    target = Path(os.path.abspath(path))
    aside = _aside(target)
    return aside if aside.is_dir() and not os.path.lexists(target) else target


def strict_json(text: bytes, *, limit: int, finite: bool = True) -> Any:
    """Parse at most `limit` bytes of JSON.

    Raises:
        ValueError: too long, too deep, not UTF-8, not JSON, a key given twice; or, if `finite`, NaN and infinities.
    """
    if len(text) > limit:
        raise ValueError(f"{len(text)} bytes of JSON, expected at most {limit}")
    decoded = text.decode("utf-8")
    numbers: dict[str, Any] = {"parse_float": _finite, "parse_constant": _no_constant} if finite else {}
    try:
        found = json.loads(decoded, object_pairs_hook=_unique, **numbers)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None
    if _is_deeper(found, _DEPTH):
        raise ValueError(f"JSON nested too deeply, expected at most {_DEPTH} levels")
    return found


def flush(folder: Path) -> None:
    """Have everything in `folder` on the disk."""
    for entry in (*folder.rglob("*"), folder):
        flush_entry(entry)


def flush_entry(path: Path) -> None:
    """Have a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_aside(aside: Path) -> None:
    """Refuse to move or remove what an interrupted replacement cannot have left."""
    if os.path.lexists(aside) and (aside.is_symlink() or not (aside / MANIFEST).is_file()):
        raise ConfigError(
            f"{aside} is in the way (an older folder would wait there) and holds no {MANIFEST}: move it away."
        )


def _check_target(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise ConfigError(f"{target} exists already: choose another path, or pass overwrite=True to replace it.")
    if target.is_symlink():
        raise ConfigError(f"{target} is a symbolic link, which is not replaced: pass the path it points to.")
    if not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).is_file()):
        raise ConfigError(
            f"{target} is not a folder that bayestune wrote (it holds no {MANIFEST}), so overwrite=True does not "
            "replace it: remove it by hand, or choose another path."
        )


def _publish(work: Path, target: Path, aside: Path) -> None:
    try:
        if target.exists():
            _remove(aside)  # what a crash after an earlier replacement left
            os.rename(target, aside)
        os.rename(work, target)
    except BaseException:
        if aside.is_dir() and not os.path.lexists(target):
            os.rename(aside, target)
        raise
    try:
        flush_entry(target.parent)
    finally:
        _remove(aside)


def _remove(aside: Path) -> None:
    """Remove the older folder under another name, so that a crash on the way leaves no half of it in its place."""
    if not aside.is_dir():
        return
    litter = aside.with_name(f"{aside.name}.{secrets.token_hex(8)}.tmp")
    try:
        with contextlib.suppress(OSError):  # then as it is
            os.rename(aside, litter)
    finally:
        for folder in (litter, aside):
            shutil.rmtree(folder, ignore_errors=True)


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _take_modes(work: Path) -> None:
    """Give every file the mode that umask gives a new one; safetensors keeps its own to the owner."""
    probe = work / f".{secrets.token_hex(8)}"
    probe.touch()
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    for entry in work.rglob("*"):
        if entry.is_file():
            entry.chmod(mode)


def _remove_litter(target: Path) -> None:
    litter = re.compile(rf"\.{re.escape(target.name)}(\.old)?\.[0-9a-f]{{16}}\.tmp")
    for path in target.parent.iterdir():
        if litter.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:30]} is too large a number")
    return number


def _is_deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested in more than `levels`; level by level, for the nesting may be deep."""
    layer = [value]
    for _ in range(levels + 1):
        parts = [part.values() if isinstance(part, dict) else part for part in layer if isinstance(part, dict | list)]
        layer = [item for part in parts for item in part]
        if not layer:
            return False
    return True
