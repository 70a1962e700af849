"""Differences between the scores of two methods on the same rows, with a paired bootstrap interval."""

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from bayestune.errors import DataError
from bayestune.metrics.bootstrap import bootstrap_interval


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """The mean difference of two methods and its interval, in the unit of the scores.

    Attributes:
        mean: mean over seeds and rows.
        low, high: ends of the interval.
    """

    mean: float
    low: float
    high: float


def paired_interval(
    scores: Float[Tensor, "seeds rows"],
    reference: Float[Tensor, "seeds rows"],
    *,
    level: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    r"""Return the mean difference of two methods over the same rows and seeds, with a percentile bootstrap interval.

    With ``d_i = 1/S sum_s (scores_si - reference_si)``, the mean is ``1/N sum_i d_i``, and the interval is that of
    `bootstrap_interval` for the d_i. As d_i is the mean over seeds, one resample of the rows serves all seeds. The
    interval holds for new rows from the same source and these S trained runs; it leaves out the spread over seeds.

    Args:
        scores: a score per row, [seeds, rows], such as `row_nll` in nats or `row_accuracy`, 0 or 1.
        reference: the scores of the other method for the same seeds and rows, in the same order.
        level: coverage probability.
        resamples: number of resamples.
        seed: seed of the resamples.

    Returns:
        The mean difference, negative where `scores` are lower, and its interval.

    Raises:
        DataError: the shapes differ, there are no seeds or rows, or a difference is NaN or -inf.
        ConfigError: `level` is outside (0, 1), `resamples` < 1 or `seed` < 0.

    Example:
        >>> import torch
        >>> nll = torch.tensor([[1.0, 0.5, 2.0], [1.5, 0.5, 2.0]])
        >>> paired_interval(nll - 0.25, nll)
        PairedDifference(mean=-0.25, low=-0.25, high=-0.25)

    References:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
    """
    if scores.shape != reference.shape or scores.ndim != 2 or scores.numel() == 0:
        found = f"{tuple(scores.shape)} and {tuple(reference.shape)}"
        raise DataError(f"paired interval: scores of shapes {found}, expected twice [seeds, rows], at least one each")
    differences = (scores.detach().cpu().double() - reference.detach().cpu().double()).mean(0)
    low, high = bootstrap_interval(differences, level=level, resamples=resamples, seed=seed)
    return PairedDifference(mean=differences.mean().item(), low=low, high=high)
