"""Run files: the settings of `bayestune train` as YAML, or the record of a run that is to be made again."""

from pathlib import Path
from typing import Any

import yaml

from bayestune_cli.console import FlagError

_LIMIT, _DEPTH = 1 << 16, 8
_LARGEST = 1 << 64


class _Loader(yaml.SafeLoader):
    """Plain data, without the references by which a few lines can stand for billions, and not nested deeply."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        line = self.peek_event().start_mark.line + 1
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {line}: found a reference, expected a value")
        if self.depth == _DEPTH:
            raise yaml.YAMLError(f"line {line}: found values nested in more than {_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.YAMLError(f"line {key.start_mark.line + 1}: found {key.value!r} twice")
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: Any) -> int:
        number = super().construct_yaml_int(node)
        if abs(number) > _LARGEST:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: found a whole number beyond {_LARGEST}")
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, a plain mapping; only data is read, no tag makes an object.

    Raises:
        FlagError: it cannot be read, is longer than 64 KiB, or is not a mapping of names to values.
    """
    try:
        with path.open("rb") as file:
            content = file.read(_LIMIT + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FlagError(f"--config {path}: cannot be read: {error}") from error
    if len(content) > _LIMIT:
        raise FlagError(f"--config {path}: found more than {_LIMIT} bytes, expected settings, one a line.")
    try:
        found = _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, ArithmeticError, LookupError, AttributeError) as error:  # of its constructors
        raise FlagError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(found, dict):
        kind = "nothing" if found is None else f"a {type(found).__name__}"
        raise FlagError(f"--config {path}: found {kind}, expected settings such as 'model: ...', one a line.")
    return found


def read_run_file(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The settings in a YAML file; or those that a result.json or a cell was made with, and that record.

    Raises:
        FlagError: as `read_config`.
    """
    content = read_config(path)
    if isinstance(content.get("experiment"), dict) and isinstance(content.get("sha256"), dict):
        return content["experiment"], content
    return content, None
