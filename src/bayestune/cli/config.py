"""Run files: the settings of `bayestune train` as YAML, or the record of a run that is to be made again."""

from pathlib import Path
from typing import Any

import yaml

from bayestune.errors import ConfigError


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, a plain mapping; only data is read, no tag makes an object.

    Raises:
        ConfigError: it cannot be read, or is not a mapping of names to values.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"--config {path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        found = "nothing" if content is None else f"a {type(content).__name__}"
        raise ConfigError(f"--config {path}: found {found}, expected settings such as 'model: ...', one a line.")
    return content


def read_run_file(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The settings in a YAML file; or those that a result.json or a cell was made with, and that record.

    Raises:
        ConfigError: as `read_config`.
    """
    content = read_config(path)
    if isinstance(content.get("experiment"), dict) and isinstance(content.get("sha256"), dict):
        return content["experiment"], content
    return content, None
