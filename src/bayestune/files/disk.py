"""Write files whole or not at all, flush and hash them, and report errors of the disk."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from bayestune.errors import ConfigError, DiskError

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def writing(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Turn an error of the disk into one that names the file or folder being written, and the free space.

    Args:
        path: the file or folder.
        needed: about how many bytes will be written.

    Raises:
        DiskError: the disk is full, read-only or faulty, or a quota or limit is reached; other errors pass unchanged.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else _number_in(str(error))
        if number not in _DISK_ERRORS:
            raise
        space = ""
        if number == errno.ENOSPC:
            space = f" ({shutil.disk_usage(_existing(path)).free / 1e6:.1f} MB free"
            space += ")" if needed is None else f", about {needed / 1e6:.1f} MB needed)"
        raise DiskError(f"{path}: cannot be written: {os.strerror(number)}{space}.") from error


def check_writable(folder: Path, what: str) -> None:
    """Raise an error early if `folder`, or a file in it, cannot be created.

    Raises:
        ConfigError: names `what`, which is to be written, and the folder.
    """
    there = _existing(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{what}: the folder {there} cannot be written to; choose another, or change its mode.")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, with the same bytes on every system.

    Raises:
        DiskError: the disk is full, or cannot be written.
    """
    with replacing(path) as write:
        write(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes text to a UTF-8 file, which replaces `path` if the block ends without an error.

    Raises:
        DiskError: the disk is full, or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with appending(temporary, name=path) as write:
            yield write
        with writing(path):
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def appending(path: Path, *, name: Path | None = None) -> Iterator[Callable[[str], None]]:
    """Yield a function that appends text to a UTF-8 file and flushes it to the disk; errors name `name`.

    Raises:
        DiskError: the disk is full, or cannot be written.
    """
    with path.open("a", encoding="utf-8", newline="\n") as file:

        def write(text: str) -> None:
            with writing(name or path, needed=len(text)):
                file.write(text)
                file.flush()
                os.fsync(file.fileno())

        yield write


def flush(folder: Path) -> None:
    """Flush everything in `folder` to the disk."""
    for entry in (*folder.rglob("*"), folder):
        flush_entry(entry)


def flush_entry(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: Path) -> dict[str, Any]:
    """Return ``{"sha256", "bytes"}`` of a file, as manifests list it."""
    return {"sha256": file_sha256(path), "bytes": path.stat().st_size}


def _number_in(text: str) -> int | None:
    """Return the system's error number, which safetensors gives only in its text."""
    found = re.search(r"os error (\d+)", text)
    return int(found[1]) if found else None


def _existing(path: Path) -> Path:
    """Return `path`, or its nearest parent that exists."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())
