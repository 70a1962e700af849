"""Processes that are killed while they save, or that save to one folder: what is found is one whole state."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import bayestune

SCRIPT = Path(__file__).parent / "crashing.py"


def crash(folder: Path, seed: int, *what: str) -> dict[str, Any]:
    """What the script found (see there)."""
    paths = [str(Path(bayestune.__file__).parent.parent), str(SCRIPT.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder), str(seed), *what]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return crash(tmp_path_factory.mktemp("few"), 1, "next", "kills=5", "writers=20")


def check_calls(outcomes: list[list[int]], old: list[int], new: list[int]) -> None:
    """The old state up to some call, the new one from there on, and never anything else."""
    assert [o for o in outcomes if o not in (old, new)] == []
    changes = [pair for pair in zip(outcomes, outcomes[1:], strict=False) if pair[0] != pair[1]]
    assert changes == [(old, new)] and len(outcomes) > 30


@pytest.mark.property("P02")
def test_a_checkpoint_killed_at_any_call_leaves_the_old_one_or_the_new(
    few: dict[str, Any], figure: Callable[..., None]
) -> None:
    check_calls(few["next"], [1, 1], [2, 2])
    figure("calls of a checkpoint's save at which a kill was survived", len(few["next"]), at_least=30)


@pytest.mark.property("P03")
def test_random_kills_leave_the_save_before_or_the_one_they_hit(few: dict[str, Any]) -> None:
    assert few["kills=5"] == {"checkpoints": 5, "posteriors": 5}


@pytest.mark.property("P11")
def test_of_two_writers_one_is_told_and_no_reader_sees_a_mix(few: dict[str, Any]) -> None:
    check_writers(few["writers=20"], 20)


def check_writers(tally: dict[str, int], count: int) -> None:
    assert tally["saved"] + tally["told"] == 2 * count and tally["saved"] > 0 and tally["read"] > 0
    assert tally["first come"] == count // 10


@pytest.mark.property("P02")
@pytest.mark.nightly
def test_a_save_over_an_older_one_killed_at_any_call(tmp_path: Path) -> None:
    found = crash(tmp_path, 1, "same", "posterior")
    check_calls(found["same"], [1, 1], [1, 2])
    check_calls(found["posterior"], [0, 1], [0, 2])


@pytest.mark.property("P03")
@pytest.mark.nightly
def test_two_hundred_random_kills(tmp_path: Path, nightly_seed: int, figure: Callable[..., None]) -> None:
    for name, survived in crash(tmp_path, nightly_seed, "kills=200")["kills=200"].items():
        figure(f"random kills survived by {name}, of 200", survived, at_least=200)


@pytest.mark.property("P11")
@pytest.mark.nightly
def test_a_thousand_saves_of_two_writers(tmp_path: Path, figure: Callable[..., None]) -> None:
    tally = crash(tmp_path, 1, "writers=1000")["writers=1000"]
    check_writers(tally, 1000)
    figure("reads of one whole posterior while two writers replace it", tally["read"], at_least=1)
    figure("new folders of which two writers made one, of 100", tally["first come"], at_least=100)


@pytest.mark.property("K05")
@pytest.mark.nightly
def test_training_killed_until_it_is_done_ends_as_the_undisturbed_run(
    tmp_path: Path, nightly_seed: int, figure: Callable[..., None]
) -> None:
    found = crash(tmp_path, nightly_seed, "training")["training"]
    figure("kills before the run was done", found["kills"], at_least=3)
    figure("files of the last checkpoint unlike those of the undisturbed run", len(found["other"]), at_most=0)
