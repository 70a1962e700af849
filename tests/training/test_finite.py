"""NaN and infinity stop training before the update, and the error says where, of what, and what is left."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

import bayestune
from bayestune.adapters import gaussian_layers
from bayestune.errors import TrainingError
from bayestune.training import BayesTrainer, KLSettings
from bayestune.training.finite import first_nonfinite
from toys import pretrained_llama, write_data
from training.toys import TASK, arguments, double_blob, lora, rows, trained


class BrokenRow(type(TASK)):
    """Row toy-6, known by its prompt, spoils one thing: its loss, its logits, or its gradient."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.bad = fault, self.collate([self.example(rows(8)[6])])["input_ids"]

    def _hit(self, batch: dict[str, Tensor]) -> Tensor:
        return torch.tensor([torch.equal(ids[ids > 0], self.bad[0]) for ids in batch["input_ids"]])

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = super().outputs(model, batch)
        if self.fault not in ("a logit is nan", "a logit is inf"):
            return logits
        other = (batch["labels"] + 1) % 4  # not that of the answer
        bad = self._hit(batch)[:, None] & (torch.arange(4) == other[:, None])
        return torch.where(bad, float(self.fault.split()[-1]), logits)

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        nll, hit = super().loss(model, batch), self._hit(batch)
        moving = nll - nll.detach()  # 0, with the derivatives of the loss
        match self.fault:
            case "loss is nan" | "loss is inf":
                return torch.where(hit, float(self.fault.split()[-1]), nll)
            case "infinite derivative":
                return nll.index_put((hit,), nll[hit] + moving[hit].abs().sqrt())
            case "derivative whose square overflows":
                return nll + torch.where(hit, 1e200 * moving, 0.0)
        return nll


class Before(TrainerCallback):
    """The weights at the start of each update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights = trained(kwargs["model"])


def assert_stops(trainer: BayesTrainer, folder: Path, message: str, rate: str = "0.001") -> None:
    """In update 1, with a message that begins so and all there is to know, and with nothing of the update kept."""
    before = Before()
    trainer.add_callback(before)
    with pytest.raises(TrainingError, match=message) as error:
        trainer.train()
    last = folder / "checkpoint-1"
    assert f"learning rate was {rate}, the last good checkpoint is {last}:" in str(error.value)
    assert all(torch.equal(before.weights[name], value) for name, value in trained(trainer.model).items())
    assert_finite(last)


def assert_finite(checkpoint: Path) -> None:
    files = list(checkpoint.glob("*.safetensors"))
    assert len(files) >= 3
    assert all(tensor.isfinite().all() for file in files for tensor in load_file(file).values())


def settings(**others: Any) -> dict[str, Any]:
    return {"max_steps": 4, "gradient_accumulation_steps": 2, "train_sampling_strategy": "sequential",
            "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant", **others}  # fmt: skip


@pytest.mark.property("R05")
@pytest.mark.parametrize(
    ("kind", "fault", "message"),
    [
        ("lora", "loss is nan", "^step 1, nll: the NLL of row 'toy-6' is nan, expected"),
        ("blob", "loss is inf", "^step 1, nll: the NLL of row 'toy-6' is inf, expected"),
        ("blob", "a logit is nan", "^step 1, nll: the NLL of row 'toy-6' is nan, expected"),
        ("lora", "a logit is inf", "^step 1, nll: the NLL of row 'toy-6' is (nan|inf), expected"),
        (
            "lora",
            "infinite derivative",
            r"^step 1, gradient: .* of base_model\S+ .* from row 'toy-6', expected",
        ),
        ("blob", "derivative whose square overflows", "^step 1, gradient: .* from row 'toy-6', expected"),
    ],
)
def test_a_row_that_is_not_finite_stops_before_the_update(tmp_path: Path, kind: str, fault: str, message: str) -> None:
    """Update 1 has rows 4 to 7; each of its two micro-batches has two."""
    trainer = BayesTrainer(
        lora() if kind == "lora" else double_blob(),
        task=BrokenRow(fault),
        args=arguments(tmp_path, **settings()),
        train_rows=rows(8),
        train_draws=1 if kind == "lora" else 2,
    )
    assert_stops(trainer, tmp_path, message)


class Overflow(TrainerCallback):
    """In update 1 one G becomes so large that its cube, but not its square, is beyond float64."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1:
            layer = next(iter(gaussian_layers(kwargs["model"]).values()))
            with torch.no_grad():
                layer.rho[0, 0] = 1e120


