"""`plan`: the runs that a table of methods, data sets and seeds still lacks."""

import dataclasses
import functools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayestune.errors import ConfigError, MissingSplitError
from bayestune.experiment.backbone import Backbone, build_task, find_backbone
from bayestune.experiment.rows import HELD_OUT
from bayestune.experiment.settings import REPORTING, Experiment
from bayestune.files import read_json
from bayestune.settings import LARGEST_WHOLE
from bayestune.tables.cells import Cell, cell_path, portable, read_cells
from bayestune.tables.layouts import layout, lines
from bayestune.tasks import TokenizedTask

_FREE = ("data", "adapter", "target_modules", "labels", "checkpoint_steps", "activation_checkpointing", *REPORTING)
"""Settings that say where things are, that a plan does not know yet, or that do not change what is trained."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of a table.

    Attributes:
        table: name of the table.
        seeds: seeds of the runs.
        methods: names of lines of the table.
        tasks: training sets; None for all of the table.
        settings: settings of `Experiment` that all runs share, model included. `eval_split` defaults to "test" where
            there is one, and to the usual split elsewhere. Methods that fit a temperature do so on "dev".
        results: folder of the cells.
        runs: folder of the runs, which several tables can share.
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
    """One run of a grid: its line, its settings, its folder, and the data sets of its missing cells.

    If the run starts from the adapter of a different run, `start` is that run. It is trained first if it is missing.
    """

    line: str
    experiment: Experiment
    output: Path
    start: "Planned | None"
    eval_tasks: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The missing runs, the number of their cells, the expected seconds (None if unknown), and what is left out."""

    runs: tuple[Planned, ...]
    cells: int
    seconds: float | None
    left_out: tuple[str, ...]


def plan(grid: Grid) -> Plan:
    """Return the runs of `grid` with missing cells, in order: MLE first, since other methods start from it.

    Raises:
        ConfigError: a table, method, data set or setting is unknown, or existing cells have different settings.
        DataError: a row of a split that is needed cannot be used.
    """
    _check(grid)
    backbone = find_backbone(str(grid.settings["model"]))
    folder = grid.results / grid.table
    there = read_cells(folder) if folder.is_dir() and any(folder.rglob("*.json")) else []
    usable, left_out = _usable(grid, backbone)
    if not usable:
        raise ConfigError(f"{grid.table}: nothing can be trained; {left_out[0]}")
    runs = []
    for seed in grid.seeds:
        for task, (split, asked) in usable.items():
            for line in sorted(grid.methods, key=lambda name: lines()[name][0].start is not None):
                if HELD_OUT in lines()[line][0].needs and split != "test":
                    left_out.append(f"{line} on {task}: no rows other than those it is scored on")
                    continue
                planned = _planned(grid, backbone, line, task, seed, split)
                missing = tuple(name for name in asked if not _is_there(there, planned, name))
                if missing:
                    runs.append(dataclasses.replace(planned, eval_tasks=missing))
    cells = sum(len(planned.eval_tasks) * len(counts(planned.experiment)) for planned in runs)
    return Plan(runs=tuple(runs), cells=cells, seconds=_expected(there, runs), left_out=tuple(dict.fromkeys(left_out)))


def _check(grid: Grid) -> None:
    """Raise a ConfigError for lines that the table does not have, and settings that its runs cannot share."""
    known = dict.fromkeys(column.task for column in layout(grid.table).columns)
    for method in grid.methods:
        if method not in lines():
            raise ConfigError(f"--methods: found {method!r}, expected some of {', '.join(lines())}.")
    for task in grid.tasks or ():
        if task not in known:
            raise ConfigError(
                f"--tasks: found {task!r}, expected some of {', '.join(known)}, the training sets of {grid.table}."
            )
    for name in ("method", "task", "seed", "adapter"):
        if name in grid.settings:
            raise ConfigError(f"table: found the setting {name!r}, which differs from run to run; leave it out.")
    for name in ("eval", "eval_rows"):
        if name in grid.settings:
            raise ConfigError(f"table: found the setting {name!r}, expected none: a table scores all rows.")
    data = _experiment(grid, task="any").data
    if data is not None and not Path(data).is_dir():
        raise ConfigError(f"--data {data}: no such folder, expected one with the data sets of {grid.table}.")


def _experiment(grid: Grid, **settings: Any) -> Experiment:
    return Experiment.from_dict({**grid.settings, **settings}, where="table")


