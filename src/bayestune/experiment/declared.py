"""Make the options of `bayestune train` and the methods page of the docs from the declarations of the settings.

``python -m bayestune.experiment.declared`` (``make declared``) writes both files; a test compares them.
"""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from bayestune.experiment.settings import Experiment, methods_with
from bayestune.methods import DEFAULT, METHODS
from bayestune.settings import base_type, expected

SOURCE = Path(__file__).parents[2]
OPTIONS = SOURCE / "bayestune_cli" / "options.json"
PAGE = SOURCE.parent / "docs" / "methods.md"
_TYPES = {bool: "bool", int: "int", float: "float", str: "str"}


def options() -> list[dict[str, Any]]:
    """Return the settings as options of `bayestune train`: name, type, help, values, and the methods with it."""
    made = [_option(name, field, None) for name, field in Experiment.model_fields.items()]
    seen: set[str] = set()
    for method in METHODS.values():
        for name, field in method.model_fields.items():
            if name not in seen:
                seen.add(name)
                made.append(_option(name, field, methods_with(name)))
    return made


def _option(name: str, field: FieldInfo, methods: list[str] | None) -> dict[str, Any]:
    help_text = field.description or ""
    required = {"required": field.is_required()}
    if name == "method":
        names = "; ".join(f"{method.name}, {method.summary}" for method in METHODS.values())
        takes = {"type": "str", "choices": list(METHODS), "limits": {}, "default": DEFAULT.name}
        return {"name": name, "help": f"{names}. Default {DEFAULT.name}.", "methods": None, **required, **takes}
    if methods is not None:
        help_text = f"{', '.join(methods)}: {help_text}"
    elif name == "adapter":
        help_text = f"{', '.join(m.name for m in METHODS.values() if m.start is not None)}: {help_text}"
    if not field.is_required() and field.default is not None:
        help_text = f"{help_text.removesuffix('.')}; default {field.default}."
    return {"name": name, "help": help_text, "methods": methods, **required, **_takes(field)}


def _takes(field: FieldInfo) -> dict[str, Any]:
    """Return the type and the allowed values of a field; the command line checks them before it imports torch."""
    kind = base_type(field)
    bounds = [dataclasses.asdict(part) for part in field.metadata if isinstance(part, Ge | Gt | Le | Lt)]
    return {
        "type": _type(field),
        "choices": list(get_args(kind)) if get_origin(kind) is Literal else [],
        "limits": {name: bound for part in bounds for name, bound in part.items()},
        "expected": expected(field),
    }


def _type(field: FieldInfo) -> str:
    kind = int if int in get_args(field.annotation) else base_type(field)
    if get_origin(kind) is tuple:
        return "numbers" if float in get_args(kind) else "names"
    return "str" if get_origin(kind) is Literal else _TYPES[kind]


def methods_page() -> str:
    """Return the methods page in Markdown."""
    lines = [
        "# Methods",
        "",
        "Each method is declared in one file of `src/bayestune/methods`. `make declared` makes this page and the",
        "options of `bayestune train` from these declarations; tables take the names of the methods from them.",
        "",
        "| method | what it is | starts from | draws | source |",
        "|---|---|---|---|---|",
    ]
    for method in METHODS.values():
        start = f"a finished `{method.start.name}` adapter" if method.start else "a new adapter"
        draws = "none" if method.has_no_draws else "yes"
        lines.append(f"| [`{method.name}`](#{method.name}) | {method.summary} | {start} | {draws} | {method.paper} |")
    for method in METHODS.values():
        lines += ["", f"## {method.name}", "", inspect.cleandoc(method.__doc__ or ""), ""]
        lines += [f"Source: {method.paper}. Code: `{method.__module__.replace('.', '/')}.py`."]
        if method.model_fields:
            lines += ["", "| setting | takes | default | |", "|---|---|---|---|"]
        for name, field in method.model_fields.items():
            default = "unset" if field.default is None else f"`{field.default}`"
            lines.append(f"| `{name}` | {expected(field)} | {default} | {field.description} |")
    return "\n".join(lines) + "\n"


def written() -> dict[Path, str]:
    """Return the content of each file by its path."""
    return {OPTIONS: json.dumps(options(), indent=1) + "\n", PAGE: methods_page()}


if __name__ == "__main__":
    for path, text in written().items():
        path.write_text(text, encoding="utf-8")
        print(path)
