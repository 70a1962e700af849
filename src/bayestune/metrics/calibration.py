"""Calibration: whether a share c of the answers given with confidence c is right.

The confidence of a row of class probabilities is that of its answer, its most probable class. `log_probs` and `labels`
are as in `scores`, and are checked in the same way.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayestune.errors import ConfigError, DataError
from bayestune.metrics.bootstrap import percentiles, resampled_means
from bayestune.metrics.scores import SUM_TOLERANCE, checked, row_accuracy, row_brier, row_nll

# exp(log(7 / 20)) is one rounding below 7 / 20. A confidence this close to an edge is on the edge.
EDGE_TOLERANCE = 1e-12


@dataclass(frozen=True, kw_only=True, eq=False)
class ReliabilityBins:
    """Rows by confidence: bin b holds edges[b] <= confidence < edges[b + 1], and the last bin also 1.0.

    Attributes:
        edges: edges of the bins.
        counts: number of rows in each bin.
        confidence: mean confidence of each bin; NaN if it is empty.
        accuracy: accuracy of each bin; NaN if it is empty.
    """

    edges: Float[Tensor, " edges"]
    counts: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]


def ece(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], *, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, equation 3).

    ``ECE = sum_b n_b / n |accuracy_b - confidence_b|`` over bins b of equal width.

    Args:
        log_probs: log-probabilities.
        labels: classes.
        bins: number of bins, as in `reliability_bins`.
    """
    return confidence_ece(*_answers(log_probs, labels), bins=bins)


def ece_corrected(
    log_probs: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    *,
    bins: int = 15,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Return the bias-corrected ECE and an interval that contains it; see `confidence_ece_corrected`."""
    confidence, correct = _answers(log_probs, labels)
    return confidence_ece_corrected(confidence, correct, bins=bins, level=level, resamples=resamples, seed=seed)


def confidence_ece(
    confidence: Float[Tensor, " rows"], correct: Bool[Tensor, " rows"] | Float[Tensor, " rows"], *, bins: int = 15
) -> float:
    """Return the expected calibration error of any confidence from 0 to 1, such as that of a free-text answer.

    Args:
        confidence: the confidence of each answer.
        correct: whether each answer is right.
        bins: number of bins, as in `reliability_bins`.

    Raises:
        DataError: there are no rows, a confidence is not from 0 to 1, or `correct` is not 0 or 1.
    """
    return _column_distance(_calibration_terms(confidence, correct, bins).mean(0)).item()


def confidence_ece_corrected(
    confidence: Float[Tensor, " rows"],
    correct: Bool[Tensor, " rows"] | Float[Tensor, " rows"],
    *,
    bins: int = 15,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Return the bias-corrected ECE of a confidence, and an interval that contains it.

    Sampling noise increases the plain ECE, e. With e* that of a resample of the rows, the corrected one is
    ``2 e - mean(e*)`` (Efron and Tibshirani 1993, section 10.6), and its basic interval
    ``[2 e - q_high(e*), 2 e - q_low(e*)]`` (Davison and Hinkley 1997, equation 5.6); both are cut at 0.

    Args:
        confidence, correct, bins: as in `confidence_ece`.
        level, resamples, seed: as in `bootstrap_interval`.
    """
    terms = _calibration_terms(confidence, correct, bins)
    plain, resampled = (
        _column_distance(terms.mean(0)).item(),
        _column_distance(resampled_means(terms, resamples, seed)),
    )
    low, high = percentiles(resampled, level)
    estimate, low, high = (max(0.0, 2 * plain - value) for value in (resampled.mean().item(), high, low))
    return estimate, (min(low, estimate), max(high, estimate))


def reliability_bins(
    log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], *, bins: int = 15
) -> ReliabilityBins:
    """Return the number of rows, the mean confidence and the accuracy in bins of equal width on the confidence.

    Bin b is [b / bins, (b + 1) / bins), and the last bin is closed. A confidence up to a relative 1e-12 below an edge
    counts as on the edge. This is more than the rounding of logarithm and exponential, so log(k / bins) is in bin k.

    Args:
        log_probs: log-probabilities.
        labels: classes.
        bins: number of bins.

    Raises:
        ConfigError: `bins` is less than 1.
    """
    confidence, correct = _answers(log_probs, labels)
    where = _bins(confidence, bins)
    counts = torch.bincount(where, minlength=bins)
    return ReliabilityBins(
        edges=_edges(bins),
        counts=counts,
        confidence=torch.bincount(where, confidence, minlength=bins) / counts,
        accuracy=torch.bincount(where, correct, minlength=bins) / counts,
    )


