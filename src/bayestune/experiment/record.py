"""What is written beside a result, so that it can be judged and repeated: versions, hashes, hardware."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bayestune.errors import ConfigError
from bayestune.experiment.disk import writing
from bayestune.files import strict_json
from bayestune.tasks import AnyRow

_LIMIT = 1 << 24
_PACKAGES = ("bayestune", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages behind the numbers; "unknown" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a source tree on the path
            found[name] = "unknown"
    return found


def hardware() -> dict[str, Any]:
    """Machine, processor cores, threads used by torch, and the device that trains."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }


def rows_sha256(rows: Sequence[AnyRow]) -> str:
    """SHA-256 of the rows' content, in order, wherever they were read from."""
    digest = hashlib.sha256()
    for row in rows:
        fields = {name: value for name, value in vars(row).items() if name != "where" and value is not None}
        digest.update(json.dumps(fields, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all: a temporary file in the same folder, then a rename."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


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


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The object in a JSON file of at most 16 MiB and 64 levels, in which no key is given twice.

    Raises:
        ConfigError: no such file, or not one such object; `what` says what the file should be.
    """
    try:
        with path.open("rb") as file:
            content = strict_json(file.read(_LIMIT + 1), limit=_LIMIT, finite=False)  # a cell's check names the field
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, expected {what}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as {what}: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a {type(content).__name__}, expected {what}.")
    return content
