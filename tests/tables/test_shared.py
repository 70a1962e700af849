"""Processes that share one table: each cell is made once, a dead process' run is taken up, as in a serial table."""

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bayestune.errors import ConfigError
from bayestune.files import claimed
from bayestune.tables.cells import read_cells
from bayestune.tables.fill import make_run, run_table
from bayestune.tables.grid import Grid, plan
from crashing import ended, forked
from tables.grids import make, make_like, make_world, with_settings
from watching import watch

pytestmark = pytest.mark.filterwarnings("ignore::bayestune.errors.BayestuneWarning")  # so small a model knows little

CELLS = 2 * (1 + 3 + 1)
LIMIT = 200
"""Seconds after which a process that still waits is ended, and the test with it."""


def shared(world: Path, place: Path) -> Grid:
    settings = {"steps": 3, "checkpoint_steps": 1}
    return make(world, place, methods=("mle", "blob", "temperature"), seeds=(1,), settings=settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("shared"), others=("arc_easy",))


@pytest.fixture
def grid(world: Path, tmp_path: Path) -> Grid:
    return shared(world, tmp_path)


@pytest.fixture(scope="module")
def serial(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """Made by one process."""
    grid = shared(world, tmp_path_factory.mktemp("serial"))
    assert run_table(grid) == CELLS
    return grid


def cells(grid: Grid) -> list[dict[str, Any]]:
    """The cells, without the time that they took."""
    return [{**cell, "seconds": None} for cell in read_cells(grid.results / grid.table)]


def filling(grid: Grid, *, until: str | None = None) -> tuple[int, Iterator[Path]]:
    """A process that fills the table, and the paths of its renames; it stops before one to a path with a given end."""
    told, tell = os.pipe()

    def stop(path: str) -> None:
        if until is not None and path.endswith(until):
            os.kill(os.getpid(), signal.SIGSTOP)

    def fill() -> None:
        signal.alarm(LIMIT)
        watch(tell, before=stop)
        run_table(grid)

    child = forked(fill)
    os.close(tell)
    return child, paths(told)


def paths(told: int) -> Iterator[Path]:
    with os.fdopen(told) as lines:
        for line in lines:
            yield Path(line.rstrip("\n"))


def made(renames: list[Path]) -> list[Path]:
    """Those that are cells."""
    return [path for path in renames if path.suffix == ".json" and "table2" in path.parts]


def written(grid: Grid) -> dict[Path, tuple[int, int]]:
    """The cells' files, and what tells whether one is written again."""
    return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in grid.results.rglob("*.json")}


def checkpoints(renames: list[Path], run: str) -> list[str]:
    return [path.name for path in renames if path.parts[-3:-1] == (run, "checkpoints")]


def test_a_process_killed_in_the_middle_of_a_run_loses_nothing(grid: Grid, serial: Grid) -> None:
    """While it is held up, another makes what it can, and then waits for the run and for what starts from it."""
    first, before = filling(grid, until="mle-seed1/checkpoints/checkpoint-2")
    os.waitpid(first, os.WUNTRACED)
    second, renames = filling(grid)
    seen: list[Path] = []
    while len(made(seen)) < 2 * 3:
        seen.append(next(renames))
    assert {path.name.partition("_")[0] for path in made(seen)} == {"blob"}
    os.kill(first, signal.SIGKILL)
    assert ended(first) == -signal.SIGKILL and checkpoints([*before], "mle-seed1") == ["checkpoint-1"]
    seen += renames
    assert ended(second) == 0
    assert len(made(seen)) == len(set(made(seen))) == CELLS
    assert checkpoints(seen, "mle-seed1") == ["checkpoint-2", "checkpoint-3"]
    assert cells(grid) == cells(serial)


def test_processes_that_start_together_make_each_run_and_cell_once(grid: Grid, serial: Grid) -> None:
    processes = [filling(grid) for _ in range(2)]
    seen = [list(renames) for _, renames in processes]
    assert [ended(child) for child, _ in processes] == [0, 0]
    together = [path for paths in seen for path in paths]
    assert len(made(together)) == len(set(made(together))) == CELLS
    for run in ("mle-seed1", "blob-seed1"):
        assert checkpoints(together, run) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert cells(grid) == cells(serial)


def test_a_run_is_left_to_who_holds_it_or_its_start(grid: Grid) -> None:
    mle, _, temperature = plan(grid).runs
    with claimed(mle.output, purpose="table") as ours:
        assert ours
        assert make_run(grid, mle) is None and make_run(grid, temperature) is None
        assert not grid.results.exists() and not mle.output.exists()
    assert make_run(grid, temperature) == 2


def test_cells_that_another_process_made_since_the_plan_are_left_alone(serial: Grid) -> None:
    """And those of other settings are not taken for one's own."""
    files = written(serial)
    elsewhere = serial.results.with_name("none")
    for planned in plan(make_like(serial, results=elsewhere)).runs:
        assert make_run(serial, planned) == 0
    other = with_settings(serial, steps=4)
    with pytest.raises(ConfigError, match="the cells in results have steps=3, expected 4"):
        make_run(serial, plan(make_like(other, results=elsewhere)).runs[0])
    assert written(serial) == files


def test_a_data_set_that_was_scored_in_part_keeps_the_cells_it_has(serial: Grid, tmp_path: Path) -> None:
    grid = make_like(serial, results=tmp_path / "results")
    shutil.copytree(serial.results, grid.results)
    (grid.results / "table2" / "openbookqa" / "arc_easy" / "blob_n2_seed1.json").unlink()
    files = written(grid)
    assert run_table(grid) == 1 and cells(grid) == cells(serial)
    assert files.items() < written(grid).items()
