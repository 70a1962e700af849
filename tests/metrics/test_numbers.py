"""Mixtures of Gaussians: density, quantiles and CRPS against scipy, numerical integration and closed forms."""

import math

import pytest
import torch
from scipy import integrate, stats
from torch import Tensor

from bayestune import metrics
from bayestune.errors import ConfigError, DataError

ROUNDING = torch.finfo(torch.float64).eps


def mixture(draws: int, rows: int = 6, numbers: int = 2, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Means, stds and targets of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    means = 3 * torch.randn(draws, rows, numbers, generator=generator, dtype=torch.float64)
    stds = 0.2 + torch.rand(draws, rows, numbers, generator=generator, dtype=torch.float64)
    return means, stds, 2 * torch.randn(rows, numbers, generator=generator, dtype=torch.float64)


def single(values: Tensor, row: int, number: int) -> list[float]:
    return values[:, row, number].tolist()


@pytest.mark.parametrize("draws", [1, 2, 7])
def test_the_crps_is_the_integral_of_its_definition(draws: int) -> None:
    means, stds, targets = mixture(draws)
    found = metrics.mixture_crps(means, stds, targets)
    for row in range(3):
        mu, sigma, y = single(means, row, 1), single(stds, row, 1), targets[row, 1].item()

        def below(z: float, mu: list[float] = mu, sigma: list[float] = sigma) -> float:
            return float(stats.norm.cdf(z, mu, sigma).mean())

        left, _ = integrate.quad(lambda z: below(z) ** 2, -40, y, limit=500)
        right, _ = integrate.quad(lambda z: (1 - below(z)) ** 2, y, 40, limit=500)
        assert found[row, 1].item() == pytest.approx(left + right, abs=1e-7)  # of quad, by its default


def test_the_crps_has_its_known_cases() -> None:
    """At the mean of one Gaussian it is s (sqrt 2 - 1) / sqrt pi; without a spread it is the absolute error."""
    std = torch.full((1, 1, 1), 3.0)
    zero = torch.zeros(1, 1, 1)
    expected = 3 * (math.sqrt(2) - 1) / math.sqrt(math.pi)
    assert metrics.mixture_crps(zero, std, zero[0]).item() == pytest.approx(expected, rel=4 * ROUNDING)
    means, stds, targets = mixture(4)
    sharp = metrics.mixture_crps(means[:1], torch.full_like(stds[:1], 1e-9), targets)
    torch.testing.assert_close(sharp, (targets - means[0]).abs(), rtol=0, atol=1e-8)
    one = metrics.mixture_crps(means[:1], stds[:1], targets)
    torch.testing.assert_close(
        metrics.mixture_crps(means[:1].expand(5, -1, -1), stds[:1].expand(5, -1, -1), targets), one
    )


def test_the_density_of_a_row_is_that_of_scipy() -> None:
    """The numbers of a row are independent within a draw, and not in the mixture. A far target stays finite."""
    means, stds, targets = mixture(5)
    targets[0] = 1e4
    found = metrics.mixture_row_nll(means, stds, targets)
    logs = torch.from_numpy(stats.norm.logpdf(targets.numpy(), means.numpy(), stds.numpy()))
    torch.testing.assert_close(found, math.log(5) - logs.sum(-1).logsumexp(0), rtol=1e-12, atol=1e-12)
    assert found[0] > 1e6 and found.isfinite().all()


@pytest.mark.parametrize("draws", [1, 2, 9])
def test_the_quantiles_are_where_the_cdf_reaches_their_level(draws: int) -> None:
    means, stds, targets = mixture(draws)
    levels = [1e-6, 0.05, 0.5, 0.95]
    found = metrics.mixture_quantiles(means, stds, levels)
    assert found.shape == (4, 6, 2)
    for level, quantile in zip(levels, found, strict=True):
        reached = metrics.mixture_cdf(means, stds, quantile)
        assert (reached - level).abs().max() <= 100 * ROUNDING  # the density is at most 2, quantiles below 20
    torch.testing.assert_close(
        metrics.mixture_cdf(means, stds, targets)[0, 0].item(), cdf_by_scipy(means, stds, targets)
    )


def cdf_by_scipy(means: Tensor, stds: Tensor, targets: Tensor) -> float:
    return float(stats.norm.cdf(targets[0, 0].item(), single(means, 0, 0), single(stds, 0, 0)).mean())


def test_what_is_no_mixture_is_refused() -> None:
    means, stds, targets = mixture(3)
    for bad in (
        (means, stds[:2], targets),
        (means, stds, targets[:2]),
        (means[:0], stds[:0], targets),
        (means, stds * 0, targets),
        (means, stds, targets * math.inf),
        (means * math.nan, stds, targets),
    ):
        with pytest.raises(DataError, match="metrics: "):
            metrics.mixture_crps(*bad)
    with pytest.raises(DataError, match="metrics: "):
        metrics.mixture_quantiles(means[:0], stds[:0], [0.5])
    for level in (0.0, 1.0, math.nan):
        with pytest.raises(ConfigError, match="quantiles: level is"):
            metrics.mixture_quantiles(means, stds, [level])
