"""`SwagCallback`: which weights it sees, that it changes nothing, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from bayestune.errors import ConfigError, TrainingError
from bayestune.inference import predict
from bayestune.methods import SwagCallback, SwagPosterior
from bayestune.methods.swag import trained_weights
from bayestune.training import BayesTrainer
from models import assert_same
from training.toys import TASK, arguments, lora, rows, trained


class Everything(TrainerCallback):
    """A copy of the adapter after every update."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append({name: weight.clone() for name, weight in trained_weights(kwargs["model"]).items()})


def run(folder: Path, model: PeftModel, *callbacks: TrainerCallback, steps: int = 9, **settings: Any) -> BayesTrainer:
    args = arguments(folder, max_steps=steps, learning_rate=1e-2, gradient_accumulation_steps=2, **settings)
    return BayesTrainer(model, task=TASK, args=args, train_rows=rows(12), callbacks=callbacks)


@pytest.mark.parametrize(("start", "every", "seen"), [(4, 2, (4, 6, 8)), (2, 7, (2, 9))])
def test_snapshots_are_the_weights_after_these_updates(
    tmp_path: Path, start: int, every: int, seen: tuple[int, ...]
) -> None:
    model, swag, everything = lora(), SwagCallback(start=start, every=every, rank=3), Everything()
    run(tmp_path, model, swag, everything).train()
    assert swag.moments.snapshots == len(tuple(seen))
    for name, mean in swag.moments.mean.items():
        stack = torch.stack([everything.weights[update - 1][name] for update in seen])
        assert stack.std(0).max() > 0
        assert (mean - stack.mean(0)).abs().max() <= 1e-15
        assert (swag.moments.variance(name) - stack.var(0, correction=0)).abs().max() <= 1e-15
        assert len(swag.moments.deviations[name]) == min(3, len(stack))


def test_collecting_changes_no_update(tmp_path: Path) -> None:
    plain, watched = lora(), lora()
    run(tmp_path / "a", plain).train()
    run(tmp_path / "b", watched, SwagCallback(start=2, every=1)).train()
    assert_same(trained(plain), trained(watched))


def test_the_posterior_of_a_run_predicts(tmp_path: Path) -> None:
    model, swag = lora(), SwagCallback(start=3, every=1)
    run(tmp_path, model, swag).train()
    posterior = SwagPosterior.from_moments(model, swag.moments)
    found = predict(posterior, TASK, rows(4), draws=3)
    assert found.draw_log_probs.shape == (3, 4, 4) and (found.epistemic > 0).all()


def test_a_run_resumed_before_the_tail_gives_the_same_moments(tmp_path: Path) -> None:
    whole, part = SwagCallback(start=5, every=2), SwagCallback(start=5, every=2)
    run(tmp_path, lora(), whole, save_strategy="steps", save_steps=4).train()
    run(tmp_path, lora(), part).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert part.moments.snapshots == whole.moments.snapshots == 3
    assert_same(part.moments.mean, whole.moments.mean)


def test_a_run_resumed_inside_the_tail_is_refused(tmp_path: Path) -> None:
    run(tmp_path, lora(), save_strategy="steps", save_steps=5).train()
    resumed = run(tmp_path, lora(), SwagCallback(start=5, every=2))
    with pytest.raises(TrainingError, match="with 0 snapshots, expected 1"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_a_second_run_needs_a_new_callback(tmp_path: Path) -> None:
    swag = SwagCallback(start=3, every=2)
    run(tmp_path / "a", lora(), swag).train()
    with pytest.raises(TrainingError, match="new callback"):
        run(tmp_path / "b", lora(), swag).train()


def test_counts_below_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="start=1, every=0, expected at least 1"):
        SwagCallback(start=1, every=0)


def test_a_run_without_a_tail_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two snapshots"):
        run(tmp_path, lora(), SwagCallback(start=6, every=4)).train()


def test_a_trained_parameter_beside_the_adapter_is_refused(tmp_path: Path) -> None:
    model = lora()
    name, parameter = next((n, p) for n, p in model.named_parameters() if "ln_f" in n)
    parameter.requires_grad_(True)
    with pytest.raises(ConfigError, match=name):
        run(tmp_path, model, SwagCallback(start=2, every=1)).train()
