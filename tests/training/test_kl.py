"""The KL step: closed form, its guards, and `KLCallback` on a plain Trainer."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from transformers import Trainer, TrainerCallback

from bayestune.adapters import gaussian_layers, training_noise
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.functional import RHO_FLOOR, gaussian_kl
from bayestune.training import BayesTrainer, KLCallback, KLSettings, elbo_kl_weight
from bayestune.training.kl import JOINED, kl_step, posterior_summary
from models import LLAMA
from training.toys import TASK, arguments, double_blob, lora, rows, trained


class PlainTrainer(Trainer):
    """transformers' Trainer with a task's loss: every parameter, G too, is in the optimiser."""

    loss_is_scaled_for_ga: bool | None = False

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return TASK.loss(model, inputs).mean()


def plain_trainer(
    model: Any,
    output: Path,
    callbacks: list[TrainerCallback],
    owner: type[PlainTrainer] = PlainTrainer,
    **settings: Any,
) -> PlainTrainer:
    return owner(
        model=model,
        args=arguments(output, remove_unused_columns=False, **settings),
        train_dataset=[TASK.example(row) for row in rows(4)],
        data_collator=TASK.collate,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("along_nll", [True, False])
def test_kl_step_is_sgd_through_autograd(along_nll: bool) -> None:
    model = double_blob()
    layer = next(iter(gaussian_layers(model).values()))
    nll_gradient = torch.randn(layer.rho.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (0.25 * gaussian_kl(layer.weight, layer.rho, layer.prior_std)).backward()
    expected_mean = layer.weight - 0.01 * layer.weight.grad
    expected_rho = layer.rho - 0.01 * (layer.rho.grad + (nll_gradient if along_nll else 0))
    layer.rho.grad = nll_gradient
    kl_step([layer], rate=0.01, weight=0.25, along_nll=along_nll)
    assert (layer.weight - expected_mean).abs().max() <= 1e-15
    assert (layer.rho - expected_rho).abs().max() <= 1e-15


def test_kl_step_stops_at_the_minimum_and_keeps_the_floor() -> None:
    model = double_blob()
    layer = next(iter(gaussian_layers(model).values()))
    best = math.sqrt(layer.prior_std)
    with torch.no_grad():
        layer.rho.fill_(1e-3)
        layer.rho[0] = -1e-3
        layer.rho[1] = 0.0
        layer.rho[2] = 50.0
    kl_step([layer], rate=0.01, weight=0.5, along_nll=False)
    assert (layer.rho[0] + best).abs().max() <= 1e-14
    assert (layer.rho[1:] - best).abs().max() <= 1e-14

    layer.rho.grad = layer.rho.detach().clone()
    kl_step([layer], rate=1.0, weight=0.0, along_nll=True)
    assert torch.equal(layer.rho.abs(), torch.full_like(layer.rho, RHO_FLOOR))


def test_layers_move_together_as_each_does_alone() -> None:
    """Other priors, shapes and dtypes, and a layer that no loss reached, bit for bit."""
    together, alone = double_blob(), double_blob()
    for model in (together, alone):
        layers = list(gaussian_layers(model).values())
        assert len(layers) > 2
        layers[1].prior_std = 0.5
        layers[2].float()
        for place, layer in enumerate(layers):
            generator = torch.Generator().manual_seed(place)
            layer.rho.grad = torch.randn(layer.rho.shape, generator=generator).to(layer.rho) if place else None
    kl_step(gaussian_layers(together).values(), rate=0.01, weight=0.25, along_nll=True)
    for layer in gaussian_layers(alone).values():
        kl_step([layer], rate=0.01, weight=0.25, along_nll=True)
    assert all(torch.equal(trained(together)[name], value) for name, value in trained(alone).items())


def test_many_layers_move_as_each_does_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few entries are joined, every layer moves once."""
    expected = double_blob()
    kl_step(gaussian_layers(expected).values(), rate=0.01, weight=0.25, along_nll=False)
    layer = next(iter(gaussian_layers(expected).values()))
    for limit in (1, 2 * layer.rho.numel()):
        monkeypatch.setitem(JOINED, "cpu", limit)
        model = double_blob()
        kl_step(gaussian_layers(model).values(), rate=0.01, weight=0.25, along_nll=False)
        assert all(torch.equal(trained(expected)[name], value) for name, value in trained(model).items())


