"""`BayesTrainer` and the loop with two literal optimisers make the same updates."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bayestune.training import KLSettings
from bayestune.training.batches import ROW
from training.toys import TASK, Recorder, arguments, double_blob, rows, trained

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("accelerate_loop", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("accumulation", "estimator"), [(1, "independent"), (3, "flipout_token")])
def test_trainer_equals_the_two_optimiser_loop(
    tmp_path: Path, example: ModuleType, accumulation: int, estimator: str
) -> None:
    """20 updates in float64, ragged micro-batches, cycles of 6 so that the KL weighs 1/2 three times."""
    start = {"rho_init": 0.3, "estimator": estimator}
    settings = {
        "max_steps": 20,
        "gradient_accumulation_steps": accumulation,
        "warmup_steps": 0.06,
        "adam_epsilon": 1e-6,
    }
    ours = double_blob(**start)
    trainer = Recorder(
        ours,
        task=TASK,
        args=arguments(tmp_path, learning_rate=1e-3, **settings),
        train_rows=rows(9),
        kl=KLSettings(cycle=6, learning_rate=0.01),
    )
    before = trained(ours)
    trainer.train()

    updates: list[list[dict[str, torch.Tensor]]] = [[] for _ in range(20)]
    for seen in trainer.micros:
        updates[seen.step].append({name: tensor for name, tensor in seen.inputs.items() if name != ROW})
    assert {len(update) for update in updates} == ({1} if accumulation == 1 else {2, 3})
    theirs = double_blob(**start)
    losses = example.train(theirs, TASK, updates, cycle=6, learning_rate=1e-3, seed=5)

    expected = trained(theirs)
    for name, value in trained(ours).items():
        assert (value - expected[name]).abs().max().item() <= 1e-12, name
        assert (value - before[name]).abs().max().item() > 1e-3, name
    first = [
        sum(loss for loss, seen in zip(trainer.losses, trainer.micros, strict=True) if seen.step == s)
        for s in range(20)
    ]
    assert max(abs(a - b) for a, b in zip(first, losses, strict=True)) <= 1e-12


def test_the_example_stays_short() -> None:
    assert len(EXAMPLE.read_text().splitlines()) <= 80
