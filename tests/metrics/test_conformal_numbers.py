"""Conformal intervals of numbers: exact coverage under exchangeability, and what is refused."""

import math

import pytest
import torch
from torch import Tensor

from bayestune import metrics
from bayestune.errors import ConfigError, DataError


def simulated(rows: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Biased means, targets, and stds that know which rows are hard."""
    generator = torch.Generator().manual_seed(seed)
    stds = 0.1 + 5 * torch.rand(rows, generator=generator, dtype=torch.float64)
    means = torch.randn(rows, generator=generator, dtype=torch.float64)
    return means, 0.3 + means + stds * torch.randn(rows, generator=generator, dtype=torch.float64), stds


@pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("scaled", [False, True])
def test_each_row_in_turn_is_covered_as_often_as_the_rank_says(alpha: float, scaled: bool) -> None:
    """Of n + 1 rows, exactly ceil((n + 1)(1 - alpha)) are inside the interval that the n others calibrate."""
    means, targets, stds = simulated(40)
    scales = stds if scaled else torch.ones_like(stds)
    inside = 0
    for row in range(40):
        others = torch.arange(40) != row
        width = metrics.conformal_width(means[others], targets[others], stds[others] if scaled else None, alpha=alpha)
        inside += int((targets[row] - means[row]).abs() <= width * scales[row])
    assert inside == math.ceil(40 * (1 - alpha))


def test_a_scale_that_knows_which_rows_are_hard_gives_narrower_intervals() -> None:
    """And both cover: their coverage is that of 4000 rows, give or take three standard errors."""
    means, targets, stds = simulated(8000)
    plain, scaled = (metrics.split_conformal_intervals(means, targets, each, seed=3) for each in (None, stds))
    assert (plain.calibration_rows, plain.rows) == (4000, 4000)
    error = 3 * math.sqrt(2 * 0.1 * 0.9 / 4000)  # of the calibration and of the coverage
    assert abs(plain.coverage - 0.9) <= error and abs(scaled.coverage - 0.9) <= error
    assert scaled.width < plain.width
    assert plain.width == pytest.approx(2 * plain.threshold, rel=1e-12)


def test_rows_that_cannot_calibrate_are_refused() -> None:
    means, targets, stds = simulated(12)
    with pytest.raises(DataError, match="found 8 calibration rows, expected at least 9 for alpha=0.1"):
        metrics.conformal_width(means[:8], targets[:8])
    with pytest.raises(DataError, match=r"conformal: means \(12,\), targets \(8,\)"):
        metrics.conformal_width(means, targets[:8])
    with pytest.raises(DataError, match="a scale of 0"):
        metrics.conformal_width(means, targets, 0 * stds)
    with pytest.raises(ConfigError, match="alpha is 1.0"):
        metrics.conformal_width(means, targets, alpha=1.0)
