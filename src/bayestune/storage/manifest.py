"""The manifest of a folder: the sha256 of every file that it must hold, and a checksum of the manifest itself."""

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
from pydantic import BaseModel, Field, ValidationError

from bayestune.errors import PosteriorError
from bayestune.files import MANIFEST, file_record, read_sealed, sealed

FORMAT = 1
STD = "rho * rho"
CONFIG_FILE = "adapter_config.json"
CONFIG_LIMIT = 1 << 20
TENSOR_FILE = "adapter_model.safetensors"
PART_FILE = "posterior.safetensors"
KNOWN = "known_features"
"""The tensor in `PART_FILE` that is not part of the distribution: features of training rows."""
CARD = "README.md"

_Described = dict[str, Annotated[list[Any], Field(min_length=2, max_length=2)]]


class _Record(BaseModel):
    sha256: str
    bytes: int


class _Base(BaseModel):
    architecture: str
    config: dict[str, Any]
    weights: dict[str, Annotated[str, Field(pattern=r"^\S+ \S+ \S+$")] | None]


class _Form(BaseModel):
    """The entries of a manifest that loading reads; there may be other entries."""

    posterior: str
    std: Any
    base: _Base
    files: dict[str, _Record]
    tensors: _Described
    settings: dict[str, Any] = {}  # missing in folders of the first version, as are the parts
    parts: _Described = {}


def member_folder(number: int) -> str:
    """Return the folder of member `number` in that of its ensemble; member 0 is in the ensemble's folder itself."""
    return f"member_{number}"


def write_manifest(folder: Path, content: dict[str, Any], files: Iterable[str]) -> None:
    """Write the manifest of `folder`: `content`, the versions of the libraries, and the sha256 of each of `files`."""
    try:
        own = importlib.metadata.version("bayestune")
    except importlib.metadata.PackageNotFoundError:  # a source tree on the path, not installed
        own = "unknown"
    libraries = {module.__name__: str(module.__version__) for module in (peft, torch, transformers)}
    records = {name: file_record(folder / name) for name in sorted(files)}
    content = {"format": FORMAT, "bayestune": own, **libraries, "files": records, **content}
    (folder / MANIFEST).write_bytes(sealed(content))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest of a saved posterior.

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
    try:
        found = read_sealed(path, version=FORMAT)
    except ValueError as error:
        raise PosteriorError(f"{path} {error}: restore the folder.") from None
    if "exported" in found:
        raise PosteriorError(
            f"{folder} was written by export_lora: its folders are plain LoRA adapters (PeftModel.from_pretrained), "
            "not a posterior."
        )
    try:
        _Form.model_validate(found, strict=True)
    except ValidationError as error:
        fault = ".".join(map(str, error.errors()[0]["loc"]))
        raise PosteriorError(f"{path}: {fault} is missing or of the wrong type. Save the posterior again.") from None
    return {"settings": {}, "parts": {}, **found}


def read_files(folder: Path, records: dict[str, Any]) -> dict[str, bytes]:
    """Read the files of a posterior, and check each against the manifest.

    Raises:
        PosteriorError: a file is missing, added, a link, or differs in size or sha256.
    """
    members = len({name.partition("/")[0] for name in records if "/" in name})
    places = ["", *(f"{member_folder(number)}/" for number in range(1, members + 1))]
    expected = {place + name for place in places for name in (CONFIG_FILE, TENSOR_FILE)} | (
        {PART_FILE} & records.keys()
    )
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


def _check_entries(folder: Path, allowed: set[str]) -> None:
    """Raise an error unless `folder` holds only regular files named in `allowed`, and their folders."""
    for entry in sorted(folder.iterdir()):
        inside = {name.removeprefix(f"{entry.name}/") for name in allowed if name.startswith(f"{entry.name}/")}
        if entry.is_symlink():
            raise PosteriorError(f"{entry} is a symbolic link: copy the folder with its links resolved (cp -rL).")
        if inside and entry.is_dir():
            _check_entries(entry, inside)
        elif entry.name not in allowed:
            raise PosteriorError(f"{entry} is not in the manifest and is not opened: remove it.")
        elif not entry.is_file():
            raise PosteriorError(f"{entry} is not a regular file: restore the folder.")
