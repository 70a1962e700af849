"""The options of `bayestune train`, from `options.json`, which is made from the declarations of settings."""

import inspect
import json
import operator
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import typer

from bayestune_cli.errors import FlagError

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "names": str, "numbers": str}
_HOLDS = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt}


@cache
def options() -> tuple[dict[str, Any], ...]:
    """Return the settings of a run and of its method, as `bayestune.experiment.declared` wrote them."""
    return tuple(json.loads((Path(__file__).parent / "options.json").read_text(encoding="utf-8")))


def with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with an option for each setting in place of its ``**given``."""
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    made = [
        inspect.Parameter(
            option["name"],
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_TYPES[option["type"]] | None, typer.Option(help=option["help"])],
        )
        for option in options()
    ]
    ordered = [*own[:2], *made, *own[2:]]
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return command


def check_values(settings: Mapping[str, Any], where: str) -> None:
    """Raise an error for a missing setting, or a value out of range. `Experiment` makes the full check later."""
    for option in options():
        name, value = option["name"], settings.get(option["name"])
        if option["required"] and name not in settings:
            raise FlagError(f"{where}: found no setting {name!r}, expected one.")
        if value is not None and option["choices"] and value not in option["choices"]:
            raise FlagError(f"{where}: {name}: found {value!r}, expected one of {', '.join(option['choices'])}.")
        if isinstance(value, int | float):
            for limit, bound in option["limits"].items():
                if not _HOLDS[limit](value, bound):
                    expected = f"at most {bound}" if limit == "le" else option["expected"]
                    raise FlagError(f"{where}: {name}: found {value!r}, expected {expected}.")


def check_of_method(given: Mapping[str, Any], method: str) -> None:
    """Raise an error for a flag that `method` does not have. A config file may hold settings of several methods."""
    for option in options():
        name, methods = option["name"], option["methods"]
        if methods is not None and name in given and method not in methods:
            flag = "--" + name.replace("_", "-")
            raise FlagError(f"{flag}: found it with method {method!r}, expected method {' or '.join(methods)}.")
