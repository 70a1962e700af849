"""Several processes train what one trains on batches as large as theirs together (gloo, on a CPU)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import bayestune

SCRIPT = Path(__file__).parent / "process.py"
Weights = dict[str, Tensor]


def train(kind: str, processes: int, folder: Path) -> tuple[Weights, list[Weights]]:
    """The weights before, and after on each process, of 12 updates of 4 rows."""
    folder.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    paths = [str(Path(bayestune.__file__).parent.parent), str(SCRIPT.parent.parent)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, str(SCRIPT), kind, str(4 // processes), str(folder)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    start = load_file(folder / "start.safetensors")
    return start, [load_file(folder / f"rank{rank}.safetensors") for rank in range(processes)]


@pytest.mark.parametrize("kind", ["lora", "blob", "kl"])
def test_R06_two_processes_train_what_one_trains(kind: str, tmp_path: Path) -> None:
    """Plain LoRA in float64 to rounding, and the KL alone; BLoB, whose processes have noise of their own, keeps the
    processes bit-equal."""
    start, (first, second) = train(kind, 2, tmp_path / "two")
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert not torch.equal(tensor, start[name]), name
    if kind != "blob":
        _, (alone,) = train(kind, 1, tmp_path / "one")
        for name, tensor in alone.items():
            torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-9)
