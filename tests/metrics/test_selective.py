"""Risk-coverage, AURC and thresholds against brute force in fractions, closed forms, and scipy's exact interval."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import scipy.stats
import torch
from hypothesis import given, settings

from bayestune import metrics
from bayestune.errors import ConfigError, DataError

# Confidences with many ties, and their correctness.
ROWS = st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.75, 1.0]), st.booleans()), min_size=1, max_size=40)


def tensors(rows):
    return torch.tensor([c for c, _ in rows], dtype=torch.float64), torch.tensor([y for _, y in rows])


def accepted(rows, threshold):
    """(rows, wrong rows) at or above the threshold."""
    inside = [correct for confidence, correct in rows if confidence >= threshold]
    return len(inside), inside.count(False)


@given(ROWS)
@settings(deadline=None, derandomize=True)
def test_the_curve_has_one_point_a_distinct_confidence(rows):
    coverage, risk = metrics.risk_coverage(*tensors(rows))
    points = [accepted(rows, threshold) for threshold in sorted({c for c, _ in rows}, reverse=True)]
    assert coverage.tolist() == [n / len(rows) for n, _ in points]
    assert risk.tolist() == [wrong / n for n, wrong in points]
    assert coverage[-1] == 1


@given(ROWS)
@settings(deadline=None, derandomize=True)
def test_aurc_is_the_mean_risk_over_the_rows_thresholds(rows):
    risks = [Fraction(wrong, n) for n, wrong in (accepted(rows, confidence) for confidence, _ in rows)]
    # At most 6 terms of a difference, a product and a sum in float64.
    assert metrics.aurc(*tensors(rows)) == pytest.approx(float(sum(risks) / len(rows)), abs=1e-14)


@pytest.mark.parametrize(("rows", "wrong"), [(1, 0), (1, 1), (10, 0), (10, 3), (10, 10), (500, 137)])
def test_aurc_of_a_perfect_order_and_of_none_is_the_closed_form(rows, wrong):
    correct = torch.arange(rows) < rows - wrong
    perfect = -torch.arange(rows, dtype=torch.float64)
    expected = sum(k / (rows - wrong + k) for k in range(1, wrong + 1)) / rows
    assert metrics.aurc(perfect, correct) == pytest.approx(expected, abs=1e-13)
    assert metrics.aurc(torch.ones(rows), correct) == pytest.approx(wrong / rows, abs=1e-15)


def test_the_order_of_rows_does_not_count():
    generator = torch.Generator().manual_seed(0)
    confidence, correct = (
        torch.randint(4, (50,), generator=generator).double(),
        torch.rand(50, generator=generator) > 0.4,
    )
    order = torch.randperm(50, generator=generator)
    assert metrics.aurc(confidence[order], correct[order]) == metrics.aurc(confidence, correct)
    found = metrics.threshold_for_error(confidence[order], correct[order], 0.4)
    assert found == metrics.threshold_for_error(confidence, correct, 0.4)


@given(ROWS, st.sampled_from([0.0, 0.05, 0.1, 0.2, 1 / 3, 0.5, 1.0]))
@settings(deadline=None, derandomize=True)
def test_the_threshold_is_the_smallest_that_qualifies(rows, target):
    found = metrics.threshold_for_error(*tensors(rows), target)
    qualify = {}
    for threshold in {c for c, _ in rows}:
        n, wrong = accepted(rows, threshold)
        if wrong / n <= target:
            qualify[threshold] = (n, wrong)
    if not qualify:
        assert (found.threshold, found.error, found.coverage, found.rows) == (None, None, 0.0, 0)
        assert found.interval == (0.0, 1.0)
        return
    n, wrong = qualify[min(qualify)]
    assert (found.threshold, found.rows, found.coverage) == (min(qualify), n, n / len(rows))
    assert found.error == wrong / n and found.target == target
    assert found.interval == metrics.binomial_interval(wrong, n)


def test_thresholds_below_one_that_fails_are_tried():
    # The surest row is wrong: error 1, then 1/2, ..., 1/10 when all ten are accepted.
    confidence = torch.arange(10, 0, -1) / 10
    found = metrics.threshold_for_error(confidence, torch.arange(10) > 0, 0.1)
    assert found.coverage == 1 and found.error == 0.1 and found.threshold == pytest.approx(0.1)


def test_a_target_met_exactly_is_met():
    for rows, target in ((20, 0.05), (10, 0.1), (5, 0.2), (3, 1 / 3)):
        confidence, correct = torch.ones(rows), torch.arange(rows) > 0
        assert metrics.threshold_for_error(confidence, correct, target).coverage == 1


@pytest.mark.parametrize("level", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("rows", [1, 2, 17, 300, 3270])
def test_the_interval_is_the_exact_one_of_scipy(rows, level):
    for count in sorted({0, 1, rows // 20, rows // 2, rows - 1, rows}):
        expected = scipy.stats.binomtest(count, rows).proportion_ci(confidence_level=level, method="exact")
        found = metrics.binomial_interval(count, rows, level=level)
        # log of a binomial coefficient of 3,270 rows is up to 2,300, so 16 digits of it leave 2,300 x 2e-16 = 5e-13
        # of the probability; the end moves by at most that times p(1-p)-scale slopes below 1.
        assert found == pytest.approx((expected.low, expected.high), abs=5e-12)
        assert found[0] <= count / rows <= found[1]


def test_the_interval_covers_the_truth():
    """Exactly summed over all outcomes, and never below its level."""
    for rows, share in ((20, 0.05), (20, 0.3), (60, 0.1), (60, 0.5)):
        covered = 0.0
        for count in range(rows + 1):
            low, high = metrics.binomial_interval(count, rows)
            covered += math.comb(rows, count) * share**count * (1 - share) ** (rows - count) * (low <= share <= high)
        assert 0.95 - 1e-12 <= covered < 1


def test_nothing_of_nothing_says_nothing():
    assert metrics.binomial_interval(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("count", "rows", "level"), [(-1, 3, 0.95), (4, 3, 0.95), (1, 3, 0.0), (1, 3, 1.0), (1, 3, math.nan)]
)
def test_an_impossible_interval_is_refused(count, rows, level):
    with pytest.raises(ConfigError, match=f"found count={count}, rows={rows}, level={level}, expected"):
        metrics.binomial_interval(count, rows, level=level)


@pytest.mark.parametrize("target", [-0.1, 1.1, math.nan])
def test_an_impossible_target_is_refused(target):
    with pytest.raises(ConfigError, match=f"target is {target}, expected an error rate"):
        metrics.threshold_for_error(torch.ones(2), torch.tensor([0, 1]), target)


@pytest.mark.parametrize("function", [metrics.risk_coverage, metrics.aurc])
def test_rows_that_cannot_be_scored_are_named(function):
    with pytest.raises(DataError, match="row 1 has confidence nan and correct 1, expected"):
        function(torch.tensor([0.0, math.nan]), torch.tensor([1, 1]))
    with pytest.raises(DataError, match="row 2 has confidence 0.0 and correct 2, expected"):
        function(torch.zeros(3), torch.tensor([1, 0, 2]))
    with pytest.raises(DataError, match="at least one row"):
        function(torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def test_infinite_confidences_are_ordered_and_inputs_left_alone():
    confidence, correct = torch.tensor([math.inf, 0.0, -math.inf]), torch.tensor([1, 1, 0])
    kept = confidence.clone()
    assert metrics.risk_coverage(confidence, correct)[1].tolist() == [0, 0, 1 / 3]
    assert torch.equal(confidence, kept)
