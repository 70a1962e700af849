"""A run that stopped anywhere ends where the uninterrupted run ends: weights, optimiser, random states and losses."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import bayestune

SCRIPT = Path(__file__).parent / "resuming.py"


@pytest.mark.property("P05")
@pytest.mark.nightly
@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (1, 2), (2, 0)])
def test_resumed_from_six_points_with_all_that_is_random(
    tmp_path: Path, processes: int, workers: int, figure: Callable[..., None]
) -> None:
    """Dropout, two draws a row with flipout, evaluations, epochs and cycles of the KL that do not end together."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes > 1 else []
    paths = [str(Path(bayestune.__file__).parent.parent), str(SCRIPT.parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(SCRIPT), str(tmp_path), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in range(processes):
        other = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(other) == 6
        what = f"parts unlike the whole run's after 6 resumes: {processes} processes, {workers} workers, rank {rank}"
        figure(what, sum(map(len, other.values())), at_most=0)
