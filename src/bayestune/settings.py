"""Settings and records, declared with pydantic; errors say in one line what was found and what was expected."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from bayestune.errors import ConfigError

LARGEST_WHOLE = 2**31 - 1

_S = TypeVar("_S", bound="Settings")


class Settings(BaseModel):
    """Frozen, keyword-only settings; each field has its bounds and a line of help.

    Raises:
        ConfigError: a value has the wrong type or is out of range; names the field.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError(refusal(type(self), error)) from None

    def replace(self: _S, **changes: Any) -> _S:
        """Return the same settings with some of them changed, checked again."""
        return type(self)(**{**dict(self), **changes})


def refusal(model: type[BaseModel], error: ValidationError) -> str:
    """Return the first fault that pydantic found in the values of `model`, in one line."""
    fault: dict[str, Any] = dict(error.errors()[0])
    path = ".".join(str(part) for part in fault["loc"])
    name = str(fault["loc"][0]) if fault["loc"] else ""
    if fault["type"] == "missing":
        return f"found no setting {path!r}, expected one."
    if fault["type"] == "extra_forbidden":
        return f"unknown setting {path!r}; known are {', '.join(model.model_fields)}."
    if fault["type"] == "value_error":
        return str(fault["ctx"]["error"])
    return _out_of_range(name, model.model_fields[name], fault)


def _out_of_range(name: str, field: FieldInfo, fault: Mapping[str, Any]) -> str:
    if fault["type"] == "less_than_equal":
        return f"{name}: found {fault['input']}, expected at most {fault['ctx']['le']}."
    return f"{name}: found {fault['input']!r}, expected {expected(field)}."


def expected(field: FieldInfo) -> str:
    """Return what a field takes, in words: "a whole number, at least 1", "one of all, last", ..."""
    kind = base_type(field)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    if get_origin(kind) is tuple:
        return "a list of numbers" if float in get_args(kind) else "a list of names"
    if kind is str:
        return "a string"
    if kind is bool:
        return "true or false"
    low = next((bound for bound in field.metadata if isinstance(bound, annotated_types.Ge)), None)
    above = next((bound for bound in field.metadata if isinstance(bound, annotated_types.Gt)), None)
    below = next((bound for bound in field.metadata if isinstance(bound, annotated_types.Lt)), None)
    word = "a whole number" if kind is int else "a number"
    if above is not None and below is not None:
        return f"{word} between {above.gt} and {below.lt}"
    if above is not None:
        return f"{word} above {above.gt}"
    return word if low is None else f"{word}, at least {low.ge}"


def check_value(name: str, field: FieldInfo, value: Any) -> None:
    """Raise an error for a value that a field cannot have, whatever the other fields are.

    Raises:
        ConfigError: names the field.
    """
    kind: Any = field.annotation
    for bound in field.metadata:
        kind = Annotated[kind, bound]
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        raise ConfigError(_out_of_range(name, field, dict(error.errors()[0]))) from None


def base_type(field: FieldInfo) -> Any:
    """Return the type of a field, without the None that an optional one also takes."""
    kind: Any = field.annotation
    inner = [part for part in get_args(kind) if part is not type(None)]
    return (float if float in inner else inner[0]) if type(None) in get_args(kind) else kind


def from_text(fields: Mapping[str, FieldInfo], name: str, value: Any) -> Any:
    """Return a value of a YAML file as its field takes it: YAML has no tuple, and reads 1e-4 as text."""
    if isinstance(value, list):
        return tuple(value)
    if isinstance(value, str) and name in fields and base_type(fields[name]) is float:
        try:
            return float(value)
        except ValueError:
            return value
    return value
