"""Average precision against its definition in exact fractions and scikit-learn; what both rankings refuse."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from bayestune import metrics
from bayestune.errors import ConfigError, DataError


def oracle_aupr(scores, positives):
    """sum over thresholds from high to low of (recall gained) x precision, in fractions."""
    total, recall = Fraction(0), Fraction(0)
    for threshold in sorted(set(scores.tolist()), reverse=True):
        found = scores >= threshold
        now = Fraction(int(positives[found].sum()), int(positives.sum()))
        total += (now - recall) * Fraction(int(positives[found].sum()), int(found.sum()))
        recall = now
    return float(total)


@pytest.mark.property("S19")
@given(st.data(), st.integers(2, 40))
@settings(deadline=None, derandomize=True)
def test_aupr_is_its_definition_in_fractions_with_ties(data, rows):
    scores = data.draw(arrays(np.float64, rows, elements=st.sampled_from([-math.inf, -1, 0, 0.5, 2, math.inf])))
    positives = data.draw(arrays(np.bool_, rows))
    positives[:2] = [True, False]
    found = metrics.aupr(torch.tensor(scores), torch.tensor(positives))
    # At most 6 terms, each of a quotient, a product and a sum in float64.
    assert found == pytest.approx(oracle_aupr(scores, positives), abs=1e-14)
    finite = np.nan_to_num(scores, posinf=9, neginf=-9)
    assert found == pytest.approx(sklearn.metrics.average_precision_score(positives, finite), abs=1e-14)


@pytest.mark.property("S19")
def test_aupr_agrees_with_scikit_learn_on_many_rows():
    generator = torch.Generator().manual_seed(1)
    for decimals in (1, 8):
        scores = torch.randn(5000, generator=generator, dtype=torch.float64).round(decimals=decimals)
        positives = scores + 2 * torch.randn(5000, generator=generator) > 2
        expected = sklearn.metrics.average_precision_score(positives, scores)
        assert metrics.aupr(scores, positives.long()) == pytest.approx(expected, abs=1e-12)


@pytest.mark.property("S19")
def test_aupr_of_known_rankings():
    positives = torch.tensor([1, 1, 0, 0, 0])
    assert metrics.aupr(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]), positives) == 1.0
    assert metrics.aupr(torch.zeros(5), positives) == 0.4
    worst = (1 / 4 + 2 / 5) / 2
    assert metrics.aupr(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), positives) == pytest.approx(worst, abs=1e-15)


@pytest.mark.property("S19")
def test_the_order_of_rows_does_not_count():
    generator = torch.Generator().manual_seed(2)
    scores = torch.randint(5, (60,), generator=generator).double()
    positives = torch.randint(2, (60,), generator=generator)
    order = torch.randperm(60, generator=generator)
    assert metrics.aupr(scores[order], positives[order]) == metrics.aupr(scores, positives)


@pytest.mark.property("S19")
@pytest.mark.parametrize("score", [metrics.auroc, metrics.aupr])
def test_what_cannot_be_ranked_is_refused_by_row(score):
    name = score.__name__
    with pytest.raises(DataError, match=f"{name}: the score of row 1 is NaN"):
        score(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))
    with pytest.raises(DataError, match=f"{name}: positives of row 1 is 2, expected 0 or 1"):
        score(torch.tensor([0.0, 1.0]), torch.tensor([0, 2]))
    for positives in (torch.tensor([True, True]), torch.tensor([False, False])):
        with pytest.raises(DataError, match=f"{name}: .* expected at least one of each"):
            score(torch.tensor([0.0, 1.0]), positives)


def test_the_matched_auroc_leaves_out_what_sizes_alone_separate() -> None:
    """The score is the length plus a part that says nothing: it separates long from short rows, and nothing else."""
    generator = torch.Generator().manual_seed(0)
    rows = 4000
    positives = torch.rand(rows, generator=generator) < 0.5
    lengths = torch.exp(3 + 0.5 * positives + 0.3 * torch.randn(rows, generator=generator))
    assert metrics.auroc(lengths, positives) > 0.8
    fair = torch.randn(rows, generator=generator)
    matched = metrics.matched_auroc(lengths.log() + 3 * fair, positives, lengths, within=0.01)
    assert matched is not None and abs(matched - 0.5) < 4 / math.sqrt(12 * rows / 4)  # a rank sum of rows / 4 or more
    assert metrics.matched_auroc(fair, positives, torch.ones(rows)) == pytest.approx(metrics.auroc(fair, positives))


def test_the_matched_auroc_of_a_few_rows() -> None:
    scores, positives = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([0, 0, 1, 1])
    assert metrics.matched_auroc(scores, positives, torch.tensor([10, 11, 11, 90])) == 0.75  # beside 10 and 11
    assert metrics.matched_auroc(scores, positives, torch.tensor([10, 20, 30, 40])) is None


def test_the_matched_auroc_refuses_sizes_that_are_not_those_of_the_rows() -> None:
    scores, positives = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0, 1, 1])
    for sizes in (torch.ones(2), torch.ones(1), torch.ones(3, 1)):
        with pytest.raises(DataError, match=r"matched_auroc: scores \(3,\) and sizes .*, expected both \[rows\]"):
            metrics.matched_auroc(scores, positives, sizes)
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(DataError, match=f"the size of row 1 is {wrong}, expected above 0 and finite"):
            metrics.matched_auroc(scores, positives, torch.tensor([1.0, wrong, 1.0]))
    for within in (-0.1, math.nan):
        with pytest.raises(ConfigError, match=f"within is {within}, expected 0 or more"):
            metrics.matched_auroc(scores, positives, torch.ones(3), within=within)
