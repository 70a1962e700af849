"""The tables of the paper: their data sets, and the names and order of methods."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bayestune.errors import ConfigError
from bayestune.methods import METHODS, Line, Method
from bayestune.report.views import shown
from bayestune.tables.fields import Cell


@dataclass(frozen=True, kw_only=True)
class Column:
    """A data set of a table: trained on `task`, asked about `eval_task`."""

    label: str
    task: str
    eval_task: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a table has: its columns, from left to right, and whether other data is to be detected."""

    title: str
    columns: tuple[Column, ...]
    detection: bool = False


def _own(**labels: str) -> tuple[Column, ...]:
    return tuple(Column(label=label, task=task, eval_task=task) for task, label in labels.items())


def _asked(task: str, **labels: str) -> tuple[Column, ...]:
    return tuple(Column(label=label, task=task, eval_task=other) for other, label in labels.items())


TABLES: Mapping[str, Layout] = MappingProxyType(
    {
        "table1": Layout(
            title="Table 1: in distribution",
            columns=_own(
                winogrande_s="WG-S",
                arc_challenge="ARC-C",
                arc_easy="ARC-E",
                winogrande_m="WG-M",
                openbookqa="OBQA",
                boolq="BoolQ",
            ),
        ),
        "table2": Layout(
            title="Table 2: trained on OBQA, evaluated on other data sets",
            columns=_asked(
                "openbookqa",
                openbookqa="OBQA",
                arc_challenge="ARC-C",
                arc_easy="ARC-E",
                mmlu_college_chemistry="Chem",
                mmlu_college_physics="Phy",
            ),
            detection=True,
        ),
        "roberta": Layout(
            title="Encoder models: classification",
            columns=_own(rte="RTE", mrpc="MRPC", wic="WiC", cola="CoLA", boolq="BoolQ"),
        ),
    }
)


def lines() -> dict[str, tuple[type[Method], Line]]:
    """The lines of a table, in order, by the name that cells have in `method`: the method and its line."""
    return {name: (method, line) for method in METHODS.values() for name, line in method.lines().items()}


def layout(name: str) -> Layout:
    """The table `name`.

    Raises:
        ConfigError: there is no such table.
    """
    if name not in TABLES:
        raise ConfigError(f"table: found {shown(name)!r}, expected one of {', '.join(TABLES)}.")
    return TABLES[name]


def check_columns(cells: Iterable[Cell], name: str) -> None:
    """Refuse a cell that the table `name` has no column for.

    Raises:
        ConfigError: naming the data set.
    """
    columns = layout(name).columns
    for cell in cells:
        if (cell["task"], cell["eval_task"]) not in {(column.task, column.eval_task) for column in columns}:
            known = ", ".join(column.eval_task for column in columns)
            asked = f"{cell['task']!r} and asked about {cell['eval_task']!r}"
            raise ConfigError(f"{name}: found a cell trained on {asked}, expected one of {known}.")


def line_keys(cells: Iterable[Cell]) -> list[tuple[str, int]]:
    """(method, draws) of the cells in the order of the lines of a table."""
    order = {line: i for i, line in enumerate(lines())}
    keys = {(cell["method"], cell["draws"]) for cell in cells}
    return sorted(keys, key=lambda key: (order.get(key[0], len(order)), *key))


def line_label(method: str, draws: int) -> str:
    """What a line is called: the method, and its number of draws."""
    if method not in lines():
        return f"{method}, N = {draws}"
    found, line = lines()[method]
    return line.label if found.has_no_draws and draws == 0 else f"{line.label}, N = {draws}"
