"""Split-conformal prediction: sets of classes that hold the label with a chosen probability.

`score` measures how badly a class fits a row:

- "lac": ``1 - p_c``, the smallest sets on average (Sadinle, Lei and Wasserman 2019, arXiv 1609.00451, section 2).
- "aps": ``sum_{j before c} p_j + U p_c``, with classes from the most to the least probable and one uniform U per row,
  keyed by `seed` and the row's probabilities, so that it is the same in any batch (Romano, Sesia and Candes 2020,
  arXiv 2006.02544, section 2). Its sets grow more where a row is hard.

A set holds the classes whose score is at most a threshold, the quantile of the labels' scores on calibration rows. If
these rows and a new one are exchangeable, the set holds the new label with probability at least 1 - alpha, and at most
1 - alpha + 1 / (rows + 1) if no scores are equal. The probability is over calibration rows and new rows together, not
per row and not per class. A set may be empty. A class of probability zero, such as a choice that the row does not
have, is never in a set, so the guarantee does not hold for labels of probability zero. Rows with the same
probabilities have the same U.

`log_probs` and `labels` are as in `scores`, and are checked in the same way.

>>> log_probs = torch.tensor([[0.7, 0.3], [0.6, 0.4], [0.2, 0.8]], dtype=torch.float64).log()
>>> threshold = conformal_threshold(log_probs, torch.tensor([0, 1, 1]), alpha=0.5)
>>> round(threshold, 4), prediction_sets(log_probs, threshold).tolist()
(0.3, [[True, False], [False, False], [False, True]])
"""

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayestune.errors import ConfigError, DataError
from bayestune.functional import derive_seed
from bayestune.metrics.scores import checked


@dataclass(frozen=True, kw_only=True)
class SetScores:
    """The result of `split_conformal`.

    Attributes:
        alpha: the requested upper limit on the share of sets without the label.
        threshold: largest score of a class in a set.
        calibration_rows: number of rows that the threshold comes from.
        rows: number of other rows, for which the sets are made.
        coverage: share of the sets that hold the label.
        size: mean number of classes in a set.
    """

    alpha: float
    threshold: float
    calibration_rows: int
    rows: int
    coverage: float
    size: float


def conformal_threshold(
    log_probs: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    *,
    alpha: float = 0.1,
    score: str = "lac",
    seed: int = 0,
) -> float:
    """Return the ``ceil((n + 1)(1 - alpha))``-th smallest score of the labels of n calibration rows.

    Args:
        log_probs, labels: of the calibration rows, on which nothing else may have been fitted.
        alpha: the share of sets that may miss the label, in (0, 1).
        score: "lac" or "aps".
        seed: seed of the uniform numbers of "aps".

    Returns:
        The threshold for `prediction_sets`.

    Raises:
        DataError: there are fewer rows than `smallest_calibration`.
        ConfigError: `alpha` is outside (0, 1), or `score` is unknown.

    References:
        Romano, Sesia and Candes 2020, arXiv 2006.02544, algorithm 1.
    """
    log_probs, labels = checked(log_probs, labels)
    return threshold_of(_class_scores(log_probs, score, seed).gather(1, labels[:, None])[:, 0], alpha)


def threshold_of(scores: Float[Tensor, " rows"], alpha: float) -> float:
    """Return the ``ceil((n + 1)(1 - alpha))``-th smallest of the scores of n calibration rows.

    Raises:
        DataError: there are fewer rows than `smallest_calibration`.
        ConfigError: `alpha` is outside (0, 1).
    """
    rows, least = len(scores), smallest_calibration(alpha)
    if rows < least:
        raise DataError(
            f"conformal: found {rows} calibration rows, expected at least {least} for alpha={alpha}; add rows, or "
            "choose a larger alpha"
        )
    return scores.kthvalue(math.ceil((rows + 1) * (1 - _exact(alpha)))).values.item()


