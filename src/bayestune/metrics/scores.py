"""Scores of predicted class probabilities, each averaged over rows and never over batches.

Every function reads `log_probs`, the natural logarithm of the predicted probabilities [rows, classes], and `labels`
[rows]. The numbers are widened to float64 on the CPU first. -inf is a probability of zero (a choice that the row does
not have). The answer of a row is its most probable class, the first one on a tie; its confidence is that
probability.

All raise DataError, a ValueError, naming the first bad row: no rows, NaN, +inf, probabilities that do not sum to 1
within 1e-3, or a label that is not a class.

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
    """What `reliability_bins` found: bin b holds edges[b] <= confidence < edges[b + 1], the last one also 1.0.

    `counts` are rows; `confidence` and `accuracy` are means over the rows of the bin, NaN where it is empty.
    """

    edges: Float[Tensor, " edges"]
    counts: Int[Tensor, " bins"]
    confidence: Float[Tensor, " bins"]
    accuracy: Float[Tensor, " bins"]


def accuracy(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Share of rows whose most probable class is the label, 0 to 1."""
    return row_accuracy(log_probs, labels).mean().item()


def nll(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Mean over rows of -log p(label), in nats.

    It is `inf` as soon as one label has probability zero: nothing is clipped. `impossible_labels` counts those rows.
    """
    return row_nll(log_probs, labels).mean().item()


def brier(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Mean over rows of sum_c (p_c - 1[c = label])^2, summed over the classes and not halved: 0 to 2 (Brier, 1950)."""
    return row_brier(log_probs, labels).mean().item()


def ece(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], *, bins: int = 15) -> float:
    """Expected calibration error, sum_b n_b / n |accuracy_b - confidence_b|, 0 to 1 (Guo et al. 2017, equation 3).

    Bins as in `reliability_bins`.
    """
    return _column_distance(_calibration_terms(*_checked(log_probs, labels), bins).mean(0)).item()


def row_accuracy(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """1 where the most probable class is the label, else 0. `accuracy` is the mean."""
    log_probs, labels = _checked(log_probs, labels)
    return (log_probs.argmax(1) == labels).double()


def row_nll(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """-log p(label) in nats, `inf` where that probability is zero. `nll` is the mean."""
    log_probs, labels = _checked(log_probs, labels)
    return -log_probs.gather(1, labels[:, None])[:, 0]


def row_brier(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """sum_c (p_c - 1[c = label])^2, 0 to 2. `brier` is the mean."""
    log_probs, labels = _checked(log_probs, labels)
    truth = torch.nn.functional.one_hot(labels, log_probs.shape[1])
    return (log_probs.exp() - truth).square().sum(1)


def impossible_labels(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> int:
    """Number of rows whose label was given probability zero: the rows that make `nll` infinite."""
    return int(row_nll(log_probs, labels).isposinf().sum())


def reliability_bins(
    log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"], *, bins: int = 15
) -> ReliabilityBins:
    """Rows, mean confidence and accuracy in `bins` bins of equal width on the confidence.

    Bin b is [b / bins, (b + 1) / bins); the last is closed, so that a confidence of exactly 1 shares it with 0.99.
    Confidence is exp(max log p) in float64, and it counts as on an edge from a relative 1e-12 below it, more than
    logarithm and exponential can round: log(k / bins) falls in bin k. float32 input is read as the numbers that it
    holds.

    Raises ConfigError on bins < 1, and DataError as every function here.
    """
    log_probs, labels = _checked(log_probs, labels)
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
    """Percentile bootstrap interval of the mean of one value a row (Efron and Tibshirani 1993, chapter 13).

    Rows are drawn with replacement `resamples` times; the ends are the (1 - level) / 2 and (1 + level) / 2 quantiles
    of the means, rounded outwards to means that occurred, so that an infinite value can give an infinite end. `values`
    may be signed: the difference of `row_nll` of two methods on the same rows gives a paired interval. Keyed by
    `seed`: the same rows give the same interval.

    Raises DataError on no rows, NaN or -inf, ConfigError on a level outside (0, 1), resamples < 1 or seed < 0.
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
    """Percentile bootstrap intervals of accuracy, nll, ece and brier, all from the same resamples of the rows.

    As `bootstrap_interval`. ECE is a sum of absolute values, so sampling adds to it, and resampling once more. Where
    every bin is clearly off, its interval covers as the others do; near perfect calibration it lies above the true
    value: over simulated sets of 200 calibrated two-class rows (true ECE 0) the lower end averages 0.05.
    """
    log_probs, labels = _checked(log_probs, labels)
    means = [row_accuracy(log_probs, labels), row_nll(log_probs, labels), row_brier(log_probs, labels)]
    terms = torch.cat([torch.stack(means, 1), _calibration_terms(log_probs, labels, bins)], 1)
    resampled = _resampled_means(terms, resamples, seed)
    return {
        "accuracy": _percentiles(resampled[:, 0], level),
        "nll": _percentiles(resampled[:, 1], level),
        "ece": _percentiles(_column_distance(resampled[:, 3:]), level),
        "brier": _percentiles(resampled[:, 2], level),
    }


def _checked(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the CPU in float64 and int64, or DataError."""
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
    """Confidence [rows] and its bin [rows]: the number of inner edges at or below it, so 1.0 joins the last bin."""
    confidence = log_probs.amax(1).exp()
    return confidence, torch.bucketize(confidence * (1 + EDGE_TOLERANCE), _edges(bins)[1:-1], right=True)


def _calibration_terms(log_probs: Tensor, labels: Tensor, bins: int) -> Tensor:
    """[rows, bins]: correct - confidence in the column of the row's bin, 0 elsewhere; ECE = sum_b |mean over rows|."""
    confidence, where = _confidence_bins(log_probs, bins)
    gap = (log_probs.argmax(1) == labels).double() - confidence
    return torch.zeros(len(gap), bins, dtype=torch.float64).scatter_(1, where[:, None], gap[:, None])


def _column_distance(means: Tensor) -> Tensor:
    return means.abs().sum(-1)


def _resampled_means(terms: Tensor, resamples: int, seed: int) -> Tensor:
    """[resamples, columns]: means of terms [rows, columns] over rows drawn with replacement. +inf stays +inf."""
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
