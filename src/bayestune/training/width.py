r"""How wide the KL alone makes the posterior, and the KL rate that takes it to a given width.

In a run of few updates the gradient of the NLL hardly moves G: the standard deviation Omega = G^2 at the end is what
the steps of the KL have made of the start (docs/recipe.md). For the update i, of relative rate c_i, they are

    G <- G + 2 eta c_i pi_i (1 / G - G^3 / s_p^2), but not past sqrt(s_p),

so, as long as Omega is small against the prior's s_p and the steps are small, Omega grows by ``4 eta c_i pi_i``: by
about ``2 eta`` a cycle of weights, under a rate that falls linearly to 0. The same KL rate therefore is another
posterior for every number of updates; `kl_rate_for_std` keeps the posterior instead.
"""

import math

from bayestune.errors import ConfigError
from bayestune.functional import paper_kl_weight
from bayestune.training.kl import Schedule

_NEGLIGIBLE = 1e-12  # of a KL weight: a million of these move Omega by less than float32 can tell
_HALVINGS = 60


def initial_std(rho_init: float) -> float:
    """The mean of Omega = G^2 at the start, where G is uniform on (rho_init / sqrt(2), rho_init)."""
    low = 1 / math.sqrt(2)
    return rho_init**2 * (1 - low**3) / (3 * (1 - low))


def kl_only_std(
    rate: float,
    *,
    updates: int,
    cycle: int,
    start: float,
    prior_std: float,
    schedule: Schedule = paper_kl_weight,
    warmup: float = 0.06,
) -> float:
    """Omega after `updates` steps of the KL alone at peak rate `rate`, from Omega = `start` (module docstring).

    Args:
        cycle, schedule: the weights pi_i, as in `KLSettings`.
        warmup: share of the updates in which the rate rises linearly from 0; it then falls linearly to 0.
    """
    return _grow(rate, _weights(updates, cycle, schedule, warmup), start, prior_std)


def check_std(std: float, *, start: float, prior_std: float) -> None:
    """Refuse a width that the KL alone cannot lead to.

    Raises:
        ConfigError: it leads from `start` towards `prior_std`, and `std` is not between them.
    """
    if not start < std < prior_std:
        raise ConfigError(
            f"posterior_std: found {std:g}, expected more than the start, {start:.4g} (from rho_init), and less than "
            f"the prior's {prior_std:g}, as the KL leads from one to the other; or give kl_learning_rate instead."
        )


def kl_rate_for_std(
    std: float,
    *,
    updates: int,
    cycle: int,
    start: float,
    prior_std: float,
    schedule: Schedule = paper_kl_weight,
    warmup: float = 0.06,
) -> float:
    """The KL rate eta at which `kl_only_std` is `std`, by bisection; arguments as there.

    The same rate moves the means, ``M <- M - eta c_i pi_i M / s_p^2``: over the run by a factor of about
    ``exp(-(std - start) / (4 s_p^2))``, 0.7 for 0.06 under a prior of 0.2, but 0.2 under one of 0.1. Under a narrow
    prior choose a narrow posterior.

    At most ``s_p^2``, so that weights of up to 1/2 take at most half of M in one update. A run too short for `std` at
    that rate stays narrower.

    Raises:
        ConfigError: as `check_std`.
    """
    check_std(std, start=start, prior_std=prior_std)
    weights = _weights(updates, cycle, schedule, warmup)
    low, high = 0.0, prior_std**2
    if _grow(high, weights, start, prior_std) <= std:
        return high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if _grow(middle, weights, start, prior_std) < std:
            low = middle
        else:
            high = middle
    return high


def _weights(updates: int, cycle: int, schedule: Schedule, warmup: float) -> list[float]:
    """c_i pi_i of the updates in which they are not negligible."""
    rising = math.ceil(warmup * updates)
    found = []
    for step in range(updates):
        share = step / rising if step < rising else (updates - step) / max(1, updates - rising)
        found.append(share * schedule(step, cycle))
    return [weight for weight in found if weight > _NEGLIGIBLE]


def _grow(rate: float, weights: list[float], start: float, prior_std: float) -> float:
    g, best = math.sqrt(start), math.sqrt(prior_std)
    for weight in weights:
        moved = g + 2 * rate * weight * (1 / g - g**3 / prior_std**2)
        g = min(moved, best) if g <= best else max(moved, best)
    return g * g