def without_b() -> PeftModel:
    """A posterior whose B is frozen at 0: no G, however large, is in a loss."""
    model = double_blob()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_().requires_grad_(False)
    return model


@pytest.mark.property("R05")
def test_the_largest_entry_tells_whether_all_are_finite() -> None:
    one = torch.ones(2, 3)
    tensors = {"a": one, "b": -2e19 * one, "c": one.half() * 300, "d": one.double() * 1e200, "e": one.bfloat16()}
    assert first_nonfinite(tensors) is None
    assert first_nonfinite(tensors, squared=True) == ("b", 3)  # each in its own dtype
    assert first_nonfinite({"c": tensors["c"], "d": 0 * one}, squared=True) == ("c", 1)
    for spoilt in (math.nan, math.inf, -math.inf):
        one[1, 1] = spoilt
        assert first_nonfinite({"a": torch.ones(1), "b": one, "c": one}) == ("b", 2)
    assert first_nonfinite({}) is None
    assert first_nonfinite({"empty": torch.empty(0, 3)}, squared=True) is None


@pytest.mark.property("R05")
@pytest.mark.parametrize("fault", ["weight", "gradient"])
def test_a_kl_that_is_not_finite_stops_before_the_update(tmp_path: Path, fault: str) -> None:
    def schedule(step: int, cycle: int) -> float:
        return float("nan") if step == 1 and fault == "weight" else 0.1

    trainer = BayesTrainer(
        without_b(),
        task=TASK,
        args=arguments(tmp_path, **settings()),
        train_rows=rows(8),
        kl=KLSettings(cycle=2, schedule=schedule),
        callbacks=[Overflow()] if fault == "gradient" else [],
    )
    found = (
        "the KL weight is nan, its learning rate 0.01" if fault == "weight" else r"the KL gradient of G of \S+c_attn"
    )
    assert_stops(trainer, tmp_path, f"^step 1, kl: {found}")


@pytest.mark.property("R05")
def test_weights_that_an_update_broke_are_not_saved(tmp_path: Path) -> None:
    args = arguments(tmp_path, **settings(learning_rate=float("inf")))
    trainer = BayesTrainer(lora(), task=TASK, args=args, train_rows=rows(8))
    with pytest.raises(TrainingError, match=r"^step 1, weights: .* the last good checkpoint is none:"):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) == []


@pytest.mark.property("R05")
@pytest.mark.nightly  # Python has no compiled files of the libraries for -O: the imports take long
def test_without_asserts_the_command_line_stops_with_3(tmp_path: Path) -> None:
    """`python -O` runs no assert; a learning rate of 1e30 makes the logits of the third update infinite or NaN."""
    pretrained_llama(tmp_path / "llama")
    write_data(tmp_path / "data")
    train = ["train", "--model", "llama", "--task", "colours", "--data", "data", "--steps", "6", "--batch-size", "4"]
    train += ["--learning-rate", "1e30", "--checkpoint-steps", "1", "--max-tokens", "200", "--output", "run"]
    source = str(Path(bayestune.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-O", "-m", "bayestune", *train],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    last = done.stderr.rstrip("\n").split("\n")[-1]
    found = re.fullmatch(
        r"training stopped: step (\d+), (?:nll|gradient): .* rows? 'q\d+'.*, the last good checkpoint is (\S+): .*",
        last,
    )
    assert found, last
    step, checkpoint = found.groups()
    assert checkpoint == f"run/checkpoints/checkpoint-{step}"
    assert_finite(tmp_path / checkpoint)
    assert not (tmp_path / "run" / "posterior").exists()