@pytest.mark.property("R05")
def test_an_nll_gradient_of_G_alone_is_looked_at() -> None:
    callback, model = KLCallback(KLSettings(cycle=2)), double_blob()
    callback._layers = list(gaussian_layers(model).values())
    assert callback._nonfinite_gradient() is None
    callback._layers[0].rho.grad = torch.full_like(callback._layers[0].rho, math.nan)
    assert callback._nonfinite_gradient() == (f"G of {callback._layers[0].name} (with its NLL)", 1)


@pytest.mark.property("N01")
def test_an_update_of_1e_5_moves_G(figure: Callable[..., None]) -> None:
    model = get_peft_model(LLAMA.build().bfloat16(), LLAMA.config())
    layer = next(iter(gaussian_layers(model).values()))
    with torch.no_grad():
        layer.rho.fill_(0.05)
    layer.rho.grad = torch.full_like(layer.rho, 1e-3)
    before = layer.rho.detach().clone()
    kl_step([layer], rate=0.01, weight=0.0, along_nll=True)
    moved = before - layer.rho
    figure("update of G = 0.05 by 1e-5 on a bf16 base, error", (moved - 1e-5).abs().max().item(), at_most=1e-8)


def test_elbo_weight_is_one_over_rows() -> None:
    assert [elbo_kl_weight(8)(step, 3) for step in (0, 5)] == [0.125, 0.125]
    with pytest.raises(ConfigError, match="found 0"):
        elbo_kl_weight(0)


