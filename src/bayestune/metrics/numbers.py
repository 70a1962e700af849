r"""Mixtures of Gaussians over numbers: density, distribution function, quantiles and scores.

A prediction of K draws is ``p(y|x) = 1/K sum_k N(y; mu_k, sigma_k^2)``. `means` and `stds` are mu and sigma, [draws,
rows, numbers], and `targets` [rows, numbers]. All are first converted to float64 on the CPU. Every function raises
DataError if there are no draws or no numbers, the shapes differ, a value is not finite, or a std is not above 0.

>>> means, stds = torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[[1.0]], [[1.0]]])
>>> round(mixture_cdf(means, stds, torch.tensor([[1.0]])).item(), 4)
0.5
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.special import ndtr, ndtri

from bayestune.errors import ConfigError, DataError

_HALVINGS = 200
"""Largest number of bisection steps; the limit of float64 is reached much earlier."""


def mixture_row_nll(
    means: Float[Tensor, "draws rows numbers"],
    stds: Float[Tensor, "draws rows numbers"],
    targets: Float[Tensor, "rows numbers"],
) -> Float[Tensor, " rows"]:
    """Return ``-log 1/K sum_k prod_d N(y_d; mu_kd, sigma_kd^2)`` of each row, in nats, computed in log space.

    The numbers of a row are independent within a draw, and depend on each other through the draws.
    """
    means, stds, targets = _checked(means, stds, targets)
    densities = -(((targets - means) / stds).square() + math.log(2 * math.pi)) / 2 - stds.log()
    return math.log(len(means)) - densities.sum(-1).logsumexp(0)


def mixture_cdf(
    means: Float[Tensor, "draws rows numbers"],
    stds: Float[Tensor, "draws rows numbers"],
    values: Float[Tensor, "rows numbers"],
) -> Float[Tensor, "rows numbers"]:
    """Return ``P(y <= value) = 1/K sum_k Phi((value - mu_k) / sigma_k)``."""
    means, stds, values = _checked(means, stds, values)
    return ndtr((values - means) / stds).mean(0)


def mixture_quantiles(
    means: Float[Tensor, "draws rows numbers"], stds: Float[Tensor, "draws rows numbers"], levels: Sequence[float]
) -> Float[Tensor, "levels rows numbers"]:
    """Return the value at which `mixture_cdf` reaches each level, to the last bits of float64.

    The quantile of the mixture lies between the smallest and the largest quantile of a draw, from which bisection
    starts.

    Raises:
        ConfigError: a level is not between 0 and 1.
        DataError: the shapes differ, there are no draws, or a value is not finite.
    """
    means, stds, _ = _checked(means, stds, means.new_zeros(means.shape[1:]))
    return torch.stack([_quantile(means, stds, level) for level in levels])


def _quantile(means: Tensor, stds: Tensor, level: float) -> Tensor:
    if not 0 < level < 1:
        raise ConfigError(f"quantiles: level is {level}, expected a number between 0 and 1")
    single = means + stds * ndtri(torch.tensor(level, dtype=torch.float64))
    low, high = single.amin(0), single.amax(0)
    for _ in range(_HALVINGS):
        middle = low + (high - low) / 2
        if ((middle == low) | (middle == high)).all():
            break
        below = ndtr((middle - means) / stds).mean(0) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return high


def mixture_crps(
    means: Float[Tensor, "draws rows numbers"],
    stds: Float[Tensor, "draws rows numbers"],
    targets: Float[Tensor, "rows numbers"],
) -> Float[Tensor, "rows numbers"]:
    r"""Return the continuous ranked probability score, in the unit of the target; 0 is best.

    .. math::
        \int (F(z) - 1[y \le z])^2 dz = \tfrac1K \sum_k A(y - \mu_k, \sigma_k^2)
            - \tfrac1{2K^2} \sum_{kl} A(\mu_k - \mu_l, \sigma_k^2 + \sigma_l^2)

    with ``A(m, s^2) = 2 s phi(m/s) + m (2 Phi(m/s) - 1)``, the mean size of a N(m, s^2) number. For a
    prediction without a spread it is the absolute error.

    References:
        Grimit et al. 2006, doi 10.1256/qj.05.235, equation 5.
    """
    means, stds, targets = _checked(means, stds, targets)
    pairs = torch.zeros_like(targets)
    for mean, std in zip(means, stds, strict=True):  # one draw at a time: all pairs would not fit in memory
        pairs += _mean_size(mean - means, (std.square() + stds.square()).sqrt()).mean(0)
    return _mean_size(targets - means, stds).mean(0) - pairs / (2 * len(means))


def _mean_size(means: Tensor, stds: Tensor) -> Tensor:
    """Return the mean of |N(m, s^2)|."""
    z = means / stds
    return stds * math.sqrt(2 / math.pi) * (-z.square() / 2).exp() + means * (2 * ndtr(z) - 1)


def share_error(share: float, count: int) -> float:
    """Return the binomial standard error of a share of `count` cases, ``sqrt(p (1 - p) / n)``."""
    return math.sqrt(share * (1 - share) / count)


def _checked(means: Tensor, stds: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return all three on the CPU in float64, or raise DataError."""
    if means.numel() == 0 or means.shape != stds.shape or means.shape[1:] != targets.shape:
        found = f"means {tuple(means.shape)}, stds {tuple(stds.shape)} and targets {tuple(targets.shape)}"
        raise DataError(f"metrics: {found}, expected [draws, rows, numbers] twice and [rows, numbers], not empty")
    means, stds, targets = (values.detach().to("cpu", torch.float64) for values in (means, stds, targets))
    if not all(values.isfinite().all() for values in (means, stds, targets)) or not (stds > 0).all():
        raise DataError("metrics: found a mean, std or target that is not finite, or a std of 0, expected none")
    return means, stds, targets
