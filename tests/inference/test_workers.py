"""Processes that are forked, or spawned, after the library was used: the same seeds give the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import bayestune

SCRIPT = Path(__file__).parent / "workers.py"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By process: "here", "fork", "spawn"."""
    paths = [str(Path(bayestune.__file__).parent.parent), str(SCRIPT.parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path_factory.mktemp("workers"))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.property("K04")
def test_forked_and_spawned_workers_give_the_same_answers(found: dict[str, Any]) -> None:
    assert found["fork"]["answer"] == found["spawn"]["answer"] == found["here"]["answer"]


@pytest.mark.property("K06")
def test_training_after_a_fork_ends_with_the_same_weights(found: dict[str, Any]) -> None:
    assert found["fork"]["trained"] == found["spawn"]["trained"] == found["here"]["trained"]
