"""Selective prediction: answer only if the confidence reaches a threshold, and measure coverage and risk.

`confidence` [rows] is any score that is higher for surer answers; `correct` [rows] is bool or 0/1. A threshold t
accepts the rows with confidence >= t, so rows with equal confidence are accepted or rejected together. Coverage is the
share of rows accepted, and risk is the share of wrong rows among them; both are from 0 to 1.

Every function raises DataError if there are no rows, and names the first row whose confidence is NaN or whose
`correct` is neither 0 nor 1.

>>> confidence, correct = torch.tensor([0.9, 0.8, 0.8, 0.3]), torch.tensor([1, 1, 0, 0])
>>> [values.tolist() for values in risk_coverage(confidence, correct)]
[[0.25, 0.75, 1.0], [0.0, 0.3333333333333333, 0.5]]
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import betaincinv
from torch import Tensor

from bayestune.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The result of `threshold_for_error`.

    Attributes:
        target: the requested error rate.
        threshold: accept rows with confidence >= this; None if no threshold reaches the target.
        coverage: share of rows accepted; 0 without a threshold.
        rows: number of rows accepted; 0 without a threshold.
        error: share of wrong rows among the accepted ones; None without a threshold.
        interval: `binomial_interval` of `error`; (0, 1) without a threshold.
    """

    target: float
    threshold: float | None
    coverage: float
    rows: int
    error: float | None
    interval: tuple[float, float]


def risk_coverage(
    confidence: Float[Tensor, " rows"], correct: Bool[Tensor, " rows"] | Int[Tensor, " rows"]
) -> tuple[Float[Tensor, " points"], Float[Tensor, " points"]]:
    """Return coverage (rising to 1) and risk, with one point per distinct confidence, from high to low."""
    _, accepted, wrong = _accepted(confidence, correct)
    return accepted / accepted[-1], wrong / accepted


def aurc(confidence: Float[Tensor, " rows"], correct: Bool[Tensor, " rows"] | Int[Tensor, " rows"]) -> float:
    """Return the area under the risk-coverage curve: the mean over rows i of the risk at the threshold confidence_i.

    ``AURC = 1/n sum_i risk({j: confidence_j >= confidence_i})`` (Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206),
    the integral of the curve as a step function; 0 is best. A constant confidence gives the error rate. If e of n rows
    are wrong, and all have distinct confidences below the correct ones, it is ``1/n sum_{k=1..e} k / (n - e + k)``.
    """
    coverage, risk = risk_coverage(confidence, correct)
    return (coverage.diff(prepend=coverage.new_zeros(1)) * risk).sum().item()


def threshold_for_error(
    confidence: Float[Tensor, " rows"],
    correct: Bool[Tensor, " rows"] | Int[Tensor, " rows"],
    target: float,
    *,
    level: float = 0.95,
) -> Threshold:
    """Find the smallest threshold whose accepted rows have error <= `target`, which gives the largest coverage.

    Every distinct confidence is tried, including those below a threshold that fails. The threshold is chosen on the
    same rows as its error is measured on, so the error is optimistic and the interval covers sampling noise only.
    Confirm the threshold on different rows.

    Args:
        confidence: any score that is higher for surer answers.
        correct: whether each answer is correct.
        target: the largest acceptable error rate, from 0 to 1.
        level: coverage probability of the interval.

    Returns:
        The threshold with its coverage and error.

    Raises:
        ConfigError: `target` is outside [0, 1], or `level` outside (0, 1).
    """
    if not 0 <= target <= 1:
        raise ConfigError(f"target is {target}, expected an error rate from 0 to 1")
    thresholds, accepted, wrong = _accepted(confidence, correct)
    good = (wrong / accepted <= target).nonzero()[:, 0]
    if len(good) == 0:
        interval = binomial_interval(0, 0, level=level)
        return Threshold(target=target, threshold=None, coverage=0.0, rows=0, error=None, interval=interval)
    last = int(good[-1])
    rows, errors = int(accepted[last]), int(wrong[last])
    return Threshold(
        target=target,
        threshold=thresholds[last].item(),
        coverage=rows / int(accepted[-1]),
        rows=rows,
        error=errors / rows,
        interval=binomial_interval(errors, rows, level=level),
    )


def binomial_interval(count: int, rows: int, *, level: float = 0.95) -> tuple[float, float]:
    """Return the exact confidence interval of a share, given `count` of `rows` (Clopper and Pearson 1934).

    The lower end p solves P(X >= count | p) = (1 - level) / 2 for X ~ Binomial(rows, p), and the upper end solves
    P(X <= count | p) = (1 - level) / 2. Both are beta quantiles. An end without a solution is 0 or 1, so 0 of 0 rows
    gives (0, 1).

    Args:
        count: number of successes.
        rows: number of trials.
        level: the interval covers the true share with at least this probability.

    Raises:
        ConfigError: not 0 <= count <= rows, or `level` outside (0, 1).
    """
    if not 0 <= count <= rows or not 0 < level < 1:
        found = f"count={count}, rows={rows}, level={level}"
        raise ConfigError(f"binomial interval: found {found}, expected 0 <= count <= rows and a level in (0, 1)")
    tail = (1 - level) / 2
    low = float(betaincinv(count, rows - count + 1, tail)) if count else 0.0
    high = float(betaincinv(count + 1, rows - count, 1 - tail)) if count < rows else 1.0
    return low, high


def _accepted(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the distinct confidences from high to low, and the accepted and the wrong rows at each, in float64."""
    if confidence.shape != correct.shape or confidence.ndim != 1 or len(confidence) == 0:
        found = f"confidence {tuple(confidence.shape)} and correct {tuple(correct.shape)}"
        raise DataError(f"selective: {found}, expected both [rows] with at least one row")
    values, marks = confidence.detach().to("cpu", torch.float64), correct.detach().cpu()
    bad = values.isnan() | ((marks != 0) & (marks != 1))
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        found = f"confidence {values[row].item()} and correct {marks[row].item()}"
        raise DataError(f"selective: row {row} has {found}, expected a number, and 0 or 1")
    distinct, where = values.unique(return_inverse=True)
    rows = torch.bincount(where, minlength=len(distinct)).flip(0).cumsum(0)
    right = torch.bincount(where, marks.double(), minlength=len(distinct)).flip(0).cumsum(0)
    return distinct.flip(0), rows.double(), rows.double() - right
