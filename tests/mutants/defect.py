"""What a planted defect is, and how wrong behavior takes the place of the right one."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

Wrong = Callable[..., Any]
Plant = Callable[[], None]


@dataclass(frozen=True, kw_only=True)
class Defect:
    """Wrong behavior, and the tests that must fail on it.

    Attributes:
        name: what is wrong.
        plant: puts the wrong behavior in place, in this process.
        tests: a file under tests/.
        select: what pytest's -k takes: part of a test's name, or the id of a property; empty for the whole file.
    """

    name: str
    plant: Plant
    tests: str
    select: str


DEFECTS: dict[str, Defect] = {}


def defect(tests: str, select: str = "") -> Callable[[Plant], Plant]:
    """Add the decorated function to the planted defects, under its own name."""

    def add(plant: Plant) -> Plant:
        name = plant.__name__
        assert name not in DEFECTS, name
        DEFECTS[name] = Defect(name=name, plant=plant, tests=tests, select=select)
        return plant

    return add


def replace(name: str, wrong: Any) -> None:
    """Put `wrong` in the place of the function, method or property called `name`, such as "bayestune.files.flush"."""
    wrap(name, lambda right: wrong)


def wrap(name: str, make: Callable[[Any], Any]) -> None:
    """Put ``make(right)`` in the place of what is called `name`.

    A method is replaced in its class, and a function in every module that imported it under any name. A module that
    is imported later finds the wrong one in its home.
    """
    _put(*find(name), make)


def find(name: str) -> tuple[Any, str]:
    """The module, or the class in one, that defines `name`, and the last part of the name.

    Raises:
        AttributeError: nothing there is called `name`.
    """
    path, _, attribute = name.rpartition(".")
    try:
        owner: Any = importlib.import_module(path)
    except ModuleNotFoundError:
        module, _, class_name = path.rpartition(".")
        owner = getattr(importlib.import_module(module), class_name)
    if attribute not in vars(owner):
        raise AttributeError(f"{path} defines no {attribute}")
    return owner, attribute


def _put(owner: Any, attribute: str, make: Callable[[Any], Any]) -> None:
    right = vars(owner)[attribute]
    if isinstance(owner, ModuleType):
        wrong = make(right)
        for module in list(sys.modules.values()):
            for key, value in list(vars(module).items()):
                if value is right:
                    setattr(module, key, wrong)
    elif isinstance(right, property):
        setattr(owner, attribute, property(make(right.fget)))
    elif isinstance(right, staticmethod | classmethod):
        setattr(owner, attribute, type(right)(make(right.__func__)))
    else:
        setattr(owner, attribute, make(right))
