"""The width that the KL alone gives: against the KL step itself, its limits, and a real run."""

import math
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from bayestune.adapters import GaussianLinear, gaussian_layers
from bayestune.errors import ConfigError
from bayestune.functional import cycle_steps, linear_kl_weight, paper_kl_weight, std, uniform_kl_weight
from bayestune.training import (
    BayesTrainer,
    KLSettings,
    elbo_kl_weight,
    initial_std,
    kl_only_std,
    kl_rate_for_std,
)
from bayestune.training.kl import kl_step
from training.toys import TASK, arguments, double_blob, rows

SCHEDULES = {
    "paper": paper_kl_weight,
    "uniform": uniform_kl_weight,
    "linear": linear_kl_weight,
    "elbo": elbo_kl_weight(20),
}


def layer_at(start: float, prior_std: float) -> GaussianLinear:
    """A Gaussian layer in float64 whose every weight has the standard deviation `start`."""
    layer = next(iter(gaussian_layers(double_blob(prior_std=prior_std)).values()))
    with torch.no_grad():
        layer.rho.fill_(math.sqrt(start))
    return layer


@pytest.mark.parametrize(
    ("schedule", "updates", "warmup"),
    [("paper", 1, 0.0), ("uniform", 7, 0.06), ("linear", 40, 0.5), ("elbo", 100, 0.06)],
)
def test_the_recursion_is_the_kl_step_under_transformers_schedule(schedule: str, updates: int, warmup: float) -> None:
    start, prior_std, rate, cycle = 0.004, 0.3, 0.02, 9
    layer = layer_at(start, prior_std)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=rate)
    course = get_scheduler(
        "linear", optimizer, num_warmup_steps=math.ceil(warmup * updates), num_training_steps=updates
    )
    for step in range(updates):
        kl_step(
            [layer], rate=optimizer.param_groups[0]["lr"], weight=SCHEDULES[schedule](step, cycle), along_nll=False
        )
        optimizer.step()
        course.step()
    given = {"cycle": cycle, "start": start, "prior_std": prior_std, "schedule": SCHEDULES[schedule]}
    found = kl_only_std(rate, updates=updates, warmup=warmup, **given)
    # Weights below 1e-12 are left out; each would move std by at most 4 x rate x weight.
    assert found == pytest.approx(std(layer.rho).mean().item(), rel=1e-12, abs=updates * 4 * rate * 1e-12)


def test_a_run_that_learns_nothing_ends_at_the_width(tmp_path: Path) -> None:
    """Where B stays 0, no gradient of the NLL reaches G."""
    given = {"updates": 20, "cycle": 5, "start": 0.0025, "prior_std": 0.2}
    model = double_blob()
    with torch.no_grad():
        for layer in gaussian_layers(model).values():
            layer.rho.fill_(0.05)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    settings = {"max_steps": 20, "warmup_steps": 0.06, "lr_scheduler_type": "linear", "learning_rate": 1e-12}
    BayesTrainer(
        model,
        task=TASK,
        args=arguments(tmp_path, **settings),
        train_rows=rows(8),
        kl=KLSettings(cycle=5, learning_rate=kl_rate_for_std(0.06, **given)),
    ).train()
    for layer in gaussian_layers(model).values():
        # The learning rates are float64 products of 1e-12; B of 20 such steps moves G by less than 1e-9.
        assert (std(layer.rho) - 0.06).abs().max() <= 1e-9


@pytest.mark.parametrize(
    ("schedule", "target", "updates"),
    [("paper", 0.06, 300), ("uniform", 0.01, 60), ("linear", 0.19, 5000), ("elbo", 0.06, 300)],
)
def test_the_rate_for_a_width_gives_it(schedule: str, target: float, updates: int) -> None:
    given = {"updates": updates, "cycle": cycle_steps(640, 32), "start": 0.0018, "prior_std": 0.2}
    rate = kl_rate_for_std(target, schedule=SCHEDULES[schedule], **given)
    assert 0 < rate < 0.2**2
    assert kl_only_std(rate, schedule=SCHEDULES[schedule], **given) == pytest.approx(target, rel=1e-9)


def test_small_steps_grow_the_width_by_four_times_the_rate_a_weight() -> None:
    """``artanh(std / s_p)`` grows by ``4 eta sum(c pi) / s_p``: the recursion as a differential equation."""
    start, prior_std, cycle, updates = 0.05, 0.2, 20_000, 20_000
    rate = kl_rate_for_std(
        0.1, updates=updates, cycle=cycle, start=start, prior_std=prior_std, schedule=uniform_kl_weight, warmup=0.0
    )
    shares = sum((updates - step) / updates for step in range(updates)) / cycle
    expected = prior_std * (math.atanh(0.1 / prior_std) - math.atanh(start / prior_std)) / (4 * shares)
    # Euler's error in one step of h = 4 eta / updates is of the order h relative to the width.
    assert rate == pytest.approx(expected, rel=4 * expected / updates / start * 10)


@pytest.mark.parametrize("start", [0.2, 0.35])
def test_a_start_wider_than_the_prior_shrinks_to_it(start: float) -> None:
    layer = layer_at(start, 0.2)
    for step in range(30):
        kl_step([layer], rate=0.01 * (30 - step) / 30, weight=uniform_kl_weight(step, 5), along_nll=False)
    found = kl_only_std(0.01, updates=30, cycle=5, start=start, prior_std=0.2, schedule=uniform_kl_weight, warmup=0.0)
    assert found == pytest.approx(std(layer.rho).mean().item(), rel=1e-12)


def test_the_means_shrink_as_the_docstring_says() -> None:
    """``log M`` falls by ``sum(eta c pi) / s_p^2``, in small steps ``(std - start) / (4 s_p^2)``."""
    given = {"updates": 1000, "cycle": 1000, "start": 0.01, "prior_std": 1.0}
    rate = kl_rate_for_std(0.06, schedule=uniform_kl_weight, warmup=0.0, **given)
    layer = layer_at(0.01, 1.0)
    before = layer.weight.detach().clone()
    for step in range(1000):
        kl_step([layer], rate=rate * (1000 - step) / 1000, weight=1 / 1000, along_nll=False)
    factor = (layer.weight / before).mean().item()
    # Against the limit: (std / s_p)^2 = 0.4 % of the growth, and a step of a thousandth.
    assert math.log(factor) == pytest.approx(-(0.06 - 0.01) / 4, rel=0.01)


def test_a_run_too_short_has_the_largest_rate_and_stays_narrower() -> None:
    given = {"updates": 10, "cycle": 39, "start": 0.0018, "prior_std": 0.2}
    assert kl_rate_for_std(0.06, **given) == 0.2**2
    assert 0.0018 < kl_only_std(0.2**2, **given) < 0.0019


@pytest.mark.parametrize("target", [0.0018, 0.2, math.nan])
def test_a_width_outside_the_start_and_the_prior_is_refused(target: float) -> None:
    with pytest.raises(ConfigError, match=r"posterior_std: found .* expected more than the start, 0.0018"):
        kl_rate_for_std(target, updates=100, cycle=39, start=0.0018, prior_std=0.2)


def test_the_first_width_is_the_mean_over_the_start_of_G() -> None:
    """``E[G^2]`` of a uniform, by its mean and variance."""
    low, high = 0.05 / math.sqrt(2), 0.05
    assert initial_std(0.05) == pytest.approx(((low + high) / 2) ** 2 + (high - low) ** 2 / 12, rel=1e-12)
