"""Length-grouped order: every row once, similar lengths together, a function of seed and epoch, and resumable."""

import random
from pathlib import Path

import pytest

from bayestune.training import BayesTrainer
from bayestune.training.batches import LengthGrouped
from training.toys import TASK, arguments, double_blob, rows


@pytest.mark.parametrize(("rows", "batch"), [(1, 4), (40, 7), (1000, 8)])
def test_every_row_comes_once_and_the_ragged_batch_last(rows: int, batch: int) -> None:
    lengths = [random.Random(i).randrange(5, 60) for i in range(rows)]
    order = list(LengthGrouped(lengths, batch_size=batch, seed=3))
    assert sorted(order) == list(range(rows))
    assert len(order) == len(LengthGrouped(lengths, batch_size=batch, seed=3))


def test_a_batch_holds_rows_of_similar_length() -> None:
    """With 400 rows in one pool, a batch is eight neighbours of the sorted rows: lengths with a spread of 7."""
    order = list(LengthGrouped(range(400), batch_size=8, seed=0))
    batches = [order[i : i + 8] for i in range(0, 400, 8)]
    assert all(max(part) - min(part) == 7 for part in batches)
    assert [min(part) for part in batches] != sorted(min(part) for part in batches)


def test_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = [i % 13 for i in range(100)]
    first, again, other = (LengthGrouped(lengths, batch_size=4, seed=seed) for seed in (1, 1, 2))
    orders = [list(first), list(again), list(other)]
    assert orders[0] == orders[1] != orders[2]
    first.set_epoch(1)
    assert list(first) != orders[0]
    first.set_epoch(0)
    assert list(first) == orders[0]


@pytest.mark.parametrize("step", [2, 3])
def test_resumed_run_sees_the_same_order(tmp_path: Path, step: int) -> None:
    """Ten rows in batches of four: three updates an epoch, so 2 is inside, 3 at the edge and 4 in the second epoch."""

    def losses(output: Path, resume: Path | None) -> list[float]:
        args = arguments(
            output,
            max_steps=6,
            per_device_train_batch_size=4,
            save_strategy="steps",
            save_steps=1,
            train_sampling_strategy="group_by_length",
        )
        trainer = BayesTrainer(double_blob(0), task=TASK, args=args, train_rows=rows(10))
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    whole = losses(tmp_path / "whole", None)
    assert losses(tmp_path / "resumed", tmp_path / "whole" / f"checkpoint-{step}") == whole