def intervals(
    log_probs: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    *,
    bins: int = 15,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Return percentile bootstrap intervals of accuracy, nll, ece and brier from the same resamples of the rows.

    ECE is a sum of absolute values, so sampling noise increases it, and resampling increases it again. If every bin is
    clearly miscalibrated, its interval is as good as the others. Near perfect calibration it is above the true value:
    over simulated sets of 200 calibrated two-class rows (true ECE 0), the lower end averages 0.05.

    Args:
        log_probs: log-probabilities.
        labels: classes.
        bins: number of bins of the ECE.
        level: coverage probability.
        resamples: number of resamples.
        seed: seed of the resamples.
    """
    log_probs, labels = checked(log_probs, labels)
    means = [row_accuracy(log_probs, labels), row_nll(log_probs, labels), row_brier(log_probs, labels)]
    terms = torch.cat([torch.stack(means, 1), _calibration_terms(*_answers(log_probs, labels), bins)], 1)
    resampled = resampled_means(terms, resamples, seed)
    return {
        "accuracy": percentiles(resampled[:, 0], level),
        "nll": percentiles(resampled[:, 1], level),
        "ece": percentiles(_column_distance(resampled[:, 3:]), level),
        "brier": percentiles(resampled[:, 2], level),
    }


def _edges(bins: int) -> Tensor:
    if bins < 1:
        raise ConfigError(f"bins is {bins}, expected at least 1")
    return torch.arange(bins + 1, dtype=torch.float64) / bins


def _answers(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the confidence of each row's answer, and 1 where it is the label."""
    log_probs, labels = checked(log_probs, labels)
    return log_probs.amax(1).exp(), (log_probs.argmax(1) == labels).double()


def _bins(confidence: Tensor, bins: int) -> Tensor:
    """Return the bin of each row, the number of inner edges at or below its confidence, so 1.0 is in the last bin."""
    return torch.bucketize(confidence * (1 + EDGE_TOLERANCE), _edges(bins)[1:-1], right=True)


def _calibration_terms(confidence: Tensor, correct: Tensor, bins: int) -> Tensor:
    """Return correct - confidence in the column of the row's bin, 0 elsewhere [rows, bins]; ECE = sum_b |mean|."""
    confidence, correct = (values.detach().to("cpu", torch.float64) for values in (confidence, correct))
    if confidence.ndim != 1 or confidence.shape != correct.shape or len(confidence) == 0:
        found = f"confidence {tuple(confidence.shape)} and correct {tuple(correct.shape)}"
        raise DataError(f"calibration: found {found}, expected both [rows], at least one")
    usual = (confidence >= 0) & (confidence <= 1 + SUM_TOLERANCE) & ((correct == 0) | (correct == 1))
    if not usual.all():
        row = int((~usual).nonzero()[0, 0])
        found = f"confidence {confidence[row]:.6g} and correct {correct[row]:.6g}"
        raise DataError(f"calibration: row {row} has {found}, expected a number from 0 to 1, and 0 or 1")
    gap, where = correct - confidence, _bins(confidence, bins)
    return torch.zeros(len(gap), bins, dtype=torch.float64).scatter_(1, where[:, None], gap[:, None])


def _column_distance(means: Tensor) -> Tensor:
    return means.abs().sum(-1)
