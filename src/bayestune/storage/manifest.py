"""The manifest of a folder: what it must hold, byte for byte. It carries a checksum of itself."""

import hashlib
import importlib.metadata
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from bayestune.errors import PosteriorError
from bayestune.files import MANIFEST, strict_json

FORMAT = 1
STD = "rho * rho"
CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PART_FILE = "posterior.safetensors"
CARD = "README.md"
_LIMIT = 1 << 24
CONFIG_LIMIT = 1 << 20


def member_folder(number: int) -> str:
    """The folder, inside that of an ensemble, of its member `number`; member 0 has the folder itself."""
    return f"member_{number}"


def versions() -> dict[str, str]:
    """Versions of this library and of those that wrote the files with it."""
    try:
        own = importlib.metadata.version("bayestune")
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path, not installed
        own = "unknown"
    return {
        "bayestune": own,
        "peft": peft.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def file_record(path: Path) -> dict[str, Any]:
    """``{"sha256", "bytes"}`` of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return {"sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def write_manifest(folder: Path, *, content: dict[str, Any]) -> None:
    """Write `content`, with the format version and a checksum over all of it, to the manifest of `folder`."""
    (folder / MANIFEST).write_bytes(serialised({"format": FORMAT, **content}))


def serialised(content: dict[str, Any]) -> bytes:
    """`content` as JSON of one form, with a checksum over all of it."""
    body = json.dumps(content, sort_keys=True)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, sort_keys=True, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The checked manifest of a saved posterior.

    Raises:
        PosteriorError: there is none, it was altered, or it belongs to another format version or kind of folder.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise PosteriorError(f"{folder} is not a folder: expected one written by save_posterior.")
    if not path.is_file() or path.is_symlink():
        inner = folder / "posterior"
        if (inner / MANIFEST).is_file():
            raise PosteriorError(f"{folder} is the folder of a run, expected that of its posterior: {inner}.")
        raise PosteriorError(
            f"{folder} holds no {MANIFEST}, so save_posterior did not write it and nothing vouches for its files. "
            "A plain LoRA adapter holds no posterior. To load what is there unchecked: import bayestune, then "
            "PeftModel.from_pretrained(base, folder)."
        )
    if path.stat().st_size > _LIMIT:
        raise PosteriorError(f"{path} has {path.stat().st_size} bytes, expected at most {_LIMIT}: restore the folder.")
    text = path.read_bytes()
    try:
        found = strict_json(text, limit=_LIMIT)
    except ValueError as error:
        raise PosteriorError(f"{path} cannot be read ({error}): it was altered or cut. Restore the folder.") from None
    if not isinstance(found, dict) or type(found.get("format")) is not int:
        raise PosteriorError(f"{path} has no format number, expected {FORMAT}: it was altered. Restore the folder.")
    if found["format"] != FORMAT:
        raise PosteriorError(f"{path} has format {found['format']}, expected {FORMAT}: upgrade bayestune to load it.")
    checksum = found.pop("checksum", None)
    if serialised(found) != text:
        raise PosteriorError(f"{path} does not match its own checksum {checksum!r}: restore the folder.")
    if "exported" in found:
        raise PosteriorError(
            f"{folder} was written by export_lora: its folders are plain LoRA adapters (PeftModel.from_pretrained), "
            "not a posterior."
        )
    fault = _shape_fault(found)
    if fault:
        raise PosteriorError(f"{path}: {fault} is missing or of the wrong type. Save the posterior again.")
    return found


def read_files(folder: Path, records: dict[str, Any]) -> dict[str, bytes]:
    """The contents of the files of a posterior, each as the manifest has it.

    Raises:
        PosteriorError: a file is missing, added, a link, or differs in size or sha256.
    """
    expected = _expected_files(records)
    if records.keys() != expected:
        raise PosteriorError(f"{folder / MANIFEST} lists files {sorted(records)}, expected {sorted(expected)}.")
    _check_entries(folder, {*records, MANIFEST, CARD})
    contents = {}
    for name, record in records.items():
        path = folder / name
        if not path.is_file():
            raise PosteriorError(f"{path} is missing: restore the folder, or save again.")
        size = path.stat().st_size
        if size != record["bytes"]:
            raise PosteriorError(f"{path} has {size} bytes, expected {record['bytes']}: it was altered or cut.")
        contents[name] = path.read_bytes()
        digest = hashlib.sha256(contents[name]).hexdigest()
        if digest != record["sha256"]:
            raise PosteriorError(f"{path} has sha256 {digest}, expected {record['sha256']}: it was altered.")
    return contents


def _expected_files(records: Iterable[str]) -> set[str]:
    """The files of a posterior with as many members, and as many parts, as `records` has."""
    records = set(records)
    members = len({name.partition("/")[0] for name in records if "/" in name})
    folders = ["", *(f"{member_folder(number)}/" for number in range(1, members + 1))]
    return {f + name for f in folders for name in (CONFIG_FILE, TENSOR_FILE)} | ({PART_FILE} & records)


def _shape_fault(found: dict[str, Any]) -> str | None:
    """The first part of a manifest that is not of the form `save_posterior` writes; None where all are."""
    if not isinstance(found.get("posterior"), str) or "std" not in found:
        return "posterior or std"
    for name in ("base", "files", "tensors"):
        if not isinstance(found.get(name), dict):
            return name
    for name in ("settings", "parts"):  # not in folders of the first version
        if not isinstance(found.setdefault(name, {}), dict):
            return name
    base = found["base"]
    if not isinstance(base.get("architecture"), str) or not isinstance(base.get("config"), dict):
        return "base.architecture or base.config"
    weights = base.get("weights")
    if not isinstance(weights, dict) or not all(w is None or _is_hashes(w) for w in weights.values()):
        return "base.weights"
    for name, record in found["files"].items():
        if not isinstance(record, dict) or type(record.get("bytes")) is not int or "sha256" not in record:
            return f"files.{name}"
    for key, entry in found["tensors"].items():
        if not isinstance(entry, list) or len(entry) != 2:
            return f"tensors.{key}"
    return None


def _is_hashes(value: Any) -> bool:
    return isinstance(value, str) and value.count(" ") == 2


def _check_entries(folder: Path, allowed: set[str]) -> None:
    """That `folder` holds nothing but regular files called as in `allowed`, in folders that these need."""
    for entry in sorted(folder.iterdir()):
        inside = {name.removeprefix(f"{entry.name}/") for name in allowed if name.startswith(f"{entry.name}/")}
        if inside and entry.is_dir() and not entry.is_symlink():
            _check_entries(entry, inside)
            continue
        if entry.is_symlink():
            raise PosteriorError(f"{entry} is a symbolic link: copy the folder with its links resolved (cp -rL).")
        if entry.name not in allowed:
            raise PosteriorError(f"{entry} is not in the manifest and is not opened: remove it.")
        if not entry.is_file():
            raise PosteriorError(f"{entry} is not a regular file: restore the folder.")
