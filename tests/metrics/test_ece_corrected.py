"""The corrected ECE: its closed form for one bin, and an interval that contains it."""

import math

import pytest
import torch
from scipy.stats import binom

from bayestune import metrics

RESAMPLES = 4000


def two_classes(confidence: torch.Tensor) -> torch.Tensor:
    return torch.stack([confidence, 1 - confidence], 1).double().log()


@pytest.mark.parametrize("right", [60, 70, 78])
def test_one_bin_has_the_closed_form_of_a_binomial(right: int) -> None:
    rows, confidence = 100, 0.78
    labels = (torch.arange(rows) >= right).long()  # class 0 is the answer of every row
    plain = abs(right / rows - confidence)
    counts = range(rows + 1)
    resampled = [abs(count / rows - confidence) for count in counts]
    weights = [binom.pmf(count, rows, right / rows) for count in counts]
    mean = sum(weight * value for weight, value in zip(weights, resampled, strict=True))
    square = sum(weight * value**2 for weight, value in zip(weights, resampled, strict=True))
    error = math.sqrt((square - mean**2) / RESAMPLES)
    log_probs = two_classes(torch.full((rows,), confidence))
    found, _ = metrics.ece_corrected(log_probs, labels, resamples=RESAMPLES)
    assert found == pytest.approx(max(0.0, 2 * plain - mean), abs=4 * error)


@pytest.mark.parametrize("seed", range(20))
def test_the_interval_contains_the_estimate_and_both_are_below_the_plain_ece(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    confidence = 0.5 + 0.5 * torch.rand(200, generator=generator)
    labels = (torch.rand(200, generator=generator) > confidence).long()  # calibrated: the true ECE is 0
    log_probs = two_classes(confidence)
    found, (low, high) = metrics.ece_corrected(log_probs, labels, resamples=200, seed=seed)
    assert 0 <= low <= found <= high
    assert found < metrics.ece(log_probs, labels)
