"""Two training processes, and what one trains beside them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import bayestune
from bayestune.training import BayesTrainer
from training.process import scores, trainer_of
from training.toys import trained

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
TESTS = Path(__file__).parent.parent


def launch(script: str, *arguments: str | Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Start two processes of a script of this folder, with `more` in their environment, and wait for their end."""
    paths = [str(Path(bayestune.__file__).parent.parent), str(TESTS)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **more}
    command = [*LAUNCHER, str(TESTS / "training" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)


def beside_one(
    two: Path, kind: str, scratch: Path, figure: Callable[..., None], *, at_most: float
) -> tuple[BayesTrainer, list[dict[str, float]]]:
    """Hold what two processes wrote to what one process trains and scores; return its trainer, and what they wrote."""
    first, second = (load_file(two / f"{kind}-{rank}.safetensors") for rank in (0, 1))
    alone = trainer_of(kind, scratch, alone=True)
    start = trained(alone.model)
    alone.train()
    expected = trained(alone.model)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        assert (tensor - start[name]).abs().max() > 1e-3, name
    difference = max((first[name] - expected[name]).abs().max().item() for name in expected)
    figure(f"weights of {kind} after 20 updates in two processes", difference, at_most=at_most)

    here = scores(alone)
    written = [json.loads((two / f"{kind}-{rank}.json").read_text()) for rank in (0, 1)]
    for found in written:
        assert found["labels"] == here["labels"]
        assert found["accuracy"] == here["accuracy"]
        worst = max(abs(found[name] - here[name]) for name in ("loss", "nll"))
        figure(f"NLL of {kind} on 7 rows by two processes, nats", worst, at_most=at_most)
    return alone, written
