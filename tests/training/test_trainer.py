"""`BayesTrainer`: what is optimised, logged, evaluated, and refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import AutoModelForMultipleChoice, BertConfig, BertForMaskedLM

from bayestune.adapters import BlobConfig, gaussian_layers, training_noise
from bayestune.errors import ConfigError, DataError
from bayestune.functional import uniform_kl_weight
from bayestune.tasks import Row
from bayestune.training import BayesTrainer, KLSettings, kl_rate_for_std
from bayestune.training.kl import posterior_summary
from models import LLAMA, seeded
from training.toys import TASK, Recorder, arguments, double_blob, lora, rows, trained


def test_the_default_kl_reaches_its_width_whether_steps_or_epochs_are_given(tmp_path: Path) -> None:
    """9 rows in batches of 2 x 3: 2 updates an epoch, 60 in 30 epochs."""
    batches = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "warmup_steps": 0.06}
    model = get_peft_model(LLAMA.build(), LLAMA.config(rho_init=0.05))
    found = [
        BayesTrainer(model, task=TASK, args=arguments(tmp_path, **batches, **length), train_rows=rows(9)).kl
        for length in ({"max_steps": 60}, {"max_steps": -1, "num_train_epochs": 30})
    ]
    start = posterior_summary(list(gaussian_layers(model).values()))["std"]
    growth = {"updates": 60, "cycle": 39, "start": start, "prior_std": 0.2, "warmup": 4 / 60}
    rate = kl_rate_for_std(0.06, schedule=uniform_kl_weight, **growth)
    assert found == [KLSettings(cycle=39, schedule=uniform_kl_weight, learning_rate=rate)] * 2


@pytest.mark.property("N09")
def test_parameter_groups(tmp_path: Path) -> None:
    """G is in no group, M is never decayed, B and heads are decayed as asked."""
    model = get_peft_model(LLAMA.build(), LLAMA.config(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    trainer = BayesTrainer(model, task=TASK, args=arguments(tmp_path, weight_decay=0.1), train_rows=rows(2))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(p)]: group["weight_decay"]
        for group in trainer.create_optimizer().param_groups
        for p in group["params"]
    }
    expected = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not name.endswith(".rho"):
            expected[name] = 0.0 if ".lora_A." in name else 0.1
    assert found == expected
    assert {name.split(".")[-3] for name in found} == {"lora_A", "lora_B", "modules_to_save"}


def test_every_part_moves_and_the_base_does_not(tmp_path: Path) -> None:
    model = double_blob()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    BayesTrainer(model, task=TASK, args=arguments(tmp_path, max_steps=3), train_rows=rows(6)).train()
    for name, parameter in model.named_parameters():
        assert torch.equal(before[name], parameter) != parameter.requires_grad, name


def test_training_lowers_the_loss_and_logs_its_parts(tmp_path: Path) -> None:
    data = rows(8)
    args = arguments(tmp_path, max_steps=60, per_device_train_batch_size=8, learning_rate=2e-2, logging_steps=20)
    kl = KLSettings(cycle=10_000, schedule=uniform_kl_weight)
    trainer = BayesTrainer(double_blob(), task=TASK, args=args, train_rows=data, eval_rows=data, kl=kl)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.8 * before
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3
    layers = gaussian_layers(trainer.model).values()
    assert logs[-1]["kl"] == pytest.approx(sum(layer.kl().item() for layer in layers), rel=1e-12)
    deviations = torch.cat([layer.rho.detach().flatten() ** 2 for layer in layers])
    assert logs[-1]["std"] == pytest.approx(deviations.mean().item(), rel=1e-12)
    assert logs[-1]["nll"] == logs[-1]["loss"]


class FlatChoices(type(TASK)):
    """Every row as three sequences, flattened into the batch as a multiple-choice model does."""

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: tensor.repeat_interleave(3, 0) for name, tensor in batch.items() if name != "labels"}
        return super().outputs(model, inputs).unflatten(0, (-1, 3)).mean(1)


@pytest.mark.property("S11")
def test_choices_of_a_row_share_its_draw(tmp_path: Path) -> None:
    model = double_blob()
    trainer = BayesTrainer(model, task=FlatChoices(), args=arguments(tmp_path), train_rows=rows(2), train_draws=4)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
    _, nll = trainer.compute_loss(model, batch, return_outputs=True)
    assert {layer.noise.epsilon.shape[0] for layer in gaussian_layers(model).values()} == {8}
    assert nll.shape == (4, 2) and len(set(nll.flatten().tolist())) == 8
    assert training_noise(model).rows is None
    # With one sequence a row the same noise gives the same losses: the copies of a row saw one draw.
    trainer.task = TASK
    training_noise(model).micro = 0
    assert (trainer.compute_loss(model, batch, return_outputs=True)[1] - nll).abs().max() <= 1e-12


def test_plain_lora_is_trained_without_a_posterior(tmp_path: Path) -> None:
    model = lora()
    before = trained(model)
    trainer = BayesTrainer(model, task=TASK, args=arguments(tmp_path, max_steps=2), train_rows=rows(4))
    trainer.train()
    assert trainer.kl is None
    assert all(not torch.equal(before[name], value) for name, value in trained(model).items())
    assert "kl" not in trainer.state.log_history[0]


@pytest.mark.property("S20")
@pytest.mark.parametrize("count", [1, 9])
def test_evaluation_is_the_mean_over_rows_at_the_posterior_mean(tmp_path: Path, count: int) -> None:
    model, data = double_blob(), rows(count)
    trainer = BayesTrainer(model, task=TASK, args=arguments(tmp_path), train_rows=rows(2), eval_rows=data)
    found = trainer.predict(trainer.eval_dataset)
    with torch.no_grad():
        batch = TASK.collate([TASK.example(row) for row in data])
        expected = TASK.outputs(model.eval(), batch)
        nll = TASK.loss(model, batch).mean().item()
    assert np.abs(found.predictions - expected.numpy()).max() <= 1e-12
    assert list(found.label_ids) == [row.answer for row in data]
    assert abs(found.metrics["test_loss"] - nll) <= 1e-12
    assert (
        found.metrics["test_accuracy"]
        == sum(expected.argmax(1).tolist()[i] == row.answer for i, row in enumerate(data)) / count
    )


@pytest.mark.property("S18")
def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    finals: list[dict[str, Tensor]] = []
    for settings in ({}, {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}):
        args = arguments(tmp_path, max_steps=6, gradient_accumulation_steps=2, **settings)
        model = double_blob(lora_dropout=0.3)
        trainer = BayesTrainer(model, task=TASK, args=args, train_rows=rows(6), eval_rows=rows(5), train_draws=2)
        trainer.train()
        assert sum("eval_loss" in entry for entry in trainer.state.log_history) == (7 if settings else 0)
        finals.append(trained(model))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0])


@pytest.mark.property("S18")
@pytest.mark.parametrize("training", [True, False])
def test_modes_generators_and_clock_are_as_before(tmp_path: Path, training: bool) -> None:
    model = double_blob().train(training)
    model.get_base_model().transformer.ln_f.train(not training)
    trainer = BayesTrainer(model, task=TASK, args=arguments(tmp_path), train_rows=rows(2), eval_rows=rows(5))

    def state() -> list[Any]:  # without Python's own generator, which the type checks of the test suite move
        numpy_state = np.random.get_state()
        return [
            [module.training for module in model.modules()],
            torch.get_rng_state().tolist(),
            (numpy_state[1].tolist(), numpy_state[2:]),
            vars(training_noise(model)).copy(),
        ]

    before = state()
    trainer.evaluate()
    assert state() == before


@pytest.mark.property("N01")
@pytest.mark.parametrize("autocast", [False, True])
def test_adapters_stay_float32_on_a_half_base(tmp_path: Path, autocast: bool) -> None:
    base = LLAMA.build() if autocast else LLAMA.build().bfloat16()
    model = get_peft_model(base, LLAMA.config())
    trainer = Recorder(model, task=TASK, args=arguments(tmp_path, bf16=autocast, max_steps=2), train_rows=rows(4))
    trainer.train()
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    assert {gradient.dtype for gradients in trainer.gradients for gradient in gradients.values()} == {torch.float32}
    state = trainer.optimizer.state_dict()["state"]
    assert {t.dtype for values in state.values() for t in values.values()} == {torch.float32}
    assert len(state) == 2 * len(gaussian_layers(model))  # M and B of every layer
    assert all(layer.kl().dtype == torch.float64 for layer in gaussian_layers(model).values())
    if not autocast:
        assert next(model.get_base_model().parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "settings",
    [
        {"fp16": True},
        {"optim": "adafactor"},
        {"train_sampling_strategy": "batch_rebalance"},
        {"activation_checkpointing_kwargs": {"preserve_rng_state": False}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_arguments_that_cannot_be_right_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    args = arguments(tmp_path)
    for name, value in settings.items():
        setattr(args, name, value)
    with pytest.raises(ConfigError, match=next(iter(settings))):
        BayesTrainer(double_blob(), task=TASK, args=args, train_rows=rows(2))


@pytest.mark.parametrize("saved", [None, ["classifier"], ["bert.pooler.dense", "classifier"]])
def test_a_new_head_that_nothing_saves_is_refused(tmp_path: Path, saved: list[str] | None) -> None:
    """Its random weights would be trained around, and missing from every file: name all of it, or load it."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    seeded(lambda: BertForMaskedLM(BertConfig(vocab_size=64, **sizes)), 0).save_pretrained(tmp_path / "base")
    base = AutoModelForMultipleChoice.from_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "complete")
    model = get_peft_model(base, BlobConfig(target_modules=["query"], modules_to_save=saved))
    left = sorted({"bert.pooler.dense", "classifier"} - set(saved or []))
    if left:
        with pytest.raises(ConfigError, match=re.escape(f"new layers {', '.join(left)}") + ".* modules_to_save"):
            BayesTrainer(model, task=TASK, args=arguments(tmp_path), train_rows=rows(2))
        complete = AutoModelForMultipleChoice.from_pretrained(tmp_path / "complete")
        model = get_peft_model(complete, BlobConfig(target_modules=["query"]))
    BayesTrainer(model, task=TASK, args=arguments(tmp_path), train_rows=rows(2))


