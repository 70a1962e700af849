"""Split-conformal intervals: ``mean ± threshold * scale`` holds a number with a chosen probability.

The score of a row is ``|y - mean| / scale``, and the threshold is the quantile of the calibration scores. Without
scales it is the absolute residual and all intervals are equally wide (Lei et al. 2018, arXiv 1604.04173, algorithm 2);
with the std of each prediction as its scale, they are wider where the model is less sure (section 5.2). If calibration
rows and a new one are exchangeable, the interval holds the new number with probability at least 1 - alpha, and at most
1 - alpha + 1 / (rows + 1) if no scores are equal, whatever the model. The probability is over calibration rows and new
rows together.

>>> means, targets = torch.zeros(3), torch.tensor([1.0, -3.0, 2.0])
>>> conformal_width(means, targets, alpha=0.5)
2.0
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bayestune.errors import DataError
from bayestune.metrics.conformal import halves, threshold_of


@dataclass(frozen=True, kw_only=True)
class IntervalScores:
    """The result of `split_conformal_intervals`.

    Attributes:
        alpha: the requested upper limit on the share of intervals without the number.
        threshold: half of an interval, in units of the scale.
        calibration_rows: number of rows that the threshold comes from.
        rows: number of other rows, for which the intervals are made.
        coverage: share of the intervals that hold the number.
        width: mean width of an interval, in the unit of the target.
    """

    alpha: float
    threshold: float
    calibration_rows: int
    rows: int
    coverage: float
    width: float


def conformal_width(
    means: Float[Tensor, " rows"],
    targets: Float[Tensor, " rows"],
    scales: Float[Tensor, " rows"] | None = None,
    *,
    alpha: float = 0.1,
) -> float:
    """Return the ``ceil((n + 1)(1 - alpha))``-th smallest ``|y - mean| / scale`` of n calibration rows.

    Args:
        means: predictions for the calibration rows, on which nothing may have been fitted.
        targets: the true numbers.
        scales: above 0, such as the std of each prediction; 1 by default.
        alpha: the share of intervals that may miss the number, in (0, 1).

    Returns:
        The threshold: ``mean ± threshold * scale`` is the interval of a new row.

    Raises:
        DataError: there are fewer rows than `smallest_calibration`, the shapes differ, or a value cannot be used.
        ConfigError: `alpha` is outside (0, 1).
    """
    means, targets, scales = _checked(means, targets, scales)
    return threshold_of((targets - means).abs() / scales, alpha)


def split_conformal_intervals(
    means: Float[Tensor, " rows"],
    targets: Float[Tensor, " rows"],
    scales: Float[Tensor, " rows"] | None = None,
    *,
    alpha: float = 0.1,
    seed: int = 0,
) -> IntervalScores:
    """Calibrate on half of the rows, which `seed` chooses, and score the intervals of the other half.

    Args:
        means, targets, scales, alpha: as in `conformal_width`.
        seed: seed of the halves, which are those of `split_conformal`.

    Raises:
        DataError, ConfigError: as `conformal_width`.
    """
    means, targets, scales = _checked(means, targets, scales)
    known, new = halves(len(targets), seed)
    threshold = conformal_width(means[known], targets[known], scales[known], alpha=alpha)
    reach = threshold * scales[new]
    return IntervalScores(
        alpha=alpha,
        threshold=threshold,
        calibration_rows=len(known),
        rows=len(new),
        coverage=((targets[new] - means[new]).abs() <= reach).double().mean().item(),
        width=2 * reach.mean().item(),
    )


def _checked(means: Tensor, targets: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three on the CPU in float64, or raise DataError."""
    scales = torch.ones_like(means) if scales is None else scales
    if not means.shape == targets.shape == scales.shape or means.ndim != 1:
        found = f"means {tuple(means.shape)}, targets {tuple(targets.shape)} and scales {tuple(scales.shape)}"
        raise DataError(f"conformal: {found}, expected [rows] each")
    means, targets, scales = (values.detach().to("cpu", torch.float64) for values in (means, targets, scales))
    if not all(values.isfinite().all() for values in (means, targets, scales)) or not (scales > 0).all():
        raise DataError("conformal: found a mean, target or scale that is not finite, or a scale of 0, expected none")
    return means, targets, scales
