"""Differences of two methods on the same rows, against closed forms."""

import math

import pytest
import torch

from bayestune import metrics
from bayestune.errors import ConfigError, DataError


def test_a_constant_difference_has_an_interval_of_no_width() -> None:
    reference = torch.randint(0, 9, (3, 40), generator=torch.Generator().manual_seed(0)).double() / 8
    found = metrics.paired_interval(reference - 0.125, reference)
    assert (found.mean, found.low, found.high) == (-0.125, -0.125, -0.125)


def test_what_differs_between_seeds_but_not_between_rows_has_no_width() -> None:
    """The difference is averaged over seeds before rows are drawn: the offsets -1/4, 0 and 1 of the seeds give 1/4."""
    reference = torch.arange(30, dtype=torch.float64).expand(3, -1)
    found = metrics.paired_interval(reference + torch.tensor([[-0.25], [0.0], [1.0]]), reference)
    assert (found.mean, found.low, found.high) == (0.25, 0.25, 0.25)


def test_one_resample_of_the_rows_serves_all_seeds() -> None:
    """Opposite noise in two seeds cancels in each row, so only the common part is left, as with one seed."""
    generator = torch.Generator().manual_seed(1)
    common, noise, reference = torch.randn(3, 1, 100, generator=generator, dtype=torch.float64)
    both = metrics.paired_interval(reference + common + torch.cat([noise, -noise]), reference.expand(2, -1))
    alone = metrics.bootstrap_interval(common[0])
    assert (both.low, both.high) == pytest.approx(alone, abs=1e-12)
    assert both.mean == pytest.approx(common.mean().item(), abs=1e-12)


def test_a_known_difference_is_covered_at_the_level() -> None:
    """A normal mean of 0.1 with a std of 1 per row: 95 % of 400 intervals, less 1 % for 100 rows, within 4 errors."""
    generator, covered, trials = torch.Generator().manual_seed(2), 0, 400
    for trial in range(trials):
        reference = 3 * torch.randn(2, 100, generator=generator, dtype=torch.float64)
        change = 0.1 + torch.randn(1, 100, generator=generator, dtype=torch.float64)
        found = metrics.paired_interval(reference + change, reference, resamples=400, seed=trial)
        covered += found.low <= 0.1 <= found.high
        assert found.high - found.low < 0.6  # the rows' own variance of 9 does not enter
    assert abs(covered / trials - 0.94) < 4 * math.sqrt(0.95 * 0.05 / trials)


def test_scores_that_are_not_pairs_are_refused() -> None:
    for scores, reference in (((2, 5), (1, 5)), ((2, 5), (2, 4)), ((5,), (5,)), ((2, 0), (2, 0)), ((0, 5), (0, 5))):
        with pytest.raises(DataError, match=r"paired interval: scores of shapes .* expected twice \[seeds, rows\]"):
            metrics.paired_interval(torch.zeros(scores), torch.zeros(reference))
    with pytest.raises(DataError, match="the value of row 1 is nan"):
        metrics.paired_interval(torch.tensor([[0.0, math.inf]]), torch.tensor([[0.0, math.inf]]))
    with pytest.raises(ConfigError, match="level"):
        metrics.paired_interval(torch.zeros(1, 2), torch.zeros(1, 2), level=1.0)
