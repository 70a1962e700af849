"""Memory that runs out in training: the same update in smaller forwards, and nothing left of the failed try."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback

from bayestune.errors import BayestuneWarning, TrainingError
from bayestune.training import BayesTrainer, KLSettings
from training.toys import TASK, arguments, double_blob, lora, rows, trained

Fails = Callable[[int, int], bool]
"""Whether memory runs out, given the number of the call from 1 on and the rows of its batch."""


class Short(type(TASK)):
    """Memory runs out in the forwards that `fails` names, at once or in the middle of their backward."""

    def __init__(self, fails: Fails, *, backward: bool = False) -> None:
        super().__init__()
        self.fails, self.backward = fails, backward
        self.calls = self.failed = 0

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        if not self.fails(self.calls, len(batch["labels"])):
            return super().outputs(model, batch)
        self.failed += 1
        logits = super().outputs(model, batch)
        if not self.backward:
            raise torch.OutOfMemoryError("on purpose")
        first = next(parameter for parameter in model.parameters() if parameter.requires_grad)

        def fail(gradient: Tensor) -> None:
            hook.remove()
            assert any(parameter.grad is not None for parameter in model.parameters())  # a part has arrived
            raise torch.OutOfMemoryError("on purpose")

        hook = first.register_hook(fail)
        return logits


def never(call: int, count: int) -> bool:
    return False


def model_of(kind: str) -> PeftModel:
    return lora(lora_dropout=0.3 if kind == "dropout" else 0.0) if kind != "blob" else double_blob(lora_dropout=0.3)


def trainer_of(
    folder: Path, kind: str, task: Any = TASK, *, size: int = 4, steps: int = 3, **settings: Any
) -> BayesTrainer:
    """Updates of 12 rows, the last of an epoch of 6, in micro-batches of `size`; the gradient's norm is clipped."""
    return BayesTrainer(
        model_of(kind),
        task=task,
        args=arguments(
            folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=12 // size,
            max_steps=steps,
            max_grad_norm=0.5,
            warmup_steps=1,
            **settings,
        ),
        train_rows=rows(18),
        eval_rows=rows(5),
        kl=KLSettings(cycle=2) if kind == "blob" else None,
        train_draws=2 if kind == "blob" else 1,
    )


@dataclass
class Ended:
    """A run that is over."""

    trainer: BayesTrainer
    weights: list[Tensor]
    generator: Tensor


def run(trainer: BayesTrainer, resume: Path | None = None) -> Ended:
    torch.manual_seed(3)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return Ended(trainer, list(trained(trainer.model).values()), torch.get_rng_state())


def assert_same_run(found: Ended, expected: Ended) -> None:
    """Weights, state of the optimiser and generator, to the bit; logs to rounding."""
    assert torch.equal(found.generator, expected.generator)
    assert all(torch.equal(one, other) for one, other in zip(found.weights, expected.weights, strict=True))
    states = [ended.trainer.optimizer.state_dict()["state"] for ended in (found, expected)]
    for one, other in zip(*(state.values() for state in states), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [ended.trainer.state.log_history[:-1] for ended in (found, expected)]  # without that of the time it took
    for one, other in zip(*logs, strict=True):
        assert one["step"] == other["step"] and one["learning_rate"] == other["learning_rate"]
        assert one["grad_norm"] == other["grad_norm"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)  # transformers adds losses in float32


def largest_difference(found: Ended, expected: Ended) -> float:
    pairs = zip(found.weights, expected.weights, strict=True)
    return max((one - other).abs().max().item() for one, other in pairs)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], Ended]:
    """Runs that started with smaller micro-batches, each made once."""
    folder = tmp_path_factory.mktemp("small")
    return functools.cache(lambda kind, size: run(trainer_of(folder, kind, size=size)))


@pytest.mark.property("R01")
@pytest.mark.parametrize(
    ("kind", "fails", "backward", "size"),
    [
        ("lora", lambda call, count: call == 1, False, 2),
        ("dropout", lambda call, count: call == 3, True, 2),
        ("blob", lambda call, count: call == 3, True, 2),
        ("blob", lambda call, count: call in (2, 4), True, 1),
    ],
    ids=["first forward", "third backward with dropout", "third backward of a posterior", "twice"],
)
def test_failing_in_the_first_update_is_the_run_that_started_smaller(
    small: Callable[[str, int], Ended], tmp_path: Path, kind: str, fails: Fails, backward: bool, size: int
) -> None:
    task = Short(fails, backward=backward)
    with pytest.warns(BayestuneWarning, match="step 0: memory ran out on cpu") as seen:
        found = run(trainer_of(tmp_path, kind, task))
    told = [str(warning.message) for warning in seen if "memory ran out" in str(warning.message)]
    assert task.failed == len(told) == (2 if size == 1 else 1)
    assert f"this and later updates use {size};" in told[-1]
    assert_same_run(found, small(kind, size))


class Smaller(TrainerCallback):
    """Two rows a forward from update 1 on, without a failure."""

    def __init__(self, trainer: BayesTrainer) -> None:
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            self.trainer._memory.rows_at_once = 2


@pytest.mark.property("R01")
@pytest.mark.parametrize("kind", ["lora", "blob"])
def test_failing_later_is_large_before_and_small_after(
    small: Callable[[str, int], Ended], figure: Callable[..., None], tmp_path: Path, kind: str
) -> None:
    """In the last micro-batch of the second update, the one before it whole."""
    with pytest.warns(BayestuneWarning, match="step 1: memory ran out"):
        found = run(trainer_of(tmp_path, kind, Short(lambda call, count: call == 5, backward=True)))
    expected = trainer_of(tmp_path, kind)
    expected.add_callback(Smaller(expected))
    assert_same_run(found, run(expected))
    if kind == "lora":
        difference = largest_difference(found, small(kind, 2))
        figure("weights, memory out in update 2, beside the run that started small", difference, at_most=1e-6)


