"""`run_table`: every missing cell of a table, one run after the other; what is there already is left alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from bayestune.errors import ConfigError
from bayestune.experiment import Run, load_run, other_task, run
from bayestune.experiment.backbone import find_backbone
from bayestune.experiment.folder import EXPERIMENT, RESULT
from bayestune.experiment.record import rows_sha256
from bayestune.files import alone, read_json, write_json
from bayestune.inference import Prediction
from bayestune.tables.cells import Cell, cell_path, cell_record
from bayestune.tables.grid import Grid, Planned, counts, counts_for, plan, scored_split
from bayestune.tasks import AnyRow, TokenizedTask


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


def _cells(grid: Grid, planned: Planned, progress: bool) -> Iterator[Cell]:
    """Train the run, or load it if it is finished, and ask it about every data set that lacks its cells."""
    if planned.start is not None:
        _trained(planned.start, grid.command, progress)
    trained, result, just_made = _trained(planned, grid.command, progress)
    experiment = trained.experiment
    assert experiment.eval_split is not None
    known: dict[int, Prediction] = {}
    own = [experiment.task] if any(name != experiment.task for name in planned.eval_tasks) else []
    for name in dict.fromkeys([*own, *planned.eval_tasks]):
        task, rows = _rows(grid, trained, name)
        made = just_made if name == experiment.task else {}
        for prediction in _predictions(trained, task, rows, made, progress):
            if name == experiment.task:
                known[prediction.draws] = prediction
            if name in planned.eval_tasks:
                yield cell_record(
                    prediction,
                    table=grid.table,
                    method=planned.line,
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


def _trained(
    planned: Planned, command: Sequence[str], progress: bool
) -> tuple[Run, dict[str, Any], dict[int, Prediction]]:
    """The run, trained now unless it is finished; its record; and, trained now, its answers by number of draws."""
    output, made = planned.output, {}
    output.parent.mkdir(parents=True, exist_ok=True)
    advice = "wait for it, or give each its own --seeds, --tasks or --runs."
    with alone(output, purpose=".table", advice=advice):
        if not (output / RESULT).is_file():
            stopped = (output / EXPERIMENT).is_file()
            found = run(planned.experiment, output, resume=stopped, command=command, progress=progress)
            made = {prediction.draws: prediction for prediction in found.predictions.values()}
    trained = load_run(output, data=planned.experiment.data)
    wanted = planned.experiment.resolved(find_backbone(planned.experiment.model).family).as_dict()
    for name, value in trained.experiment.as_dict().items():
        if counts_for(name, wanted) and wanted.get(name) != value:
            raise ConfigError(
                f"{output}: found a run with {name}={value!r}, expected {wanted.get(name)!r}: a run with other "
                "settings; choose another --runs."
            )
    result = read_json(output / RESULT, "the record of a run")
    if result["sha256"]["train_rows"] != rows_sha256(trained.task.rows(trained.experiment.train_split)):
        raise ConfigError(f"{output}: found a run trained on other rows than those of --data; choose another --runs.")
    return trained, result, made


def _rows(grid: Grid, trained: Run, name: str) -> tuple[TokenizedTask, list[AnyRow]]:
    """The task `name` as asked of `trained`, and the rows it is scored on, checked."""
    experiment = trained.experiment
    if name == experiment.task:
        assert experiment.eval_split is not None
        return trained.task, trained.task.rows(experiment.eval_split)
    task = other_task(trained, name)
    rows = task.rows(scored_split(grid, task))
    task.check(rows)
    return task, rows


def _predictions(
    trained: Run, task: TokenizedTask, rows: list[AnyRow], made: Mapping[int, Prediction], progress: bool
) -> Iterator[Prediction]:
    """One for each of `counts`, from those `made` where they are; fewer draws are the first of the most."""
    numbers = sorted(counts(trained.experiment))
    wanted = {0, numbers[-1]} & set(numbers)
    found = {
        n: made[n] if n in made else trained.predict(rows, draws=n, task=task, progress=progress)
        for n in sorted(wanted)
    }
    for number in numbers:
        yield found[0] if number == 0 else found[numbers[-1]].first(number)
