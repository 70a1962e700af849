"""Files on the disk: whole writes, flushes, hashes, and the errors of a disk that cannot be written."""

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from bayestune.errors import ConfigError, DiskError

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@contextlib.contextmanager
def writing(path: Path, *, needed: int | None = None) -> Iterator[None]:
    """Inside, an error of the disk becomes one that names `path`, the file or folder written, and the space there.

    Args:
        needed: about how many bytes are to be written.

    Raises:
        DiskError: there is no space, or a quota, a limit or a fault of the disk; other errors are left as they are.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = _number(error)
        if number not in _OF_THE_DISK:
            raise
        space = ""
        if number == errno.ENOSPC:
            space = f" ({shutil.disk_usage(_existing(path)).free / 1e6:.1f} MB free"
            space += ")" if needed is None else f", about {needed / 1e6:.1f} MB needed)"
        raise DiskError(f"{path}: cannot be written: {os.strerror(number)}{space}.") from error


def check_writable(folder: Path, what: str) -> None:
    """Refuse a folder that files cannot be made in, or that cannot be made, before any work is done for it.

    Raises:
        ConfigError: naming `what`, which is to be written, and the folder.
    """
    there = _existing(folder)
    if not os.access(there, os.W_OK | os.X_OK):
        raise ConfigError(f"{what}: the folder {there} cannot be written to; choose another, or change its mode.")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all, with the same bytes on every system.

    Raises:
        DiskError: the disk is full, or cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path, needed=len(text)):
        try:
            with temporary.open("x", encoding="utf-8", newline="\n") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


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


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _existing(path: Path) -> Path:
    """`path`, or the nearest folder above it that is there."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if place.exists())