def prediction_sets(
    log_probs: Float[Tensor, "rows classes"], threshold: float, *, score: str = "lac", seed: int = 0
) -> Bool[Tensor, "rows classes"]:
    """Return which classes have a score of at most `threshold` in each row.

    Args:
        log_probs: of new rows.
        threshold: from `conformal_threshold` with the same score; infinite for every class of probability above zero.
        score, seed: as in `conformal_threshold`.

    Raises:
        ConfigError: `score` is unknown, or `threshold` is NaN.
    """
    if math.isnan(threshold):
        raise ConfigError("conformal: threshold is nan, expected a number; take it from conformal_threshold")
    log_probs, _ = checked(log_probs, torch.zeros(len(log_probs), dtype=torch.int64))
    scores = _class_scores(log_probs, score, seed)
    return (scores <= threshold) & ~log_probs.isneginf()


def split_conformal(
    log_probs: Float[Tensor, "rows classes"],
    labels: Int[Tensor, " rows"],
    *,
    alpha: float = 0.1,
    score: str = "lac",
    seed: int = 0,
) -> SetScores:
    """Calibrate on half of the rows, which `seed` chooses, and score the sets of the other half.

    The halves depend only on the seed and the number of rows, so methods are compared on the same rows.

    Args:
        log_probs, labels, alpha, score: as in `conformal_threshold`.
        seed: seed of the halves and of the uniform numbers of "aps".

    Raises:
        DataError, ConfigError: as `conformal_threshold`.
    """
    log_probs, labels = checked(log_probs, labels)
    known, new = halves(len(labels), seed)
    threshold = conformal_threshold(log_probs[known], labels[known], alpha=alpha, score=score, seed=seed)
    sets = prediction_sets(log_probs[new], threshold, score=score, seed=seed)
    return SetScores(
        alpha=alpha,
        threshold=threshold,
        calibration_rows=len(known),
        rows=len(new),
        coverage=sets.gather(1, labels[new][:, None]).double().mean().item(),
        size=sets.sum(1).double().mean().item(),
    )


def halves(rows: int, seed: int) -> tuple[Int[Tensor, " known"], Int[Tensor, " new"]]:
    """Return the indices of the rows that `split_conformal` calibrates on, and those of the other half.

    Raises:
        DataError: there is one row, or none.
    """
    generator = torch.Generator().manual_seed(derive_seed("conformal halves", seed))
    known, new = torch.randperm(rows, generator=generator).tensor_split([rows // 2])
    if len(known) == 0:
        raise DataError(f"conformal: found {rows} row, expected at least 2, for two halves; add rows")
    return known, new


def smallest_calibration(alpha: float) -> int:
    """Return the smallest n with ``ceil((n + 1)(1 - alpha)) <= n``, which is ``ceil(1 / alpha) - 1``.

    Raises:
        ConfigError: `alpha` is outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"conformal: alpha is {alpha}, expected a share between 0 and 1")
    return math.ceil(1 / _exact(alpha)) - 1


def _exact(alpha: float) -> Fraction:
    """Return the decimal that `alpha` prints as: 1 - 0.7 is 3 / 10, not the nearest float, which is above it."""
    return Fraction(str(alpha))


def _class_scores(log_probs: Tensor, score: str, seed: int) -> Tensor:
    """Return the score of each class [rows, classes]; infinite where the probability is zero."""
    probs = log_probs.exp()
    if score == "lac":
        scores = 1 - probs
    elif score == "aps":
        ordered, order = probs.sort(dim=1, descending=True, stable=True)
        keys = [derive_seed("conformal", seed, line.numpy().tobytes().hex()) for line in ordered]
        uniform = torch.tensor(keys, dtype=torch.float64).unsqueeze(1) / 2**63
        scores = torch.zeros_like(probs).scatter(1, order, ordered.cumsum(1) - (1 - uniform) * ordered)
    else:
        raise ConfigError(f"conformal: score is {score!r}, expected lac or aps")
    return scores.masked_fill(log_probs.isneginf(), math.inf)