def test_evaluation_without_rows_names_eval_rows(tmp_path: Path) -> None:
    trainer = BayesTrainer(double_blob(), task=TASK, args=arguments(tmp_path), train_rows=rows(2))
    with pytest.raises(ConfigError, match="eval_rows: found None"):
        trainer.evaluate()
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=1)
    with pytest.raises(ConfigError, match="eval_rows: found None"):
        BayesTrainer(double_blob(), task=TASK, args=args, train_rows=rows(2))


def test_a_loss_does_not_wait_for_the_device_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = BayesTrainer(double_blob(), task=TASK, args=arguments(tmp_path), train_rows=rows(8))
    waits: list[str] = []
    for name in ("__int__", "__index__", "item", "tolist"):
        right = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, name=name, right=right: (waits.append(name), right(self, *args))[1]
        )
    counts = []
    for size in (2, 8):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(size)])
        waits.clear()
        trainer.compute_loss(trainer.model, batch)
        counts.append(len(waits))
    assert counts[0] == counts[1], waits


def test_models_and_rows_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    args, kl = arguments(tmp_path), KLSettings(cycle=3)
    with pytest.raises(ConfigError, match="no effect"):
        BayesTrainer(lora(), task=TASK, args=args, train_rows=rows(2), kl=kl)
    with pytest.raises(ConfigError, match="train_draws"):
        BayesTrainer(double_blob(), task=TASK, args=args, train_rows=rows(2), train_draws=0)
    with pytest.raises(ConfigError, match="trainable"):
        BayesTrainer(double_blob().requires_grad_(False), task=TASK, args=args, train_rows=rows(2))
    with pytest.raises(DataError, match="training row"):
        BayesTrainer(double_blob(), task=TASK, args=args, train_rows=[])
    unlabelled = Row(id="no-label", question="why", choices=("a", "b"), answer=None)
    with pytest.raises(DataError, match="no-label"):
        BayesTrainer(double_blob(), task=TASK, args=args, train_rows=[*rows(2), unlabelled])


def test_arguments_of_the_caller_are_not_changed(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    BayesTrainer(double_blob(), task=TASK, args=args, train_rows=rows(2))
    assert args.remove_unused_columns and args.data_seed is None
