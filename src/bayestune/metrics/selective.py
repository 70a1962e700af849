"""Answering only when sure: the error of the rows whose confidence reaches a threshold, and their share.

`confidence` [rows] is any score, higher for surer; `correct` [rows] is bool or 0/1. A threshold t accepts the rows
with confidence >= t, so rows of equal confidence are accepted together or not at all. Coverage is the share of rows
accepted, risk the share of wrong rows among them; both 0 to 1.

All raise DataError, naming the first bad row: no rows, NaN, a `correct` that is not 0 or 1.

>>> confidence, correct = torch.tensor([0.9, 0.8, 0.8, 0.3]), torch.tensor([1, 1, 0, 0])
>>> [values.tolist() for values in risk_coverage(confidence, correct)]
[[0.25, 0.75, 1.0], [0.0, 0.3333333333333333, 0.5]]
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayestune.errors import ConfigError, DataError

# Halvings of [0, 1]: the next would be below the last bit of a float64 near 1.
_HALVINGS = 53


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """What `threshold_for_error` found.

    Attributes:
        target: the error asked for.
        threshold: accept where confidence >= this; None where no threshold reaches the target.
        coverage, rows: share and number of rows accepted, 0 where there is no threshold.
        error: share of wrong rows among them; None where there is no threshold.
        interval: of `error`, as `binomial_interval`; (0, 1), nothing known, where there is no threshold.
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
    """Coverage, rising to 1, and risk: one point for each distinct confidence as the threshold, from high to low."""
    _, accepted, wrong = _accepted(confidence, correct)
    return accepted / accepted[-1], wrong / accepted


def aurc(confidence: Float[Tensor, " rows"], correct: Bool[Tensor, " rows"] | Int[Tensor, " rows"]) -> float:
    """Area under the risk-coverage curve: the mean over rows i of the risk at the threshold confidence_i.

    ``AURC = 1/n sum_i risk({j: confidence_j >= confidence_i})`` (Geifman, Uziel and El-Yaniv 2019, arXiv 1805.08206),
    the curve's integral as steps; 0 is best. An uninformative (constant) confidence has the error rate; e wrong rows
    of n, all below the right ones and distinct, have ``1/n sum_{k=1..e} k / (n - e + k)``.
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
    """The smallest threshold whose accepted rows have error <= `target`: the largest coverage that can be had.

    Every confidence that occurs is tried, also below thresholds that fail. The threshold is chosen on the same rows
    that its error is measured on, so the error is optimistic, and the interval only speaks of sampling: confirm it on
    other rows. If no threshold qualifies, it is None and accepts no row.

    Raises:
        ConfigError: `target` outside [0, 1], or `level` outside (0, 1).
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
    """Exact interval of a share, given `count` of `rows` (Clopper and Pearson 1934); it covers at least `level`.

    The lower end p solves P(X >= count | p) = (1 - level) / 2 for X ~ Binomial(rows, p), the upper one
    P(X <= count | p) = (1 - level) / 2; 0 and 1 where there is no solution, so 0 of 0 gives (0, 1).

    Raises:
        ConfigError: not 0 <= count <= rows, or `level` outside (0, 1).
    """
    if not 0 <= count <= rows or not 0 < level < 1:
        found = f"count={count}, rows={rows}, level={level}"
        raise ConfigError(f"binomial interval: found {found}, expected 0 <= count <= rows and a level in (0, 1)")
    tail = (1 - level) / 2
    # 1 - p turns "at most count" into "at least rows - count".
    low = _lowest_share(count, rows, tail) if count else 0.0
    high = 1 - _lowest_share(rows - count, rows, tail) if count < rows else 1.0
    return low, high


def _lowest_share(count: int, rows: int, tail: float) -> float:
    """The p in (0, 1) with P(X >= count | p) = tail, by halving; the probability rises with p, and count >= 1."""
    k = torch.arange(count, rows + 1, dtype=torch.float64)
    n = torch.tensor(float(rows), dtype=torch.float64)
    log_ways = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        p = torch.tensor((low + high) / 2, dtype=torch.float64)
        at_least = (log_ways + k * p.log() + (n - k) * (-p).log1p()).exp().sum().item()
        low, high = (low, p.item()) if at_least > tail else (p.item(), high)
    return (low + high) / 2


def _accepted(confidence: Tensor, correct: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Distinct confidences from high to low, and the rows and the wrong rows accepted at each, in float64."""
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
