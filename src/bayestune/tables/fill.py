"""`run_table` makes the missing cells of a table, one run after another; existing cells are left alone.

Any number of processes, also on several machines, can work on one grid. Each run has a lock, which a process holds
while it trains the run and makes its cells, and which the system releases if that process dies.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any

from tqdm.auto import tqdm

from bayestune.errors import ConfigError
from bayestune.experiment import Run, load_run, other_task, run
from bayestune.experiment.folder import EXPERIMENT, RESULT
from bayestune.experiment.record import rows_sha256
from bayestune.files import claimed, read_json, write_json
from bayestune.inference import Prediction
from bayestune.tables.cells import Cell, cell_path, cell_record
from bayestune.tables.grid import Grid, Planned, check_settings, counts, plan, scored_split, still_missing
from bayestune.tasks import AnyRow, TokenizedTask

PAUSE = 1.0
"""Seconds between checks of the runs of other processes, once nothing else is left to do."""


def run_table(grid: Grid, *, progress: bool = False) -> int:
    """Make the missing cells of `grid`, and return the number of those made here once all of them exist.

    After an interruption, call it again to resume. Several processes can share `grid.runs` and `grid.results`: runs
    that another process is making are left to it, and taken up here if it dies.

    Raises:
        ConfigError: as `plan`, or a folder of `runs` holds a run with different settings.
    """
    made, left = 0, list(plan(grid).runs)
    with tqdm(total=len(left), desc=grid.table, unit="run", disable=not progress) as bar:
        while left:
            taken = []
            for planned in left:
                bar.set_postfix_str(planned.output.as_posix()[-40:])
                count = make_run(grid, planned, progress=progress)
                if count is None:
                    taken.append(planned)
                else:
                    made += count
                    bar.update()
            if len(taken) == len(left):
                bar.set_postfix_str(f"waiting for {len(taken)} runs of other processes")
                time.sleep(PAUSE)
            left = taken
    return made


def make_run(grid: Grid, planned: Planned, *, progress: bool = False) -> int | None:
    """Make the missing cells of one run, and return their number.

    Returns:
        None if another process is making the run, or the run that it starts from.

    Raises:
        ConfigError: as `run_table`.
    """
    with claimed(planned.output, purpose="table") as ours:
        if not ours:
            return None
        missing = still_missing(grid, planned)
        if not missing:
            return 0
        if planned.start is not None:
            with claimed(planned.start.output, purpose="table") as free:
                if not free:
                    return None
                _trained(planned.start, grid.command, progress)
        made = 0
        for record in _cells(grid, dataclasses.replace(planned, eval_tasks=missing), progress):
            path = cell_path(grid.results, record)
            if not path.is_file():
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, record)
                made += 1
        return made


def _cells(grid: Grid, planned: Planned, progress: bool) -> Iterator[Cell]:
    """Train the run, or load it if it is finished, and evaluate it on every data set that lacks its cells."""
    trained, result, made = _trained(planned, grid.command, progress)
    own = trained.experiment.task
    known: dict[int, Prediction] = {}
    for name in dict.fromkeys([own, *planned.eval_tasks]):
        task = trained.task if name == own else other_task(trained, name)
        rows = task.rows(scored_split(grid, task))
        for prediction in _predictions(trained, task, rows, made if name == own else {}, progress):
            if name == own:
                known[prediction.draws] = prediction
            if name in planned.eval_tasks:
                yield cell_record(
                    prediction,
                    table=grid.table,
                    method=planned.line,
                    task=own,
                    seed=trained.experiment.seed,
                    known=known.get(prediction.draws),
                    steps=trained.experiment.steps,
                    train_rows=result["rows"]["train"],
                    seconds=result["seconds"],
                    experiment=trained.experiment.as_dict(),
                    sha256={**result["sha256"], "eval_rows": rows_sha256(rows)},
                    versions=result["versions"],
                    hardware=result["hardware"],
                    command=grid.command,
                )


def _trained(
    planned: Planned, command: Sequence[str], progress: bool
) -> tuple[Run, dict[str, Any], dict[int, Prediction]]:
    """Return the run, trained now unless it is finished; its record; and, if trained now, predictions by draws."""
    output, made = planned.output, {}
    if not (output / RESULT).is_file():
        stopped = (output / EXPERIMENT).is_file()
        found = run(planned.experiment, output, resume=stopped, command=command, progress=progress)
        made = {prediction.draws: prediction for prediction in found.predictions.values()}
    trained = load_run(output, data=planned.experiment.data)
    recorded, wanted = trained.experiment.as_dict(), planned.experiment.as_dict()
    check_settings(recorded, wanted, where=f"{output}: found a run with", advice="choose another --runs")
    result = read_json(output / RESULT, "the record of a run")
    if result["sha256"]["train_rows"] != rows_sha256(trained.task.rows(trained.experiment.train_split)):
        raise ConfigError(f"{output}: found a run trained on other rows than those of --data; choose another --runs.")
    return trained, result, made


def _predictions(
    trained: Run, task: TokenizedTask, rows: list[AnyRow], made: dict[int, Prediction], progress: bool
) -> Iterator[Prediction]:
    """Yield a prediction for each of `counts`. Those in `made` are reused; fewer draws are the first of the most."""
    numbers = sorted(counts(trained.experiment))
    for number in numbers:
        most = 0 if number == 0 else numbers[-1]
        if most not in made:
            made[most] = trained.predict(rows, draws=most, task=task, progress=progress)
        yield made[0] if number == 0 else made[most].first(number)