@pytest.mark.parametrize("setting", [{"cycle": 0}, {"cycle": 1, "learning_rate": math.nan}])
def test_settings_out_of_range_are_refused(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        KLSettings(**setting)


def test_callback_adds_the_kl_to_a_plain_trainer(tmp_path: Path) -> None:
    """Same noise, same data: the difference the callback makes is one KL step at the optimiser's parameters."""
    after: list[dict[str, Tensor]] = []
    for callbacks in ([], [KLCallback(KLSettings(cycle=2))]):
        model = double_blob()
        training_noise(model).seed = 5  # the seed of the arguments, which the callback sets itself
        plain_trainer(model, tmp_path, callbacks).train()
        if not callbacks:
            kl_step(gaussian_layers(model).values(), rate=0.01, weight=2 / 7, along_nll=False)
        after.append(trained(model))
    assert all(torch.equal(after[0][name], after[1][name]) for name in after[0])


def test_callback_follows_the_schedule_and_the_clock(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def schedule(step: int, cycle: int) -> float:
        noise = training_noise(model)
        seen.append((step, noise.step))
        return 0.0

    model = double_blob()
    settings = KLSettings(cycle=3, schedule=schedule)
    plain_trainer(model, tmp_path, [KLCallback(settings)], max_steps=3, gradient_accumulation_steps=2).train()
    assert seen[-3:] == [(0, 0), (1, 1), (2, 2)]  # after the forecast of the posterior std, when training begins
    assert training_noise(model).seed == 5


def test_a_loss_that_ignores_the_items_of_the_batch_is_warned_of(tmp_path: Path) -> None:
    """Only where the Trainer takes it for a loss that is divided by their number, and accumulates."""

    class Divided(PlainTrainer):
        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
            return TASK.loss(model, inputs).sum() / num_items_in_batch

    class Passed(Divided):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return super().compute_loss(*args, **kwargs)

    norms = {}
    for owner, scaled, accumulation in [
        (PlainTrainer, None, 4),
        (PlainTrainer, False, 4),
        (Divided, None, 4),
        (Passed, None, 4),
        (PlainTrainer, None, 1),
    ]:
        made = plain_trainer(
            double_blob(),
            tmp_path,
            [KLCallback(KLSettings(cycle=2))],
            owner,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=accumulation,
        )
        made.loss_is_scaled_for_ga = scaled
        if (owner, scaled, accumulation) == (PlainTrainer, None, 4):
            with pytest.warns(BayestuneWarning, match=r"PlainTrainer.compute_loss .* 4 times too large"):
                made.train()
        else:
            made.train()
        norms[owner, scaled, accumulation] = made.state.log_history[0]["grad_norm"]
    assert norms[PlainTrainer, None, 4] == pytest.approx(4 * norms[PlainTrainer, False, 4], rel=1e-12)
    assert norms[Divided, None, 4] == pytest.approx(norms[PlainTrainer, False, 4], rel=1e-12)


def test_the_log_of_a_plain_trainer_has_the_kl_and_the_std(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Reporter(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    model = double_blob()
    made = plain_trainer(model, tmp_path, [Reporter(), KLCallback(KLSettings(cycle=2))], max_steps=2)
    made.train()
    expected = posterior_summary(gaussian_layers(model).values())
    for logs in (seen[1], made.state.log_history[1]):
        assert {name: logs[name] for name in ("kl", "std")} == expected
    assert "kl" not in made.state.log_history[-1]  # the summary of the run


@pytest.mark.property("N09")
def test_decay_of_G_is_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(double_blob(), tmp_path, [KLCallback(KLSettings(cycle=3))], weight_decay=0.01)
    with pytest.raises(ConfigError, match="weight_decay=0.01"):
        trainer.train()


def test_learning_rate_of_zero_is_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(double_blob(), tmp_path, [KLCallback(KLSettings(cycle=3))], learning_rate=0.0)
    with pytest.raises(ConfigError, match="learning_rate: found 0"):
        trainer.train()


@pytest.mark.parametrize("kind", ["linear", "constant", "reduce_lr_on_plateau"])
def test_the_rate_of_the_kl_is_a_share_of_the_peak(tmp_path: Path, kind: str) -> None:
    """Only the KL moves G here: with weight 1 in one update out of four, G tells which rate was used."""
    model = double_blob()
    layer = next(iter(gaussian_layers(model).values()))
    expected = double_blob()
    reference = gaussian_layers(expected)[layer.name]
    shares = {"linear": [1.0, 0.75, 0.5, 0.25], "constant": [1.0] * 4, "reduce_lr_on_plateau": [1.0] * 4}[kind]
    settings = KLSettings(cycle=4, schedule=lambda step, cycle: 1e-3, learning_rate=0.01)
    evaluation = (
        {"eval_strategy": "no"} if kind != "reduce_lr_on_plateau" else {"eval_strategy": "steps", "eval_steps": 9}
    )
    trainer = BayesTrainer(
        model,
        task=TASK,
        args=arguments(tmp_path, max_steps=4, lr_scheduler_type=kind, **evaluation),
        train_rows=rows(4),
        eval_rows=rows(2),
        kl=settings,
        callbacks=[ForgetNll()],
    )
    trainer.train()
    for share in shares:
        kl_step([reference], rate=0.01 * share, weight=1e-3, along_nll=False)
    assert (layer.rho - reference.rho).abs().max() <= 1e-15


class ForgetNll(TrainerCallback):
    """Drops the NLL gradient of G before the KL step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in gaussian_layers(kwargs["model"]).values():
            layer.rho.grad = None


def test_callback_without_gaussian_layers_is_refused(tmp_path: Path) -> None:
    trainer = plain_trainer(lora(), tmp_path, [KLCallback(KLSettings(cycle=3))])
    with pytest.raises(ConfigError, match="no Gaussian layer"):
        trainer.train()


@pytest.mark.property("N01")
def test_callback_restores_float32(tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.build().bfloat16(), LLAMA.config())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.bfloat16()  # what SFTTrainer does on a quantised base
    plain_trainer(model, tmp_path, [KLCallback(KLSettings(cycle=3))])
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
