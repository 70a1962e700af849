"""The tables of the paper: their data sets, and the names and order of methods."""

from collections.abc import Iterable
from dataclasses import dataclass

from bayestune.errors import ConfigError
from bayestune.methods import METHODS, Line, Method
from bayestune.tables.fields import Cell
from bayestune.tasks.rows import shown


@dataclass(frozen=True, kw_only=True)
class Column:
    """A data set of a table: trained on `task`, evaluated on `eval_task`."""

    label: str
    task: str
    eval_task: str

    def has(self, cell: Cell) -> bool:
        """Return whether the cell belongs to this column."""
        return (cell["task"], cell["eval_task"]) == (self.task, self.eval_task)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A table: its columns, from left to right, and whether it scores out-of-distribution detection."""

    title: str
    columns: tuple[Column, ...]
    detection: bool = False

    def present(self, cells: Iterable[Cell]) -> list[Column]:
        """Return the columns that have cells."""
        places = {(cell["task"], cell["eval_task"]) for cell in cells}
        return [column for column in self.columns if (column.task, column.eval_task) in places]


def _columns(trained_on: str | None = None, **labels: str) -> tuple[Column, ...]:
    """Return one column per evaluated data set, trained on itself unless `trained_on` is given."""
    return tuple(Column(label=label, task=trained_on or name, eval_task=name) for name, label in labels.items())


TABLES = {
    "table1": Layout(
        title="Table 1: in distribution",
        columns=_columns(
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
        columns=_columns(
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
        columns=_columns(rte="RTE", mrpc="MRPC", wic="WiC", cola="CoLA", boolq="BoolQ"),
    ),
}


def lines() -> dict[str, tuple[type[Method], Line]]:
    """Return method and line by the name that cells have in `method`, in the order of a table."""
    return {name: (method, line) for method in METHODS.values() for name, line in method.lines().items()}


def layout(name: str) -> Layout:
    """Return the table `name`; a ConfigError lists the tables that there are."""
    if name not in TABLES:
        raise ConfigError(f"table: found {shown(name)}, expected one of {', '.join(TABLES)}.")
    return TABLES[name]


def line_keys(cells: Iterable[Cell]) -> list[tuple[str, int]]:
    """Return (method, draws) of the cells in the order of the lines of a table."""
    order = {line: i for i, line in enumerate(lines())}
    keys = {(cell["method"], cell["draws"]) for cell in cells}
    return sorted(keys, key=lambda key: (order.get(key[0], len(order)), *key))


def line_label(method: str, draws: int) -> str:
    """Return the label of a line: the method and its number of draws."""
    if method not in lines():
        return f"{method}, N = {draws}"
    found, line = lines()[method]
    return line.label if found.has_no_draws and draws == 0 else f"{line.label}, N = {draws}"
