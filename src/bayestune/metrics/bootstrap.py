"""Bootstrap intervals over rows: how far a mean over rows may be off because other rows could have been drawn."""

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bayestune.errors import ConfigError, DataError

_COUNTS_HELD = 2**22


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
        seed: seed of the resamples.

    Raises:
        DataError: there are no rows, or a value is NaN or -inf.
        ConfigError: `level` is outside (0, 1), `resamples` < 1 or `seed` < 0.
    """
    values = values.detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise DataError(f"bootstrap: values of shape {tuple(values.shape)}, expected [rows] with at least one row")
    bad = values.isnan() | values.isneginf()
    if bad.any():
        row = int(bad.nonzero()[0, 0])
        raise DataError(f"bootstrap: the value of row {row} is {values[row].item()}, expected a number or inf")
    return percentiles(resampled_means(values[:, None], resamples, seed)[:, 0], level)


def resampled_means(terms: Tensor, resamples: int, seed: int) -> Tensor:
    """Return the means of `terms` [rows, columns] over resampled rows, [resamples, columns]; inf stays inf."""
    if resamples < 1 or seed < 0:
        raise ConfigError(f"resamples is {resamples} and seed is {seed}, expected at least 1 and at least 0")
    generator = np.random.Generator(np.random.PCG64(seed))
    rows = len(terms)
    # 0 * inf would be NaN in the product, so infinite rows are counted separately.
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


def percentiles(statistics: Tensor, level: float) -> tuple[float, float]:
    """Return the (1 - level) / 2 and (1 + level) / 2 quantiles, rounded outwards to values that occur."""
    if not 0 < level < 1:
        raise ConfigError(f"level is {level}, expected a number between 0 and 1")
    tail = (1 - level) / 2
    low = np.quantile(statistics.numpy(), tail, method="lower")
    high = np.quantile(statistics.numpy(), 1 - tail, method="higher")
    return float(low), float(high)
