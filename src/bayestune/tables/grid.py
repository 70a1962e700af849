"""`plan`: the runs that a table of methods, data sets and seeds still lacks."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayestune.errors import ConfigError, MissingSplitError
from bayestune.experiment.backbone import Backbone, build_task, find_backbone
from bayestune.experiment.settings import Experiment
from bayestune.methods import Method
from bayestune.tables.cells import Cell, portable, read_cells
from bayestune.tables.layouts import layout, lines
from bayestune.tasks import TokenizedTask

_FREE = ("data", "adapter", "target_modules", "checkpoint_steps")
"""Settings that say where things are, or that a plan does not know yet."""
_HELD_OUT = "temperature_split"


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of a table.

    Attributes:
        table: its name. seeds, methods: its lines. tasks: training sets; None for all of the table.
        settings: of `Experiment`, model included, the same in every run; `eval_split` is by default "test" where there
            is one, and the usual split elsewhere. A method that fits a temperature does so on "dev".
        results: folder of the cells. runs: folder of the runs: posteriors, which methods that start from a finished
            adapter use, and which several tables share.
        command: recorded in every cell.
    """

    table: str
    seeds: Sequence[int]
    methods: Sequence[str]
    tasks: Sequence[str] | None
    settings: Mapping[str, Any]
    results: Path
    runs: Path
    command: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One run of a grid: its line and settings, and the data sets of its cells that are missing."""

    line: str
    experiment: Experiment
    output: Path
    eval_tasks: tuple[str, ...]
    start: "Planned | None" = None
    """The run whose adapter this one starts from: made first if it is not there."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a grid still has to do. `cells` are missing; `seconds` is what they take, None if nothing tells."""

    runs: tuple[Planned, ...]
    cells: int
    seconds: float | None
    left_out: tuple[str, ...]


def plan(grid: Grid) -> Plan:
    """The runs of `grid` whose cells are not all there, in the order they are made: MLE first, others build on it.

    Raises:
        ConfigError: unknown table, method, data set or setting; cells that are there were made with other settings.
    """
    _check_lines(grid)
    _check_settings(grid)
    backbone = find_backbone(str(grid.settings["model"]))
    there = _cells_there(grid)
    usable, left_out = _usable(grid, backbone)
    if not usable:
        raise ConfigError(f"{grid.table}: nothing can be trained; {left_out[0]}")
    runs = []
    for seed in grid.seeds:
        for task, (split, asked) in usable.items():
            for line in sorted(grid.methods, key=lambda name: _method(name).start is not None):
                if _HELD_OUT in _method(line).needs and split != "test":
                    left_out.append(f"{line} on {task}: no rows beside those it is scored on")
                    continue
                planned = _planned(grid, line, task, seed, split)
                missing = tuple(name for name in asked if not _is_there(there, planned, name, backbone))
                if missing:
                    first = _method(line).start
                    start = None if first is None else _planned(grid, first.name, task, seed, split)
                    runs.append(dataclasses.replace(planned, eval_tasks=missing, start=start))
    cells = sum(len(planned.eval_tasks) * len(counts(planned.experiment)) for planned in runs)
    return Plan(runs=tuple(runs), cells=cells, seconds=_expected(there, runs), left_out=tuple(dict.fromkeys(left_out)))


def _usable(grid: Grid, backbone: Backbone) -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """By training set the split that it is scored on and the data sets that are asked; and what is not there.

    Raises:
        DataError: a row of any of these splits cannot be used.
    """
    usable: dict[str, tuple[str, list[str]]] = {}
    left_out: list[str] = []
    checked: dict[str, str] = {}

    def scored(name: str) -> str:
        if name not in checked:
            task = _task(grid, backbone, name)
            split = scored_split(grid, task)
            task.check(task.rows(split))
            checked[name] = split
        return checked[name]

    for column in layout(grid.table).columns:
        if grid.tasks is not None and column.task not in grid.tasks:
            continue
        try:
            if column.task not in usable:
                own = _task(grid, backbone, column.task)
                own.check(own.rows(str(grid.settings.get("train_split", "train"))))
            split = scored(column.task)
            scored(column.eval_task)
        except MissingSplitError as error:
            left_out.append(f"{column.eval_task}: {error}")
            continue
        usable.setdefault(column.task, (split, []))[1].append(column.eval_task)
    return usable, left_out


def _task(grid: Grid, backbone: Backbone, name: str) -> TokenizedTask:
    experiment = Experiment.from_dict({"task": name, **grid.settings}, where="table").resolved(backbone.family)
    assert experiment.max_tokens is not None
    return build_task(backbone, name, experiment.data, experiment.max_tokens)


