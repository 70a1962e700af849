"""`run_on_ray` makes the missing runs of a table as tasks on a Ray cluster.

All machines need the same folders under the same paths, and the same packages. A run is locked while a task makes it,
as in `run_table`, so no cell is made twice if Ray takes a task for dead and repeats it elsewhere.
"""

import contextlib
import os
import time
from typing import Any

from tqdm.auto import tqdm

from bayestune.errors import ConfigError, TrainingError, one_line
from bayestune.tables.fill import PAUSE, make_run
from bayestune.tables.grid import Grid, Planned, plan

try:
    import ray  # pyright: ignore[reportMissingImports]
    from ray.exceptions import RayError, RayTaskError  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as error:
    message = "--ray: found no package ray, expected it installed; run: pip install '.[cluster]'"
    raise ModuleNotFoundError(message, name=error.name) from error

RETRIES = 3
"""How often a task is started again after its worker or machine has died."""


def run_on_ray(grid: Grid, *, address: str, gpus: float = 0.0, progress: bool = False) -> None:
    """Make the missing cells of `grid` on a Ray cluster, one task per run.

    A run waits for the one that it starts from. If a task's worker or machine dies, Ray starts the task again, up to
    `RETRIES` times, and it resumes the run. If a run fails, the others are made before the error is raised.

    Args:
        grid: the runs of a table; relative paths are relative to the current folder on all machines.
        address: "local" starts Ray on this machine, "auto" uses the cluster that it is part of, and "ray://host:10001"
            a different one.
        gpus: GPUs per run, which can be a fraction; with 0, Ray reserves none, and runs share those of their machine.
        progress: show a bar on stderr.

    Raises:
        ConfigError: as `run_table`, or there is no cluster at `address`.
        TrainingError: as `run`, or the workers of a run died more than `RETRIES` times.
    """
    runs = plan(grid).runs
    try:
        cluster = ray.init(address)
    except (ConnectionError, ValueError) as error:
        raise ConfigError(f"--ray {address}: found no cluster, expected a running one; {one_line(error)}") from error
    with cluster, tqdm(total=len(runs), desc=grid.table, unit="run", disable=not progress) as bar:
        names = _start(grid, runs, gpus)
        left, failed = list(names), []
        while left:
            [ended], left = ray.wait(left)
            try:
                ray.get(ended)
            except RayTaskError as error:
                failed.append(error.cause)
            except RayError as error:
                message = f"{names[ended]}: this run, or the one that it starts from, died too often"
                failed.append(TrainingError(f"{message}: {one_line(error)}"))
            bar.set_postfix_str(names[ended])
            bar.update()
    if failed:
        raise failed[0]


def _start(grid: Grid, runs: tuple[Planned, ...], gpus: float) -> dict[Any, str]:
    """Start a task for each run and return the tasks' names; a task waits for that of the run it starts from."""
    task = ray.remote(num_gpus=gpus, max_retries=RETRIES)(_make)
    names, by_run = {}, {}
    for planned in runs:
        name = f"{grid.table}/{planned.experiment.task}/{planned.output.name}"
        start = planned.start and by_run.get(planned.start.output)
        made = task.options(name=name).remote(grid, planned, os.getcwd(), start)
        names[made], by_run[planned.output] = name, made
    return names


def _make(grid: Grid, planned: Planned, folder: str, start: None) -> None:
    """Make the cells of one run on a worker; Ray passes `start`, what its task returned, once that has ended."""
    with contextlib.chdir(folder):
        while make_run(grid, planned) is None:
            time.sleep(PAUSE)
