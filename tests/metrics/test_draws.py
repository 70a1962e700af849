"""How far draws differ, against closed forms and simulation."""

import math
from dataclasses import asdict

import pytest
import torch

from bayestune import metrics
from bayestune.errors import DataError


def gaussian_draws(draws: int, rows: int, std: float, seed: int = 0) -> torch.Tensor:
    """Log-probabilities whose logits are Gaussian about a mean."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(1, rows, 3, generator=generator, dtype=torch.float64)
    return (mean + std * torch.randn(draws, rows, 3, generator=generator, dtype=torch.float64)).log_softmax(-1)


def test_the_logit_variance_is_that_of_centered_gaussian_logits() -> None:
    """Centering over c classes keeps (c - 1) / c of the variance of independent logits."""
    draws, rows, std = 50, 400, 0.3
    found = metrics.spread(gaussian_draws(draws, rows, std)).logit_variance
    expected = std**2 * 2 / 3
    error = expected * math.sqrt(2 / (draws * rows * 2))  # two free logits a row
    assert abs(found - expected) < 4 * error


def test_classes_that_a_row_lacks_do_not_count() -> None:
    log_probs = gaussian_draws(20, 30, 0.5)
    wide = torch.nn.functional.pad(log_probs, (0, 2), value=-math.inf)
    assert asdict(metrics.spread(wide)) == pytest.approx(asdict(metrics.spread(log_probs)), rel=1e-12)


def test_equal_draws_have_no_spread() -> None:
    log_probs = gaussian_draws(1, 5, 1.0).expand(4, -1, -1)
    found = metrics.spread(log_probs)
    assert found.logit_variance == pytest.approx(0, abs=1e-15) and found.excess_nll == pytest.approx(0, abs=1e-15)
    assert found.draws_needed() == 1
    logits = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]]])
    assert metrics.spread(logits.log_softmax(-1)).mean_logit_variance == pytest.approx(1)


def test_the_excess_nll_is_that_of_few_draws_and_falls_as_one_over_their_number() -> None:
    """The NLL of 8 draws less that of 4,000, under labels of the 4,000, repeated over rows."""
    many = gaussian_draws(4000, 2000, 0.4)
    probs = many.exp().mean(0)

    def expected_nll(draws: int) -> torch.Tensor:
        few = many[:draws].exp().mean(0)
        return -(probs * few.log()).sum(-1)

    excess = expected_nll(8) - torch.special.entr(probs).sum(-1)
    error = excess.std().item() / math.sqrt(len(excess))
    found = metrics.spread(many[:8])
    assert abs(found.excess_nll - excess.mean().item()) < 4 * error + 0.05 * found.excess_nll  # of third order
    assert found.draws_needed(found.excess_nll) == 8
    assert found.draws_needed(found.excess_nll / 10) == 80


def test_the_excess_nll_is_the_mutual_information_by_the_draws() -> None:
    """To second order in the spread; of 8 draws, the information that they show is 7/8 of all."""
    std = 0.05
    found = metrics.spread(gaussian_draws(8, 2000, std))
    assert found.excess_nll == pytest.approx(found.epistemic / 7, rel=4 * std**2)


def test_one_draw_has_no_spread() -> None:
    with pytest.raises(DataError, match="found 1 draws of 5 rows, expected at least 2 draws"):
        metrics.spread(gaussian_draws(1, 5, 1.0))
