"""Diagnostics of a posterior: closed forms of the draws, and the widths of adapters whose std is set."""

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model

import bayestune as bt
from bayestune.adapters import gaussian_layers
from bayestune.errors import DataError
from bayestune.inference import Prediction
from bayestune.sampling import Variational
from models import LLAMA, blob


def predicted(log_probs: torch.Tensor) -> Prediction:
    draws, rows, _ = log_probs.shape
    ids = tuple(f"r{i}" for i in range(rows))
    return Prediction(ids=ids, draw_log_probs=log_probs, labels=None, draws=draws, seed=0, task="made")


def two_draws() -> Prediction:
    """Two draws that disagree about one row, and agree about another one."""
    probs = [[[0.75, 0.25], [0.5, 0.5]], [[0.25, 0.75], [0.5, 0.5]]]
    return predicted(torch.tensor(probs, dtype=torch.float64).log())


def test_draws_have_the_closed_forms_as_means_over_rows() -> None:
    """In the first row, each centered logit is + or - log(3)/2, and each probability 1/2 + or - 1/4.

    The sample variances of two values a apart are a^2 / 2: log(3)^2 / 2 of the logits, 1/8 of the probabilities. The
    excess NLL of two draws is 2 (1/8) / (1/2) / (2 * 2) = 1/8 in the first row, so 25/2 draws are within 0.01 nats.
    """
    found = bt.diagnostics(blob(), two_draws())
    epistemic = math.log(2) - (0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    assert found.logit_variance == pytest.approx(math.log(3) ** 2 / 4, rel=1e-12)
    assert found.mean_logit_variance == pytest.approx(0, abs=1e-15)
    assert found.epistemic == pytest.approx(epistemic / 2, rel=1e-12)
    assert found.softmax_factor == pytest.approx(epistemic / (math.log(3) ** 2 / 2), rel=1e-12)
    assert found.draws_needed == 13


@pytest.mark.parametrize("prob", [0.5, 0.9, 0.999])
def test_the_softmax_factor_of_small_spreads_of_two_classes(prob: float) -> None:
    """With the logit difference d, I = p (1 - p) Var[d] / 2 and the logit variance is Var[d] / 4: 2 p (1 - p).

    The epistemic uncertainty of K draws holds (K - 1)/K of the sample variance.
    """
    draws, std = 20, 0.01
    noise = std * torch.randn(draws, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = torch.stack([math.log(prob / (1 - prob)) + noise, torch.zeros_like(noise)], -1)
    factor = bt.diagnostics(blob(), predicted(logits.log_softmax(-1))).softmax_factor
    assert factor == pytest.approx(2 * prob * (1 - prob) * (draws - 1) / draws, rel=4 * std)


def test_equally_probable_classes_have_a_factor_of_one_half_however_the_logits_vary() -> None:
    draws, std = 20, 0.01
    noise = std * torch.randn(draws, 50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise[..., 0] *= 5
    factor = bt.diagnostics(blob(), predicted((noise - noise.mean(0)).log_softmax(-1))).softmax_factor
    assert factor == pytest.approx((draws - 1) / draws / 2, rel=20 * std)


def test_equal_draws_have_no_factor() -> None:
    found = bt.diagnostics(blob(), predicted(torch.randn(1, 5, 3).log_softmax(-1).expand(4, -1, -1)))
    assert found.softmax_factor is None and found.draws_needed == 1


def test_the_widths_are_those_of_the_weights_and_of_the_config() -> None:
    """G uniform on (0.2 / sqrt 2, 0.2) has a mean square of (low^2 + low high + high^2) / 3."""
    model = get_peft_model(LLAMA.build(), LLAMA.config(rho_init=0.2, prior_std=0.5))
    low, high = 0.2 / math.sqrt(2), 0.2
    start = (low**2 + low * high + high**2) / 3
    found = bt.diagnostics(model, two_draws())
    assert found.initial_std == pytest.approx(start, rel=1e-12) and found.prior_std == 0.5
    assert found.mean_std == pytest.approx(start, rel=0.05)  # of the drawn G
    sizes = [layer.rho.numel() for layer in gaussian_layers(model).values()]
    with torch.no_grad():
        for i, layer in enumerate(gaussian_layers(model).values()):
            layer.rho.fill_(0.5 if i == 0 else -0.25)  # a std of 1/4 and 1/16
    expected = (sizes[0] / 4 + sum(sizes[1:]) / 16) / sum(sizes)
    found = bt.diagnostics(Variational(model), two_draws())
    assert found.mean_std == pytest.approx(expected, rel=1e-12)
    assert found.initial_std == pytest.approx(start, rel=1e-12)


@pytest.mark.parametrize("settings", [None, {"distribution": "dropout", "lora_dropout": 0.1}])
def test_adapters_without_gaussian_weights_have_no_widths(settings: dict[str, Any] | None) -> None:
    model = LLAMA.build() if settings is None else get_peft_model(LLAMA.build(), LLAMA.config(**settings))
    found = bt.diagnostics(model, two_draws())
    assert (found.mean_std, found.initial_std, found.prior_std) == (None, None, None)
    assert found.draws_needed == 13


@pytest.mark.parametrize("draws", [0, 1])
def test_fewer_than_two_draws_are_refused(draws: int) -> None:
    with pytest.raises(DataError, match="found 1 draws of 2 rows, expected at least 2 draws"):
        bt.diagnostics(blob(), Prediction(**{**vars(two_draws().first(1)), "draws": draws}))
