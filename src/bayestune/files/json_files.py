"""Write JSON files whole or not at all, read them strictly and within limits, and seal them with a checksum."""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayestune.errors import ConfigError
from bayestune.files.disk import write_text

_LIMIT = 1 << 24


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """Return the object in a JSON file of at most 16 MiB without duplicate keys.

    Raises:
        ConfigError: there is no such file, or it holds no such object; `what` says what the file should be.
    """
    try:
        with path.open("rb") as file:
            content = strict_json(file.read(_LIMIT + 1), limit=_LIMIT, finite=False)  # a later check names the field
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file, expected {what}.") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as {what}: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: found a {type(content).__name__}, expected {what}.")
    return content


def sealed(content: Mapping[str, Any]) -> bytes:
    """Return the JSON of a manifest: `content` in one fixed form, with a checksum over all of it."""
    checksum = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return (json.dumps({**content, "checksum": checksum}, sort_keys=True, indent=1) + "\n").encode()


def read_sealed(path: Path, *, version: int) -> dict[str, Any]:
    """Read the content of a manifest whose ``"format"`` is `version` and whose bytes match its checksum.

    Checksums detect corruption, not tampering.

    Raises:
        ValueError: the manifest is damaged or of another version; the message follows the name of the file.
    """
    with path.open("rb") as file:
        text = file.read(_LIMIT + 1)
    try:
        content = strict_json(text, limit=_LIMIT)
    except ValueError as error:
        raise ValueError(f"was cut or altered ({error})") from None
    if not isinstance(content, dict) or type(content.get("format")) is not int:
        raise ValueError(f"was cut or altered (it has no format number, expected {version})")
    if content["format"] != version:
        raise ValueError(f"has format {content['format']}, expected {version}: upgrade bayestune to load it")
    checksum = content.pop("checksum", None)
    if sealed(content) != text:
        raise ValueError(f"was cut or altered (it does not match its own checksum {checksum!r})")
    return content


def strict_json(text: bytes, *, limit: int, finite: bool = True) -> Any:
    """Parse at most `limit` bytes of JSON.

    Raises:
        ValueError: `text` is too long or too deep, is not UTF-8 or JSON, or has a duplicate key; or, if `finite`, it
            holds NaN or infinities.
    """
    if len(text) > limit:
        raise ValueError(f"{len(text)} bytes of JSON, expected at most {limit}")
    numbers: dict[str, Any] = {"parse_float": _finite, "parse_constant": _no_constant} if finite else {}
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, **numbers)
    except RecursionError:
        raise ValueError("JSON nested too deeply") from None


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
