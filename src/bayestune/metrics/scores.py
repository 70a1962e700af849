"""Scores of predicted class probabilities, each averaged over rows and never over batches.

Every function takes `log_probs`, the natural logarithms of the predicted probabilities [rows, classes], and `labels`
[rows]. Numbers are first converted to float64 on the CPU. -inf is a probability of zero, such as that of a choice that
the row does not have. The answer of a row is its most probable class (the first one on a tie), and its confidence is
that probability.

Every function raises DataError, a ValueError, if there are no rows. It names the first bad row if a value is NaN or
+inf, if the probabilities do not sum to 1 within 1e-3, or if a label is not a class.

>>> log_probs = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
>>> round(nll(log_probs, torch.tensor([0, 1])), 4)
0.5697
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayestune.errors import ConfigError, DataError

SUM_TOLERANCE = 1e-3
# exp(log(7 / 20)) is one rounding below 7 / 20. A confidence this close to an edge is on the edge.
EDGE_TOLERANCE = 1e-12
_COUNTS_HELD = 2**22


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


def accuracy(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Return the share of rows whose most probable class is the label, from 0 to 1."""
    return row_accuracy(log_probs, labels).mean().item()


def nll(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Return the mean over rows of -log p(label), in nats.

    Nothing is clipped, so it is `inf` if a label has probability zero. `impossible_labels` counts those rows.
    """
    return row_nll(log_probs, labels).mean().item()


def brier(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Return the mean over rows of sum_c (p_c - 1[c = label])^2, from 0 to 2 (Brier 1950)."""
    return row_brier(log_probs, labels).mean().item()


def ece(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], *, bins: int = 15) -> float:
    """Return the expected calibration error (Guo et al. 2017, equation 3).

    ``ECE = sum_b n_b / n |accuracy_b - confidence_b|`` over bins b of equal width.

    Args:
        log_probs: log-probabilities.
        labels: classes.
        bins: number of bins, as in `reliability_bins`.
    """
    return _column_distance(_calibration_terms(*checked(log_probs, labels), bins).mean(0)).item()


def ece_corrected(
    log_probs: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    *,
    bins: int = 15,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, tuple[float, float]]:
    """Return the bias-corrected ECE and an interval that contains it.

    Sampling noise increases the plain ECE, e. With e* that of a resample of the rows, the corrected one is
    ``2 e - mean(e*)`` (Efron and Tibshirani 1993, section 10.6), and its basic interval
    ``[2 e - q_high(e*), 2 e - q_low(e*)]`` (Davison and Hinkley 1997, equation 5.6); both are cut at 0.

    Args:
        log_probs, labels, bins: as in `ece`.
        level, resamples, seed: as in `bootstrap_interval`.
    """
    log_probs, labels = checked(log_probs, labels)
    terms = _calibration_terms(log_probs, labels, bins)
    plain, resampled = (
        _column_distance(terms.mean(0)).item(),
        _column_distance(_resampled_means(terms, resamples, seed)),
    )
    low, high = _percentiles(resampled, level)
    estimate, low, high = (max(0.0, 2 * plain - value) for value in (resampled.mean().item(), high, low))
    return estimate, (min(low, estimate), max(high, estimate))


