"""`run_table`: every missing cell of a table, one run after the other; what is there already is left alone."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from bayestune.errors import ConfigError, MissingSplitError
from bayestune.experiment.backbone import Backbone, build_task, find_backbone
from bayestune.experiment.cells import Cell, cell_path, cell_record, portable, read_cells
from bayestune.experiment.folder import EXPERIMENT, RESULT
from bayestune.experiment.layouts import METHODS, layout
from bayestune.experiment.record import read_json, rows_sha256, write_json
from bayestune.experiment.run import Run, load_run, other_task, run
from bayestune.experiment.settings import POST_HOC, Experiment
from bayestune.inference import Prediction
from bayestune.tasks import AnyRow, Task

_FREE = ("data", "adapter", "target_modules", "checkpoint_steps")
"""Settings that say where things are, or that a plan does not know yet."""


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
    """One run of a grid: its settings, and the data sets of its cells that are missing."""

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
    runs, left_out = [], []
    trained_on = dict.fromkeys(column.task for column in layout(grid.table).columns)
    for seed in grid.seeds:
        for task in trained_on if grid.tasks is None else [name for name in trained_on if name in grid.tasks]:
            try:
                split = _eval_split(grid, backbone, task)
            except MissingSplitError as error:
                left_out.append(f"{task}: {error}")
                continue
            for method in sorted(grid.methods, key=lambda name: name in POST_HOC):
                if method == "temperature" and split != "test":
                    left_out.append(f"temperature on {task}: no rows beside those it is scored on")
                    continue
                planned = _planned(grid, there, backbone, method=method, task=task, seed=seed, split=split)
                if planned.eval_tasks:
                    runs.append(planned)
    if left_out and not runs and not there:
        raise ConfigError(f"{grid.table}: nothing can be trained; {left_out[0]}")
    cells = sum(len(planned.eval_tasks) * len(_counts(planned.experiment)) for planned in runs)
    return Plan(runs=tuple(runs), cells=cells, seconds=_expected(there, runs), left_out=tuple(dict.fromkeys(left_out)))


def _check_lines(grid: Grid) -> None:
    """Refuse methods and data sets that the table does not have."""
    for method in grid.methods:
        if method not in METHODS:
            raise ConfigError(f"--methods: found {method!r}, expected some of {', '.join(METHODS)}.")
    known = dict.fromkeys(column.task for column in layout(grid.table).columns)
    for task in grid.tasks or ():
        if task not in known:
            listed = ", ".join(known)
            raise ConfigError(
                f"--tasks: found {task!r}, expected some of {listed}, the training sets of {grid.table}."
            )


def _planned(
    grid: Grid, there: Sequence[Cell], backbone: Backbone, *, method: str, task: str, seed: int, split: str
) -> Planned:
    """One run of the grid; its `eval_tasks` are those without cells."""
    experiment, output = _experiment(grid, method, task, seed, split)
    start = None
    if method in POST_HOC:
        first, place = _experiment(grid, "mle", task, seed, split)
        start = Planned(experiment=first, output=place, eval_tasks=())
    asked = [column.eval_task for column in layout(grid.table).columns if column.task == task]
    missing = [name for name in asked if not _is_there(there, experiment, name, backbone)]
    return Planned(experiment=experiment, output=output, eval_tasks=tuple(missing), start=start)


def run_table(grid: Grid, *, progress: bool = False) -> int:
    """Make the missing cells of `grid`; the number made. A killed call goes on where it stopped.

    Raises:
        ConfigError: as `plan`, or a folder of `runs` holds a run with other settings.
    """
    made = 0
    with tqdm(plan(grid).runs, desc=grid.table, unit="run", disable=not progress) as bar:
        for planned in bar:
            bar.set_postfix_str(planned.output.as_posix()[-40:])
            for record in _cells(grid, planned, progress):
                path = cell_path(grid.results, record)
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, record)
                made += 1
    return made


def _experiment(grid: Grid, method: str, task: str, seed: int, split: str) -> tuple[Experiment, Path]:
    settings = {**grid.settings, "method": method, "task": task, "seed": seed, "eval_split": split}
    if method in POST_HOC:
        settings["adapter"] = _folder(grid, "mle", task, seed).as_posix()
    if method == "temperature":
        settings["temperature_split"] = "dev"
    return Experiment.from_dict(settings, where="table"), _folder(grid, method, task, seed)


def _folder(grid: Grid, method: str, task: str, seed: int) -> Path:
    return grid.runs / task / f"{method}-seed{seed}"


def _eval_split(grid: Grid, backbone: Backbone, name: str) -> str:
    """The split that a run is scored on.

    Raises:
        MissingSplitError: the data set has no such split, or is not there. DataError: a row cannot be used.
    """
    task = build_task(backbone, name, grid.settings.get("data"), 8)
    task.rows(str(grid.settings.get("train_split", "train")))
    return _scored_split(grid, task)


def _check_settings(grid: Grid) -> None:
    """Refuse settings that no run could have, or that the grid itself gives.

    Raises:
        ConfigError: naming the setting.
    """
    for name in ("method", "task", "seed", "adapter"):
        if name in grid.settings:
            raise ConfigError(f"table: found the setting {name!r}, which every run has its own of; leave it out.")
    Experiment.from_dict({"task": "any", **grid.settings}, where="table")


def _scored_split(grid: Grid, task: Task) -> str:
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


def _is_there(cells: Sequence[Cell], experiment: Experiment, eval_task: str, backbone: Backbone) -> bool:
    """Whether the cells of a run about `eval_task` are there, made with the settings of `experiment`."""
    name = {"method": experiment.method, "task": experiment.task, "seed": experiment.seed, "eval_task": eval_task}
    found = [cell for cell in cells if all(cell[key] == value for key, value in name.items())]
    wanted = experiment.resolved(backbone.family).as_dict()
    for cell in found:
        for key, value in cell["experiment"].items():
            known = key not in _FREE or (key == "target_modules" and wanted[key] is not None)
            if known and portable(wanted.get(key)) != value:
                raise ConfigError(
                    f"{experiment.method} on {experiment.task}, seed {experiment.seed}: the cells in results have "
                    f"{key}={value!r}, found {portable(wanted.get(key))!r}; use other --results, or the same settings."
                )
    return {cell["draws"] for cell in found} >= _counts(experiment)


def _counts(experiment: Experiment) -> set[int]:
    """The numbers of draws of the cells of a run about one data set: mean, half and all, or the only one there is."""
    match experiment.method:
        case "mle" | "map" | "temperature":
            return {0}
        case "ensemble":
            return {experiment.members}
        case "laplace" if experiment.laplace_predictive == "probit":
            return {1}
        case _:
            return {0, (experiment.draws + 1) // 2, experiment.draws}


def _expected(there: Sequence[Cell], runs: Sequence[Planned]) -> float | None:
    """Seconds that `runs` take: as long as recorded runs of the method on the data set, or of any method on any."""
    if not there:
        return None
    total = 0.0
    for planned in runs:
        wanted = planned.experiment
        alike = [c["seconds"] for c in there if (c["method"], c["task"]) == (wanted.method, wanted.task)]
        total += statistics.mean(alike or [cell["seconds"] for cell in there])
    return total


def _cells(grid: Grid, planned: Planned, progress: bool) -> Iterator[Cell]:
    """Train the run, or load it if it is finished, and ask it about every data set that lacks its cells."""
    if planned.start is not None:
        _trained(planned.start, grid.command, progress)
    trained, result = _trained(planned, grid.command, progress)
    experiment = trained.experiment
    assert experiment.eval_split is not None
    known: dict[int, Prediction] = {}
    own = [experiment.task] if any(name != experiment.task for name in planned.eval_tasks) else []
    for name in dict.fromkeys([*own, *planned.eval_tasks]):
        task, rows = _rows(grid, trained, name)
        for prediction in _predictions(trained, task, rows, progress):
            if name == experiment.task:
                known[prediction.draws] = prediction
            if name in planned.eval_tasks:
                yield cell_record(
                    prediction,
                    table=grid.table,
                    method=experiment.method,
                    task=experiment.task,
                    seed=experiment.seed,
                    steps=experiment.steps,
                    train_rows=result["rows"]["train"],
                    seconds=result["seconds"],
                    experiment=experiment.as_dict(),
                    sha256={**result["sha256"], "eval_rows": rows_sha256(rows)},
                    versions=result["versions"],
                    hardware=result["hardware"],
                    command=grid.command,
                    known=known.get(prediction.draws),
                )


def _trained(planned: Planned, command: Sequence[str], progress: bool) -> tuple[Run, dict[str, Any]]:
    """The run, trained now unless it is finished, and its record."""
    output = planned.output
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output.parent / f".{output.name}.lock", timeout=0):
            if not (output / RESULT).is_file():
                stopped = (output / EXPERIMENT).is_file()
                run(planned.experiment, output, resume=stopped, command=command, progress=progress)
    except Timeout:
        raise ConfigError(
            f"{output}: another process is making this run; wait for it, or give each its own --seeds, --tasks or "
            "--runs."
        ) from None
    trained = load_run(output, data=planned.experiment.data)
    wanted = planned.experiment.resolved(find_backbone(planned.experiment.model).family).as_dict()
    for name, value in trained.experiment.as_dict().items():
        if name not in _FREE and wanted.get(name) != value:
            raise ConfigError(
                f"{output}: found a run with {name}={value!r}, expected {wanted.get(name)!r}: a run with other "
                "settings; choose another --runs."
            )
    return trained, read_json(output / RESULT, "the record of a run")


def _rows(grid: Grid, trained: Run, name: str) -> tuple[Task, list[AnyRow]]:
    """The task `name` as asked of `trained`, and the rows it is scored on, checked."""
    experiment = trained.experiment
    if name == experiment.task:
        assert experiment.eval_split is not None
        return trained.task, trained.task.rows(experiment.eval_split)
    task = other_task(trained, name)
    rows = task.rows(_scored_split(grid, task))
    task.check(rows)
    return task, rows


def _predictions(trained: Run, task: Task, rows: list[AnyRow], progress: bool) -> Iterator[Prediction]:
    """One for each of `_counts`; fewer draws are the first of the most."""
    counts = sorted(_counts(trained.experiment))
    if counts[0] == 0:
        yield trained.predict(rows, draws=0, task=task, progress=progress)
    if counts[-1] > 0:
        whole = trained.predict(rows, draws=counts[-1], task=task, progress=progress)
        yield from (whole.first(count) for count in counts if count > 0)
