"""The KL of a billion weights, on the scale of nats by the billion, beside an NLL of order 1."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from bayestune.adapters import GaussianLinear, gaussian_layers
from bayestune.functional import gaussian_kl_gradient
from bayestune.training import BayesTrainer, KLSettings, elbo_kl_weight
from models import GPT2, blob
from training.toys import TASK, Recorder, arguments, double_blob, rows, trained

Figure = Callable[..., None]
LAYERS, WEIGHTS, PRIOR_STD = 30_517, 32_768, 0.2  # a billion weights, 4 nats each


def different_layers(count: int, inputs: int, rank: int, prior_std: float) -> list[GaussianLinear]:
    """Layers as large models have them at their start, no two alike."""
    generator = torch.Generator().manual_seed(0)
    layers = []
    for i in range(count):
        linear = nn.Linear(inputs, rank, bias=False)
        with torch.no_grad():
            linear.weight.copy_(torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs))
        layers.append(GaussianLinear.from_linear(linear, name=str(i), prior_std=prior_std, rho_init=0.05))
    return layers


def repeated(layers: list[GaussianLinear], count: int) -> dict[str, GaussianLinear]:
    return {str(i): layer for i, layer in zip(range(count), itertools.cycle(layers), strict=False)}


def reference_kl(layers: list[GaussianLinear], count: int) -> float:
    """Of `count` layers, these in turn; in float64 throughout, from torch's own normals."""
    kls = []
    for layer in layers:
        posterior = Normal(layer.weight.detach().double(), layer.rho.detach().double() ** 2)
        kls.append(
            kl_divergence(posterior, Normal(torch.zeros((), dtype=torch.float64), layer.prior_std)).sum().item()
        )
    return math.fsum(itertools.islice(itertools.cycle(kls), count))


def error_of_log(output: Path, layers: list[GaussianLinear], count: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Relative error of the KL that a trainer logs for `count` layers."""
    trainer = BayesTrainer(double_blob(), task=TASK, args=arguments(output), train_rows=rows(2))
    monkeypatch.setattr(trainer, "_gaussian", repeated(layers, count))
    trainer.log({"loss": 1.25})
    expected = reference_kl(layers, count)
    assert expected > 3.9e9
    return abs(trainer.state.log_history[-1]["kl"] / expected - 1)


@pytest.mark.property("N03")
def test_the_kl_of_billions_of_nats_keeps_its_digits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    layers = different_layers(7, 4, 8, prior_std=1e-3)  # 100,000 nats a weight, for want of weights
    error = error_of_log(tmp_path, layers, 3000, monkeypatch)
    figure("KL over 3,000 layers, relative error", error, at_most=1e-12)


@pytest.mark.property("N03")
@pytest.mark.nightly
def test_the_kl_of_a_billion_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure) -> None:
    layers = different_layers(7, WEIGHTS // 8, 8, PRIOR_STD)
    figure(
        "KL of a billion weights, relative error", error_of_log(tmp_path, layers, LAYERS, monkeypatch), at_most=1e-12
    )


@pytest.mark.property("N04")
def test_the_log_has_a_small_nll_and_a_large_kl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    layers = different_layers(7, 4, 8, prior_std=1e-5)
    kl = KLSettings(cycle=1, schedule=elbo_kl_weight(4))
    args = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    trainer = Recorder(double_blob(), task=TASK, args=args, train_rows=rows(4), kl=kl)
    monkeypatch.setattr(trainer, "_gaussian", repeated(layers, 7))
    trainer.train()
    entry = json.loads(json.dumps(trainer.state.log_history[0]))
    expected = math.fsum(trainer.losses)
    assert 0.1 < expected < 10 and entry["kl"] > 4e9
    # transformers adds up the losses between two logs in float32.
    figure("logged NLL, relative error", abs(entry["nll"] / expected - 1), at_most=4 * torch.finfo(torch.float32).eps)
    figure("logged KL, relative error", abs(entry["kl"] / reference_kl(layers, 7) - 1), at_most=1e-12)


@pytest.mark.property("N04")
def test_an_update_is_the_sum_of_its_two_parts(tmp_path: Path, figure: Figure) -> None:
    """In float32, with the KL of four rows: G moves by eta (NLL gradient) + eta / 4 (KL gradient), M as stated."""
    rate, weight = 0.01, 0.25
    after, layers = [], {}
    for schedule in (lambda step, cycle: 0.0, elbo_kl_weight(4)):
        model = blob(GPT2)
        start = trained(model)
        kl = KLSettings(cycle=1, schedule=schedule, learning_rate=rate)
        args = arguments(tmp_path, per_device_train_batch_size=4)
        BayesTrainer(model, task=TASK, args=args, train_rows=rows(4), kl=kl).train()
        after.append(trained(model))
        layers = gaussian_layers(model)
    worst, smallest = 0.0, math.inf
    for name, layer in layers.items():
        mean, rho = (next(key for key in start if name in key and part in key) for part in ("A.default.weight", "rho"))
        d_mean, d_rho = gaussian_kl_gradient(after[0][mean].double(), start[rho].double(), layer.prior_std)
        for key, gradient in ((mean, d_mean), (rho, d_rho)):
            expected = after[0][key].double() - rate * weight * gradient
            unit = torch.finfo(torch.float32).eps * start[key].abs().max().item()
            worst = max(worst, (after[1][key] - expected).abs().max().item() / unit)
            parts = ((after[0][key] - start[key]).abs(), (after[1][key] - after[0][key]).abs())
            smallest = min(smallest, *(part.median().item() / unit for part in parts))
    figure("update less the sum of its parts, in the last digits of float32", worst, at_most=4)
    figure("median of the smaller part, in the last digits of float32", smallest, at_least=40)
