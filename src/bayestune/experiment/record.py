"""The versions, hardware and hashes of rows that are recorded with every result."""

import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from typing import Any

import torch

from bayestune.tasks import AnyRow

_PACKAGES = ("bayestune", "torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that compute; "unknown" for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a source tree on the path
            found[name] = "unknown"
    return found


def hardware() -> dict[str, Any]:
    """Return the system, the machine type, the processor cores, torch's threads and the training device."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }


def rows_sha256(rows: Sequence[AnyRow]) -> str:
    """Return the SHA-256 of the rows' content, in order; it does not depend on where they were read from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row_json(row).encode() + b"\n")
    return digest.hexdigest()


def row_json(row: AnyRow) -> str:
    """Return the row as one line of a file of rows."""
    fields = {name: value for name, value in vars(row).items() if name != "where" and value is not None}
    return json.dumps(fields, sort_keys=True, ensure_ascii=True)
