"""Labels that are called otherwise, everywhere in the same way, give the same model with its answers renamed."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bayestune.inference import predict
from bayestune.tasks import AnyRow, Row
from bayestune.training import BayesTrainer
from training.toys import TASK, ToyTask, arguments, double_blob, lora, rows

ORDER = [2, 0, 3, 1]
"""Class i of the permuted task is class ORDER[i] of the other."""


class Permuted(ToyTask):
    """The toy task with its classes in another order."""

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return super().outputs(model, batch)[:, ORDER]


def renamed(some: Sequence[Row]) -> list[AnyRow]:
    changed = []
    for row in some:
        assert row.answer is not None
        changed.append(replace(row, answer=ORDER.index(row.answer), choices=tuple(row.choices[i] for i in ORDER)))
    return changed


@pytest.mark.property("D12")
@pytest.mark.parametrize("method", ["blob", "mle"])
def test_training_on_permuted_labels_permutes_the_probabilities(
    tmp_path: Path, figure: Callable[..., None], method: str
) -> None:
    """Twelve updates in float64, from the same weights and noise."""
    found = []
    for task, learnt in ((TASK, list(rows(20))), (Permuted(), renamed(rows(20)))):
        model = double_blob() if method == "blob" else lora()
        args = arguments(tmp_path, max_steps=12, per_device_train_batch_size=4, learning_rate=1e-2)
        before = predict(model, task, learnt, draws=0).probs
        BayesTrainer(model, task=task, args=args, train_rows=learnt).train()
        found.append(predict(model, task, learnt, draws=0 if method == "mle" else 3).probs)
        assert (found[-1] - before).abs().max() > 0.05  # it did learn
    worst = (found[0][:, ORDER] - found[1]).abs().max().item()
    figure(f"probabilities after training ({method}), labels permuted", worst, at_most=1e-6)
    assert (found[0] - found[1]).abs().max() > 0.05


@pytest.mark.property("D12")
def test_a_loss_follows_the_label_wherever_it_stands() -> None:
    model = lora().eval()
    batches = [TASK.collate([TASK.example(row) for row in some]) for some in (rows(20), renamed(rows(20)))]
    with torch.no_grad():
        there, here = TASK.loss(model, batches[0]), Permuted().loss(model, batches[1])
    assert (there - here).abs().max() <= 8 * torch.finfo(torch.float64).eps * there.max()