def _usable(grid: Grid, backbone: Backbone) -> tuple[dict[str, tuple[str, list[str]]], list[str]]:
    """Return, by training set, the scored split and the data sets to evaluate; and what is left out and why."""
    usable: dict[str, tuple[str, list[str]]] = {}
    left_out: list[str] = []

    @functools.cache
    def checked(name: str, *, train: bool) -> str:
        """Check the rows of the training or the scored split of a data set, and return the split."""
        experiment = _experiment(grid, task=name).resolved(backbone.family)
        assert experiment.max_tokens is not None
        task = build_task(backbone, name, experiment.data, experiment.max_tokens, prompt=experiment.asked_prompt())
        split = experiment.train_split if train else scored_split(grid, task)
        task.check(task.rows(split))
        return split

    for column in layout(grid.table).columns:
        if grid.tasks is not None and column.task not in grid.tasks:
            continue
        try:
            checked(column.task, train=True)
            split = checked(column.task, train=False)
            checked(column.eval_task, train=False)
        except MissingSplitError as error:
            left_out.append(f"{column.eval_task}: {error}")
            continue
        usable.setdefault(column.task, (split, []))[1].append(column.eval_task)
    return usable, left_out


def _planned(grid: Grid, backbone: Backbone, line: str, task: str, seed: int, split: str) -> Planned:
    """Return the run of a line, without the cells that it lacks."""
    method, found = lines()[line]
    start = None if method.start is None else _planned(grid, backbone, method.start.name, task, seed, split)
    settings: dict[str, Any] = {"method": method.name, "task": task, "seed": seed, "eval_split": split}
    if start is not None:
        settings["adapter"] = start.output.as_posix()
    if HELD_OUT in method.needs:
        settings[HELD_OUT] = "dev"
    experiment = _experiment(grid, **settings, **found.settings).resolved(backbone.family)
    if experiment.method.held_out(LARGEST_WHOLE):
        experiment = experiment.replace(method=experiment.method.replace(**method.in_tables))
    return Planned(line=line, experiment=experiment, output=grid.runs / task / f"{line}-seed{seed}", start=start)


def scored_split(grid: Grid, task: TokenizedTask) -> str:
    """Return `eval_split` if it is set, otherwise the test split if there is one, otherwise the usual split."""
    if grid.settings.get("eval_split"):
        return str(grid.settings["eval_split"])
    try:
        task.rows("test")
    except MissingSplitError:
        return task.spec.evaluation
    return "test"


def still_missing(grid: Grid, planned: Planned) -> tuple[str, ...]:
    """Return the data sets of a planned run whose cells do not exist yet; other processes may have made some.

    Raises:
        ConfigError: existing cells have different settings.
    """

    def found(eval_task: str) -> list[Cell]:
        name = {"table": grid.table, **_name(planned, eval_task)}
        paths = [cell_path(grid.results, {**name, "draws": draws}) for draws in counts(planned.experiment)]
        return [read_json(path, "a cell of a table") for path in paths if path.is_file()]

    return tuple(name for name in planned.eval_tasks if not _is_there(found(name), planned, name))


def _name(planned: Planned, eval_task: str) -> dict[str, Any]:
    """Return what names the cells of a run on `eval_task`, except for the table and the draws."""
    experiment = planned.experiment
    return {"method": planned.line, "task": experiment.task, "seed": experiment.seed, "eval_task": eval_task}


def _is_there(cells: Sequence[Cell], planned: Planned, eval_task: str) -> bool:
    """Return whether the cells of a run on `eval_task` exist; raise a ConfigError if their settings differ."""
    experiment, name = planned.experiment, _name(planned, eval_task)
    found = [cell for cell in cells if all(cell[key] == value for key, value in name.items())]
    wanted = {key: portable(value) for key, value in experiment.as_dict().items()}
    where = f"{planned.line} on {experiment.task}, seed {experiment.seed}: the cells in results have"
    for cell in found:
        check_settings(cell["experiment"], wanted, where=where, advice="use other --results, or the same settings")
    return {cell["draws"] for cell in found} >= counts(experiment)


def check_settings(recorded: Mapping[str, Any], wanted: Mapping[str, Any], *, where: str, advice: str) -> None:
    """Raise a ConfigError if a setting of a recorded run that matters here is not as wanted."""
    for name, value in recorded.items():
        free = name in _FREE and not (name == "target_modules" and wanted[name] is not None)
        if name in wanted and not free and wanted[name] != value:
            raise ConfigError(f"{where} {name}={value!r}, expected {wanted[name]!r}; {advice}.")


def counts(experiment: Experiment) -> set[int]:
    """Return the numbers of draws of the cells of a run: mean, half and all, or the only one there is."""
    found = experiment.method.draw_counts(experiment.draws)
    return set(found) if len(found) == 1 else {*found, (found[-1] + 1) // 2}


def _expected(there: Sequence[Cell], runs: Sequence[Planned]) -> float | None:
    """Return the seconds that `runs` take: the mean of recorded runs of the line on the task, or else of all."""
    if not there:
        return None
    total = 0.0
    for planned in runs:
        line = (planned.line, planned.experiment.task)
        alike = [cell["seconds"] for cell in there if (cell["method"], cell["task"]) == line]
        total += statistics.mean(alike or [cell["seconds"] for cell in there])
    return total
