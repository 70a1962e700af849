"""A search for the largest width that changes a loss by no more than a tolerance."""

import dataclasses
import math
from collections.abc import Callable

from bayestune.errors import ConfigError, PosteriorError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trial:
    """One evaluation of a search: the loss at `sigma`, and whether it was within the tolerance."""

    sigma: float
    loss: float
    accepted: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class SigmaSearch:
    """The result of `search_sigma`."""

    sigma: float  # the largest sigma_q that was evaluated and accepted
    loss: float  # the loss there
    reference: float  # the loss at sigma_q = 0
    at_high: bool  # whether the upper end of the range was accepted, so that a larger sigma_q might be too
    trace: tuple[Trial, ...]  # every evaluation above 0, in order


def search_sigma(
    loss: Callable[[float], float], *, tolerance: float, low: float, high: float, iterations: int
) -> SigmaSearch:
    """Search for the largest sigma with ``|loss(sigma) - loss(0)| <= tolerance |loss(0)|``, by bisection in log sigma.

    `low` and `high` are tried first. Then the geometric mean of an accepted and a rejected sigma is tried
    `iterations` times; the two end a factor ``(high / low)^(2^-iterations)`` apart. The result was always tried and
    accepted. If the loss is not monotone, a larger sigma that was never tried may be within the tolerance too.

    Raises:
        ConfigError: a setting is out of range, or `low` is rejected.
        PosteriorError: a loss is NaN, or the loss at 0 is infinite.
    """
    if not 0 < low < high < math.inf:
        raise ConfigError(f"search_sigma: found low={low}, high={high}, expected 0 < low < high, both finite.")
    if not 0 <= tolerance < math.inf or iterations < 0:
        raise ConfigError(f"search_sigma: found tolerance={tolerance}, iterations={iterations}, expected 0 or more.")
    trace: list[Trial] = []

    def loss_at(sigma: float) -> float:
        value = loss(sigma)
        if math.isnan(value):
            raise PosteriorError(f"search_sigma: the loss at sigma_q={sigma:.6g} is NaN, expected a number.")
        return value

    def accepted(sigma: float) -> bool:
        value = loss_at(sigma)
        trace.append(Trial(sigma=sigma, loss=value, accepted=abs(value - reference) <= tolerance * abs(reference)))
        return trace[-1].accepted

    reference = loss_at(0.0)
    if math.isinf(reference):
        raise PosteriorError("search_sigma: the loss at the mean is infinite, so no change from it can be measured.")
    if not accepted(low):
        raise ConfigError(
            f"search_sigma: the loss is {trace[0].loss:.6g} at low={low} and {reference:.6g} at the mean, a change "
            f"beyond tolerance={tolerance}: lower low, or raise the tolerance."
        )
    at_high = accepted(high)
    for _ in range(0 if at_high else iterations):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if accepted(middle) else (low, middle)
    best = max((trial for trial in trace if trial.accepted), key=lambda trial: trial.sigma)
    return SigmaSearch(sigma=best.sigma, loss=best.loss, reference=reference, at_high=at_high, trace=tuple(trace))
