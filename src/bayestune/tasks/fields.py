"""The fields of one JSON object, read by type, and the errors that name them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bayestune.errors import DataError


def shown(value: object) -> str:
    """Return a value as error messages show it: ASCII only (safe on any console), at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fault(where: str, row_id: object, name: str, found: str, expected: str) -> DataError:
    """Return the error for one field of one row; `where` is `file:line`, or empty for a row made in code."""
    place = f"{where or 'row'} (id {shown(row_id).strip(chr(39))})"
    return DataError(f"{place}: field '{name}': found {found}, expected {expected}; fix or remove the row")


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object, read by type. The row that is made from them checks what the values mean.

    Attributes:
        values: the object.
        where: `file:line`.
        labeled: whether a label is required.
    """

    values: Mapping[str, Any]
    where: str
    labeled: bool = True

    def text(self, name: str) -> str:
        """Return a string."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.fault(name, "a string")
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a string, or None if the field is absent or null."""
        return None if self.values.get(name) is None else self.text(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        value = self.values.get(name)
        if not isinstance(value, list):
            raise self.fault(name, "a list of texts")
        for each in value:
            if not isinstance(each, str):
                raise fault(
                    self.where, self.values.get("id"), name, f"{shown(each)} among the {name}", "a list of texts"
                )
        return tuple(value)

    def label(self, name: str, *kinds: type, expected: str) -> Any:
        """Return a label of one of `kinds`, which are JSON types; None if it is absent and not required."""
        value = self.values.get(name)
        # not isinstance, for which a bool is an int: a bool is not a label
        if type(value) in kinds or (value is None and not self.labeled):
            return value
        raise self.fault(name, expected)

    def numbers(self, name: str) -> float | tuple[float, ...] | None:
        """Return a label that is a number or a list of numbers; None if it is absent and not required."""
        expected = "a number or a list of numbers"
        value = self.label(name, int, float, list, expected=expected)
        if value is None:
            return None
        if any(type(each) not in (int, float) for each in (value if isinstance(value, list) else [value])):
            raise self.fault(name, expected)
        try:
            return tuple(map(float, value)) if isinstance(value, list) else float(value)
        except OverflowError as error:
            raise self.fault(name, "numbers that a float can hold") from error

    def fault(self, name: str, expected: str) -> DataError:
        """Return the error for a field whose value is not as expected."""
        found = shown(self.values[name]) if name in self.values else "nothing"
        return fault(self.where, self.values.get("id"), name, found, expected)