def row_accuracy(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return, per row, 1 if the most probable class is the label and 0 otherwise. `accuracy` is the mean."""
    log_probs, labels = checked(log_probs, labels)
    return (log_probs.argmax(1) == labels).double()


def row_nll(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return, per row, -log p(label) in nats; `inf` if that probability is zero. `nll` is the mean."""
    log_probs, labels = checked(log_probs, labels)
    return -log_probs.gather(1, labels[:, None])[:, 0]


def row_brier(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return, per row, sum_c (p_c - 1[c = label])^2, from 0 to 2. `brier` is the mean."""
    log_probs, labels = checked(log_probs, labels)
    truth = torch.nn.functional.one_hot(labels, log_probs.shape[1])
    return (log_probs.exp() - truth).square().sum(1)


def impossible_labels(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> int:
    """Return the number of rows whose label has probability zero; they make `nll` infinite."""
    return int(row_nll(log_probs, labels).isposinf().sum())


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
    log_probs, labels = checked(log_probs, labels)
    confidence, where = _confidence_bins(log_probs, bins)
    correct = (log_probs.argmax(1) == labels).double()
    counts = torch.bincount(where, minlength=bins)
    return ReliabilityBins(
        edges=_edges(bins),
        counts=counts,
        confidence=torch.bincount(where, confidence, minlength=bins) / counts,
        accuracy=torch.bincount(where, correct, minlength=bins) / counts,
    )


def bootstrap_interval(
    values: Float[Tensor, " rows"], *, level: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` (Efron and Tibshirani 1993, chapter 13).

    Rows are drawn with replacement `resamples` times. The ends are the (1 - level) / 2 and (1 + level) / 2 quantiles
    of the means, rounded outwards to means that occurred, so an infinite value can give an infinite end. The same rows
    and seed give the same interval.

    Args:
        values: one value per row. The difference of `row_nll` of two methods on the same rows gives a paired interval.
        level: coverage probability.
        resamples: number of resamples.
        seed: key of the resamples.

    Raises:
        DataError: there are no rows, or a value is NaN or -inf.
        ConfigError: `level` is outside (0, 1), `resamples` < 1 or `seed` < 0.
    """
    values = values.detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise DataError(f"bootstrap: values of shape {tuple(values.shape)}, expected [rows] with at least one row")
    bad = values.isnan() | values.isneginf()
    if bad.any():
        row = _first(bad)
        raise DataError(f"bootstrap: the value of row {row} is {values[row].item()}, expected a number or inf")
    return _percentiles(_resampled_means(values[:, None], resamples, seed)[:, 0], level)


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
    clearly miscalibrated, its interval covers like the others. Near perfect calibration, it lies above the true value:
    over simulated sets of 200 calibrated two-class rows (true ECE 0), the lower end averages 0.05.

    Args:
        log_probs: log-probabilities.
        labels: classes.
        bins: number of bins of the ECE.
        level: coverage probability.
        resamples: number of resamples.
        seed: key of the resamples.
    """
    log_probs, labels = checked(log_probs, labels)
    means = [row_accuracy(log_probs, labels), row_nll(log_probs, labels), row_brier(log_probs, labels)]
    terms = torch.cat([torch.stack(means, 1), _calibration_terms(log_probs, labels, bins)], 1)
    resampled = _resampled_means(terms, resamples, seed)
    return {
        "accuracy": _percentiles(resampled[:, 0], level),
        "nll": _percentiles(resampled[:, 1], level),
        "ece": _percentiles(_column_distance(resampled[:, 3:]), level),
        "brier": _percentiles(resampled[:, 2], level),
    }


def checked(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both on the CPU in float64 and int64, or raise DataError."""
    if log_probs.ndim != 2 or 0 in log_probs.shape or labels.shape != log_probs.shape[:1]:
        found = f"log_probs {tuple(log_probs.shape)} and labels {tuple(labels.shape)}"
        raise DataError(f"metrics: {found}, expected [rows, classes] and [rows] with at least one row and one class")
    if not log_probs.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"metrics: log_probs {log_probs.dtype} and labels {labels.dtype}, expected float and integer")
    log_probs, labels = log_probs.detach().to("cpu", torch.float64), labels.detach().to("cpu", torch.int64)
    sums = log_probs.exp().sum(1)
    # NaN and +inf fail this comparison too.
    improper = ~((sums - 1).abs() <= SUM_TOLERANCE)
    foreign = (labels < 0) | (labels >= log_probs.shape[1])
    if (improper | foreign).any():
        row = _first(improper | foreign)
        if improper[row]:
            found = f"the probabilities of row {row} sum to {sums[row].item():.6g}, expected 1 within {SUM_TOLERANCE}"
            raise DataError(f"metrics: {found}; pass log-probabilities, such as log_softmax of the logits")
        last = log_probs.shape[1] - 1
        raise DataError(f"metrics: the label of row {row} is {labels[row].item()}, expected 0 to {last}")
    return log_probs, labels


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])


def _edges(bins: int) -> Tensor:
    if bins < 1:
        raise ConfigError(f"bins is {bins}, expected at least 1")
    return torch.arange(bins + 1, dtype=torch.float64) / bins


def _confidence_bins(log_probs: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """Return confidence [rows] and bin [rows], the number of inner edges at or below it, so 1.0 is in the last bin."""
    confidence = log_probs.amax(1).exp()
    return confidence, torch.bucketize(confidence * (1 + EDGE_TOLERANCE), _edges(bins)[1:-1], right=True)


def _calibration_terms(log_probs: Tensor, labels: Tensor, bins: int) -> Tensor:
    """Return correct - confidence in the column of the row's bin, 0 elsewhere [rows, bins]; ECE = sum_b |mean|."""
    confidence, where = _confidence_bins(log_probs, bins)
    gap = (log_probs.argmax(1) == labels).double() - confidence
    return torch.zeros(len(gap), bins, dtype=torch.float64).scatter_(1, where[:, None], gap[:, None])


def _column_distance(means: Tensor) -> Tensor:
    return means.abs().sum(-1)


def _resampled_means(terms: Tensor, resamples: int, seed: int) -> Tensor:
    """Return means of terms [rows, columns] over rows drawn with replacement [resamples, columns]; inf stays inf."""
    if resamples < 1 or seed < 0:
        raise ConfigError(f"resamples is {resamples} and seed is {seed}, expected at least 1 and at least 0")
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = len(terms)
    # 0 * inf would be NaN in the product: count the infinite rows apart.
    infinite = terms.isposinf()
    finite = terms.masked_fill(infinite, 0.0)
    block = max(1, _COUNTS_HELD // rows)
    means = []
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = generator.integers(rows, size=(size, rows)) + rows * np.arange(size)[:, None]
        counts = torch.from_numpy(np.bincount(drawn.ravel(), minlength=size * rows).reshape(size, rows)).double()
        means.append((counts @ finite / rows).masked_fill(counts @ infinite.double() > 0, math.inf))
    return torch.cat(means)


def _percentiles(statistics: Tensor, level: float) -> tuple[float, float]:
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}, expected a number between 0 and 1")
    tail = (1 - level) / 2
    low = np.quantile(statistics.numpy(), tail, method="lower")
    high = np.quantile(statistics.numpy(), 1 - tail, method="higher")
    return float(low), float(high)