@pytest.mark.property("R01")
def test_at_one_row_it_stops_and_nothing_is_updated(tmp_path: Path) -> None:
    task = Short(lambda call, count: True, backward=True)
    trainer = trainer_of(tmp_path, "blob", task)
    before = list(trained(trainer.model).values())
    with (
        pytest.warns(BayestuneWarning) as seen,
        pytest.raises(TrainingError, match=r"step 0: memory ran out on cpu with one row per forward, 'toy-\d+'"),
    ):
        trainer.train()
    assert task.calls == 3
    told = [str(warning.message) for warning in seen if "memory ran out" in str(warning.message)]
    assert [message.split("with ")[1][:6] for message in told] == ["4 rows", "2 rows"]
    assert all(torch.equal(one, two) for one, two in zip(before, trained(trainer.model).values(), strict=True))


@pytest.mark.property("R01")
def test_a_resumed_run_is_right_and_exact_where_memory_runs_out_again(
    figure: Callable[..., None], tmp_path: Path
) -> None:
    """It starts with whole micro-batches: the smaller size is in no checkpoint."""
    saving = {"save_strategy": "steps", "save_steps": 1}
    first = Short(lambda call, count: call == 1)
    for kind in ("blob", "lora"):
        with pytest.warns(BayestuneWarning):
            whole = run(trainer_of(tmp_path / kind, kind, Short(lambda call, count: call == 1), **saving))
        checkpoint = tmp_path / kind / "checkpoint-2"
        if kind == "blob":
            with pytest.warns(BayestuneWarning, match="step 2"):
                assert_same_run(run(trainer_of(tmp_path / "again", kind, first), checkpoint), whole)
        else:
            resumed = run(trainer_of(tmp_path / "again", kind), checkpoint)
            difference = largest_difference(resumed, whole)
            figure("weights of plain LoRA, resumed with enough memory", difference, at_most=1e-6)


@pytest.mark.property("R01")
def test_one_of_several_processes_stops_and_says_which(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "lora")
    undone: list[int] = []

    def fail(batch: dict[str, Any]) -> Tensor:
        raise torch.OutOfMemoryError("on purpose")

    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    with pytest.raises(TrainingError, match="step 7: memory ran out on cpu in micro-batch 1 .* process 0 of 1"):
        trainer._memory.run(batch, fail, lambda: undone.append(1), step=7, shared=True)
    assert trainer._memory.rows_at_once == 4 and not undone


class ShortInEvaluation(type(TASK)):
    """In evaluation memory is enough for `fits` rows."""

    def __init__(self, fits: int) -> None:
        super().__init__()
        self.fits, self.failed = fits, 0

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        if not model.training and len(batch["labels"]) > self.fits:
            self.failed += 1
            raise torch.OutOfMemoryError("on purpose")
        return super().outputs(model, batch)


class Keep(TrainerCallback):
    """The weights after each update."""

    def __init__(self) -> None:
        self.weights: list[list[Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(list(trained(kwargs["model"]).values()))


@pytest.mark.property("R01")
def test_evaluation_without_memory_changes_no_training(tmp_path: Path, figure: Callable[..., None]) -> None:
    kept = Keep()
    quiet = trainer_of(tmp_path, "blob")
    quiet.add_callback(kept)
    run(quiet)
    task = ShortInEvaluation(1)
    found = run(trainer_of(tmp_path, "blob", task, eval_strategy="steps", eval_steps=1))
    assert all(torch.equal(one, other) for one, other in zip(found.weights, kept.weights[-1], strict=True))
    assert task.failed == 3 * 3  # batches of 4 rows, once whole and twice half, and the fifth row; three updates
    difference = abs(found.trainer.evaluate()["eval_nll"] - quiet.evaluate()["eval_nll"])
    figure("NLL of an evaluation in parts, nats", difference, at_most=1e-12)

    none = trainer_of(tmp_path, "blob", ShortInEvaluation(0), eval_strategy="steps", eval_steps=1)
    with pytest.raises(TrainingError, match="evaluation: memory ran out on cpu with one row"):
        run(none)
    assert all(torch.equal(*pair) for pair in zip(trained(none.model).values(), kept.weights[0], strict=True))
    assert none.model.training


@pytest.mark.property("R01")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["dropout", "blob"])
def test_on_a_gpu_that_is_really_full(tmp_path: Path, kind: str, figure: Callable[..., None]) -> None:
    """The first forward of the second update asks for more memory than there is."""
    task = Fill()
    on_gpu = {"use_cpu": False}
    with pytest.warns(BayestuneWarning, match="step 1: memory ran out on cuda:0 with 4 rows"):
        found = run(trainer_of(tmp_path, kind, task, **on_gpu))
    expected = trainer_of(tmp_path, kind, **on_gpu)
    expected.add_callback(Smaller(expected))
    difference = largest_difference(found, run(expected))
    figure("weights after real exhaustion, beside a run told to use small forwards", difference, at_most=1e-9)


class Fill(type(TASK)):
    """Asks for more memory than a GPU has, in the fourth forward."""

    calls = 0

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        logits = super().outputs(model, batch)
        if self.calls == 4:
            logits = logits + torch.empty(2**45, dtype=torch.uint8, device=logits.device)[0]
        return logits