def _check_lines(grid: Grid) -> None:
    """Refuse methods and data sets that the table does not have."""
    for method in grid.methods:
        if method not in lines():
            raise ConfigError(f"--methods: found {method!r}, expected some of {', '.join(lines())}.")
    known = dict.fromkeys(column.task for column in layout(grid.table).columns)
    for task in grid.tasks or ():
        if task not in known:
            listed = ", ".join(known)
            raise ConfigError(
                f"--tasks: found {task!r}, expected some of {listed}, the training sets of {grid.table}."
            )


def _planned(grid: Grid, line: str, task: str, seed: int, split: str) -> Planned:
    """The run of a line; the cells that it is to make are not looked for yet."""
    method, found = lines()[line]
    settings = {**grid.settings, "method": method.name, "task": task, "seed": seed, "eval_split": split}
    if method.start is not None:
        settings["adapter"] = _folder(grid, method.start.name, task, seed).as_posix()
    if _HELD_OUT in method.needs:
        settings[_HELD_OUT] = "dev"
    experiment = Experiment.from_dict({**settings, **found.settings}, where="table")
    return Planned(line=line, experiment=experiment, output=_folder(grid, line, task, seed), eval_tasks=())


def _method(line: str) -> type[Method]:
    return lines()[line][0]


def _folder(grid: Grid, line: str, task: str, seed: int) -> Path:
    return grid.runs / task / f"{line}-seed{seed}"


def _check_settings(grid: Grid) -> None:
    """Refuse settings that no run could have, or that the grid itself gives.

    Raises:
        ConfigError: naming the setting.
    """
    for name in ("method", "task", "seed", "adapter"):
        if name in grid.settings:
            raise ConfigError(f"table: found the setting {name!r}, which every run has its own of; leave it out.")
    data = Experiment.from_dict({"task": "any", **grid.settings}, where="table").data
    if data is not None and not Path(data).is_dir():
        raise ConfigError(f"--data {data}: no such folder, expected one with the data sets of {grid.table}.")


def scored_split(grid: Grid, task: TokenizedTask) -> str:
    """`eval_split` where it is set, the test split where there is one, or the usual split."""
    if grid.settings.get("eval_split"):
        return str(grid.settings["eval_split"])
    try:
        task.rows("test")
    except MissingSplitError:
        return task.spec.evaluation
    return "test"


def _cells_there(grid: Grid) -> list[Cell]:
    folder = grid.results / grid.table
    return read_cells(folder) if folder.is_dir() and any(folder.rglob("*.json")) else []


def _is_there(cells: Sequence[Cell], planned: Planned, eval_task: str, backbone: Backbone) -> bool:
    """Whether the cells of a run about `eval_task` are there, made with its settings."""
    experiment = planned.experiment
    name = {"method": planned.line, "task": experiment.task, "seed": experiment.seed, "eval_task": eval_task}
    found = [cell for cell in cells if all(cell[key] == value for key, value in name.items())]
    wanted = experiment.resolved(backbone.family).as_dict()
    for cell in found:
        for key, value in cell["experiment"].items():
            if counts_for(key, wanted) and portable(wanted.get(key)) != value:
                raise ConfigError(
                    f"{planned.line} on {experiment.task}, seed {experiment.seed}: the cells in results have "
                    f"{key}={value!r}, found {portable(wanted.get(key))!r}; use other --results, or the same settings."
                )
    return {cell["draws"] for cell in found} >= counts(experiment)


def counts(experiment: Experiment) -> set[int]:
    """The numbers of draws of the cells of a run about one data set: mean, half and all, or the only one there is."""
    found = experiment.method.draw_counts(experiment.draws)
    return set(found) if len(found) == 1 else {*found, (found[-1] + 1) // 2}


def _expected(there: Sequence[Cell], runs: Sequence[Planned]) -> float | None:
    """Seconds that `runs` take: as long as recorded runs of the method on the data set, or of any method on any."""
    if not there:
        return None
    total = 0.0
    for planned in runs:
        wanted = planned.experiment
        alike = [c["seconds"] for c in there if (c["method"], c["task"]) == (planned.line, wanted.task)]
        total += statistics.mean(alike or [cell["seconds"] for cell in there])
    return total


def counts_for(name: str, wanted: Mapping[str, Any]) -> bool:
    """Whether the setting `name` of what is there must be that of `wanted`."""
    if name not in wanted:  # of another method
        return False
    return name not in _FREE or (name == "target_modules" and wanted[name] is not None)
