"""Write folders whole or not at all, and lock files and folders."""

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from bayestune.errors import ConfigError
from bayestune.files.disk import flush, flush_entry

MANIFEST = "bayestune_manifest.json"


@contextlib.contextmanager
def new_folder(path: str | os.PathLike[str], *, overwrite: bool, kind: str | None = None) -> Iterator[Path]:
    """Yield an empty folder beside `path` that replaces it when the block ends without an exception.

    Everything is flushed to disk before the renames. An older folder is moved aside first and removed last, so a
    crash leaves either the old folder or the new one whole. After a crash between the two renames, the old folder is
    beside `path`, where `existing_folder` finds it. With `overwrite`, only an empty folder or one with a bayestune
    manifest is replaced, and with `kind` only one whose manifest has that entry: an export does not replace a
    posterior. Leftovers of killed saves to `path` are removed first.

    Raises:
        ConfigError: `path` exists and must not be replaced, or is a link; something that bayestune did not write
            has the name to which the older folder would be moved; or another process is saving to `path`.
    """
    target = Path(os.path.abspath(path))
    aside = _aside(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone(target):  # only its holder may look at the folder, which the holder changes
        _check_aside(aside)
        _remove_litter(target)
        if aside.is_dir() and not os.path.lexists(target):
            os.rename(aside, target)
        _check_target(target, overwrite, kind)
        work = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
        work.mkdir()
        try:
            yield work
            _reset_modes(work)
            flush(work)
            remove(aside)  # left by a crash after an earlier replacement
            publish(work, target, aside)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        finally:
            if os.path.lexists(target):
                remove(aside)


@contextlib.contextmanager
def replaced_if(
    path: str | os.PathLike[str], *, proof: str, overwrite: bool, kind: str
) -> Iterator[Callable[[], None]]:
    """Context in which a new folder is made at `path`; it yields a function to call once that folder has proved good.

    An older folder is beside `path` until then, as `.NAME.before`. The call removes it; without a call, it is put back
    at the end. After a crash, the next context puts it back unless the new folder holds the file `proof`.

    Raises:
        ConfigError: `path` exists and must not be replaced, as for `new_folder`; or another process is in this
            context.
    """
    path = Path(os.path.abspath(path))
    before, good = path.with_name(f".{path.name}.before"), False

    def succeed() -> None:
        nonlocal good
        good = True
        remove(before)

    def put_back() -> None:
        remove(path)
        if before.is_dir():
            os.rename(before, path)

    path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(alone(before))
        except ConfigError:
            raise ConfigError(
                f"{path}: found it in use, expected no other process; stop that one, or choose another path."
            ) from None
        if before.is_dir() and not (path / proof).is_file():
            _check_target(path, True, kind)  # it may be somebody's own by now
            put_back()
        if _aside(path).is_dir() and not os.path.lexists(path):
            os.rename(_aside(path), path)  # left by a crash in `new_folder`
        _check_target(path, overwrite, kind)
        if os.path.lexists(path):
            remove(before)
            os.rename(path, before)
        try:
            yield succeed
        finally:
            if not good:
                put_back()


def publish(work: Path, target: Path, aside: Path) -> None:
    """Rename the finished folder `work` to `target`; an old `target` becomes `aside`, and is restored on failure."""
    try:
        if os.path.lexists(target):
            os.rename(target, aside)
        os.rename(work, target)
    except BaseException:
        if aside.is_dir() and not os.path.lexists(target):
            os.rename(aside, target)
        raise
    flush_entry(target.parent)


@contextlib.contextmanager
def alone(target: Path) -> Iterator[None]:
    """Hold the lock of `target`, whose parent folder must exist. A process that ends in any way releases its lock.

    Raises:
        ConfigError: another process or thread holds this lock.
    """
    path = target.with_name(f".{target.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        advice = "wait for that one, or choose another path."
        raise ConfigError(f"{target}: another process is saving to it: {advice}") from None
    try:
        yield
    finally:
        try:
            path.unlink(missing_ok=True)  # while it is held, so that a process that has it open sees that it is gone
        finally:
            lock.release()


@contextlib.contextmanager
def claimed(target: Path, *, purpose: str) -> Iterator[bool]:
    """Yield True and hold a lock of `target`, or yield False if another process or thread holds it.

    A process that ends in any way releases its lock. The lock file stays: on a network file system its removal could
    give the lock to two processes.

    Args:
        target: the file or folder that is being made. Its parent folder is created if it is missing.
        purpose: part of the lock file's name, to distinguish this lock from that of `alone`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(target.with_name(f".{target.name}.{purpose}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def existing_folder(path: str | os.PathLike[str]) -> Path:
    """Return `path`, or the older folder that an interrupted replacement of `path` left beside it."""
    target = Path(os.path.abspath(path))
    aside = _aside(target)
    return aside if aside.is_dir() and not os.path.lexists(target) else target


def remove(folder: Path) -> None:
    """Rename `folder`, then remove it, so that a crash in between does not leave half of it in place."""
    if not folder.is_dir():
        return
    litter = folder.with_name(f"{folder.name}.{secrets.token_hex(8)}.tmp")
    try:
        with contextlib.suppress(OSError):  # it is then removed under its own name
            os.rename(folder, litter)
    finally:
        for path in (litter, folder):
            shutil.rmtree(path, ignore_errors=True)


def _check_aside(aside: Path) -> None:
    if os.path.lexists(aside) and (aside.is_symlink() or not (aside / MANIFEST).is_file()):
        raise ConfigError(
            f"{aside} is in the way (an older folder would be moved there) and holds no {MANIFEST}: move it away."
        )


def _check_target(target: Path, overwrite: bool, kind: str | None) -> None:
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
    if kind is not None and any(target.iterdir()) and f'"{kind}":'.encode() not in (target / MANIFEST).read_bytes():
        raise ConfigError(
            f"{target}: found a folder that bayestune wrote for another purpose, expected one with {kind!r} in its "
            f"{MANIFEST}; choose another path."
        )


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _reset_modes(work: Path) -> None:
    """Give every file the mode that umask gives a new one; safetensors creates files only their owner can read."""
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
