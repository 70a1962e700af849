"""Config files of `bayestune train` and `table`: settings as YAML, or the record of a run."""

import json
from pathlib import Path
from typing import Any

import yaml

from bayestune_cli.errors import FlagError

_LIMIT, _RECORD_LIMIT = 1 << 16, 1 << 24


class _Loader(yaml.SafeLoader):
    """Load plain data, and raise an error if a key is given twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"line {node.start_mark.line + 1}: found {key!r} twice")
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file. Only plain data is read.

    Raises:
        FlagError: the file cannot be read, is longer than 64 KiB, or is not a mapping.
    """
    text = _text(path, _LIMIT)
    try:
        settings = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError) as error:
        raise FlagError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise FlagError(f"--config {path}: found {found}, expected settings such as 'model: ...', one per line.")
    return settings


def _text(path: Path, limit: int) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlagError(f"--config {path}: cannot be read: {error}") from error
    if len(content) > limit:
        raise FlagError(f"--config {path}: found more than {limit} bytes, expected one setting per line.")
    return text


def _record(path: Path) -> Any:
    """Return the content of a JSON file of at most 16 MiB; a table cell has a line for each scored row."""
    try:
        return json.loads(_text(path, _RECORD_LIMIT), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise FlagError(f"--config {path}: not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"found {twice!r} twice")
    return dict(pairs)


def read_run_file(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the settings in a YAML file and None, or the settings in a result.json or table cell and that record.

    Raises:
        FlagError: as `read_config`.
    """
    record = _record(path) if path.suffix == ".json" else None
    content = record if isinstance(record, dict) else read_config(path)
    if isinstance(content.get("experiment"), dict) and isinstance(content.get("sha256"), dict):
        return content["experiment"], content
    return content, None
