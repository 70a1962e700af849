"""A first check of the rows of `bayestune predict` with the standard library, before torch is imported.

The full check follows when the run is loaded.
"""

import gzip
import json
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayestune_cli.errors import FlagError


def check_rows(path: Path) -> None:
    """Raise an error unless every line of `path` has the fields of a row and a unique id."""
    lines: dict[str, int] = {}
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                row = _parsed(line, f"{path}:{number}")
                _check_fields(row, f"{path}:{number}")
                if row["id"] in lines:
                    found = f"the id of {path}:{lines[row['id']]} again"
                    raise _fault(f"{path}:{number}", row, "id", found, "ids that differ")
                lines[row["id"]] = number
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise FlagError(f"{path}: cannot be read: {error}; check the path and that the file is whole") from error
    if number == 0:
        raise FlagError(f"{path}: found no rows, expected one JSON object per line; check the path")


_PROBLEMS = {
    re.compile(rb"\xef\xbb\xbf"): "a byte order mark (BOM); save the file as UTF-8 without one",
    re.compile(rb".*\r\n", re.DOTALL): "a CRLF line end; convert the file to LF (\\n) line ends",
    re.compile(rb"\s*$"): "a blank line",
    re.compile(rb".*\0", re.DOTALL): "a NUL byte",
}


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    for pattern, problem in _PROBLEMS.items():
        if pattern.match(line):
            raise FlagError(f"{where}: found {problem}, expected one JSON object; fix or remove the row")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise FlagError(f"{where}: found byte {error.start} not in UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise FlagError(f"{where}: not one JSON object: {error}; fix or remove the row") from error
    if not isinstance(row, dict):
        raise FlagError(f"{where}: found {_shown(row)}, expected one JSON object {{...}}; fix or remove the row")
    return row


_TEXTS = {
    ("question", "choices"): ("question",),
    ("text",): ("text",),
    ("chosen", "rejected"): ("chosen", "rejected"),
    ("prompt", "messages"): (),
}
"""The texts that a row must have, by the fields that mark its kind; a preference may have a prompt too."""


def _check_fields(row: Mapping[str, Any], where: str) -> None:
    kinds = [marks for marks in _TEXTS if not row.keys().isdisjoint(marks)]
    if "chosen" in row or "rejected" in row:
        kinds = [marks for marks in kinds if "prompt" not in marks or "messages" in row]
    if len(kinds) != 1:
        names = [f"'{marks[0]}'" for marks in kinds or _TEXTS]
        found = " and ".join(names) if kinds else f"none of {', '.join(names)}"
        raise _fault(where, row, "question", found, "one of them")
    for name in ("id", *_TEXTS[kinds[0]]):
        if not isinstance(row.get(name), str):
            raise _fault(where, row, name, _shown(row[name]) if name in row else "nothing", "a string")
    if "choices" not in kinds[0]:
        return
    choices = row.get("choices")
    if not isinstance(choices, list):
        raise _fault(where, row, "choices", _shown(choices) if "choices" in row else "nothing", "a list of texts")
    for choice in choices:
        if not isinstance(choice, str):
            raise _fault(where, row, "choices", f"{_shown(choice)} among the choices", "a list of texts")
    if not 2 <= len(choices) <= 26:
        raise _fault(where, row, "choices", f"{len(choices)} choices", "2 to 26")


def _fault(where: str, row: Mapping[str, Any], name: str, found: str, expected: str) -> FlagError:
    place = f"{where} (id {_shown(row.get('id')).strip(chr(39))})"
    return FlagError(f"{place}: field '{name}': found {found}, expected {expected}; fix or remove the row")


def _shown(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
