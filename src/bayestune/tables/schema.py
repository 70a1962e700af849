"""What a JSON value has to be: small checks put together, and one error that names the file and the field."""

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bayestune.errors import ConfigError

ROUNDING = 1e-9
LARGEST = sys.float_info.max


@dataclass(frozen=True)
class Text:
    """A text, all of which matches `pattern`."""

    pattern: str = r"(?s).+"

    def __str__(self) -> str:
        return "a text" if self.pattern == Text().pattern else f"a text like {self.pattern}"


@dataclass(frozen=True)
class Whole:
    """A whole number, at least `low`."""

    low: int = 0

    def __str__(self) -> str:
        return f"a whole number, at least {self.low}"


@dataclass(frozen=True)
class Number:
    """A finite number from `low` to `high`, up to the rounding of a sum of shares; `optional` allows null."""

    low: float = 0.0
    high: float = math.inf
    optional: bool = False

    def __str__(self) -> str:
        bounds = f"at least {self.low:g}" if self.high == math.inf else f"from {self.low:g} to {self.high:g}"
        return f"a number {bounds}{' or null' if self.optional else ''}"


@dataclass(frozen=True)
class Items:
    """A list of `item`, `least` to `most` long."""

    item: "Schema"
    least: int
    most: int

    def __str__(self) -> str:
        return f"a list of {self.least if self.least == self.most else f'{self.least} to {self.most}'}"


@dataclass(frozen=True)
class Fields:
    """An object with all these fields; `more` allows others, with any finite content."""

    fields: Mapping[str, "Schema"]
    more: bool = False

    def __str__(self) -> str:
        return "an object"


Schema = Text | Whole | Number | Items | Fields


def check(value: Any, schema: Schema, *, where: str, field: str = "") -> None:
    """Refuse a value that is not as `schema` says.

    Raises:
        ConfigError: `where` (a file), the field, what was found and what was expected.
    """
    match schema:
        case Text(pattern):
            good = isinstance(value, str) and re.fullmatch(pattern, value) is not None
        case Whole(low):
            good = type(value) is int and value >= low
        case Number(low, high, optional):
            good = (value is None and optional) or _is_within(value, low, high)
        case Items(item, least, most):
            good = isinstance(value, list) and least <= len(value) <= most
            if good:
                for i, part in enumerate(value):
                    check(part, item, where=where, field=f"{field}[{i}]")
        case Fields():
            good = isinstance(value, dict)
            if good:
                _check_fields(value, schema, where, field)
    if not good:
        raise ConfigError(f"{where}: field {field}: found {_shown(value)}, expected {schema}.")


def _check_fields(value: dict[str, Any], schema: Fields, where: str, field: str) -> None:
    prefix = f"{field}." if field else ""
    for name in schema.fields:
        if name not in value:
            raise ConfigError(f"{where}: found no field {prefix}{name}, expected {schema.fields[name]}.")
    for name, part in value.items():
        if name in schema.fields:
            check(part, schema.fields[name], where=where, field=prefix + name)
        elif schema.more:
            _check_finite(part, where, prefix + name)
        else:
            known = ", ".join(schema.fields)
            raise ConfigError(f"{where}: unknown field {prefix}{_shown(name)}, expected only {known}.")


def _check_finite(value: Any, where: str, field: str) -> None:
    """Refuse a number that JSON does not have, anywhere in free content; a loop, for content may be nested deeply."""
    todo = [value]
    while todo:
        part = todo.pop()
        if isinstance(part, float) and not math.isfinite(part):
            raise ConfigError(f"{where}: field {field}: found {part}, expected finite numbers.")
        todo += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []


def _is_within(value: Any, low: float, high: float) -> bool:
    """A finite number in the range; a whole number too large for a float is not one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and max(low - ROUNDING, -LARGEST) <= value <= min(high + ROUNDING, LARGEST)


def _shown(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    text = str(value) if isinstance(value, float) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
