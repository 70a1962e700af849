r"""The posterior standard deviation that the KL alone leads to, and the KL learning rate that reaches a target.

In a short run the NLL gradient hardly moves G, so the final standard deviation Omega = G^2 is set by the KL steps
(docs/recipe.md). Let c_i be the relative learning rate of update i and pi_i its KL weight. Each update is

    G <- G + 2 eta c_i pi_i (1 / G - G^3 / s_p^2),  stopping at sqrt(s_p).

While Omega is small against the prior's s_p and the steps are small, Omega grows by ``4 eta c_i pi_i`` per update:
about ``2 eta`` per cycle under a rate that falls linearly to 0. The same KL rate therefore gives a different posterior
for each number of updates; `kl_rate_for_std` fixes the posterior instead.
"""

import math
import sys
import warnings
from collections.abc import Collection
from dataclasses import replace

from scipy.optimize import root_scalar
from transformers import TrainingArguments

from bayestune.adapters import GaussianLinear
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.functional import cycle_steps, paper_kl_weight, uniform_kl_weight
from bayestune.training.kl import KLSettings, Schedule, posterior_summary

DEFAULT_SHARE = 0.3
"""The default target of the std, as a share of the prior's."""

_NEGLIGIBLE = 1e-12  # of a KL weight: a million of these move Omega by less than float32 resolves


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
    """Return Omega after `updates` steps of the KL alone (see the module docstring).

    Args:
        rate: peak KL learning rate eta.
        updates: number of updates in the run.
        cycle: updates in one cycle of KL weights, as in `KLSettings`.
        start: initial Omega, such as `initial_std(rho_init)`.
        prior_std: s_p, the standard deviation of the prior.
        schedule: KL weight of each update, as in `KLSettings`.
        warmup: share of the updates in which the rate rises linearly from 0; it then falls linearly to 0.
    """
    return _grow(rate, _weights(updates, cycle, schedule, warmup), start, prior_std)


def default_kl(layers: Collection[GaussianLinear], rows: int, args: TrainingArguments) -> KLSettings:
    """Return the KL settings that take the std to `DEFAULT_SHARE` of the prior's, in any number of updates.

    Its weights are uniform, its cycle is the paper's but no longer than the run, and its rate is that of
    `kl_rate_for_std`, or 0.01 if the std starts at that width or above.

    Args:
        layers: the Gaussian layers of the model, with one prior.
        rows: number of training rows.
        args: the arguments of the run, whose learning rate is assumed to fall linearly.
    """
    accumulation, processes, updates = args.gradient_accumulation_steps, args.world_size, args.max_steps
    if updates <= 0:
        batches = rows / (args.per_device_train_batch_size * processes)
        batches = max(1, math.floor(batches)) if args.dataloader_drop_last else math.ceil(batches)
        updates = math.ceil(args.num_train_epochs * math.ceil(batches / accumulation))
    cycle = cycle_steps(rows, args.per_device_train_batch_size * accumulation, processes=processes)
    start, prior_std = posterior_summary(layers)["std"], next(iter(layers)).prior_std
    settings = KLSettings(cycle=min(cycle, updates), schedule=uniform_kl_weight)
    if DEFAULT_SHARE * prior_std <= start:
        return settings
    rate = kl_rate_for_std(
        DEFAULT_SHARE * prior_std,
        updates=updates,
        cycle=settings.cycle,
        start=start,
        prior_std=prior_std,
        schedule=settings.schedule,
        warmup=args.get_warmup_steps(updates) / updates,
    )
    return replace(settings, learning_rate=rate)


def warn_of_width(reached: float, *, start: float, prior_std: float, updates: int) -> None:
    """Warn if the KL alone leaves the std within 25 % of its start, or takes it to within 10 % of the prior's."""
    moved = f"posterior std: in {updates} updates the KL takes it from {start:.3g} to {reached:.3g}"
    if reached > 0.9 * prior_std:
        effect = f"nearly to the prior's {prior_std:.3g}, whatever the data say"
        remedy = "give fewer steps, a smaller posterior_std, or a smaller KL learning rate"
    elif reached < 1.25 * start:
        effect = "hardly from its start: draws differ little from the mean, and the result is nearly plain LoRA"
        remedy = "give more steps, a larger posterior_std (in Python `kl_rate_for_std`), or a uniform kl_schedule"
    else:
        return
    warnings.warn(f"{moved}, {effect}: {remedy}.", BayestuneWarning, stacklevel=3)


def check_std(std: float, *, start: float, prior_std: float) -> None:
    """Raise a `ConfigError` unless the KL alone can reach `std`: it must be between `start` and `prior_std`."""
    if not start < std < prior_std:
        raise ConfigError(
            f"posterior_std: found {std:g}, expected more than the start, {start:.4g} (from rho_init), and less than "
            f"the prior's {prior_std:g}, because the KL moves it between the two; or give kl_learning_rate instead."
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
    """Return the KL learning rate eta at which `kl_only_std` equals `std`.

    The same rate shrinks the means, ``M <- M - eta c_i pi_i M / s_p^2``: over the run by a factor of about
    ``exp(-(std - start) / (4 s_p^2))``, which is 0.7 for 0.06 under a prior of 0.2, but 0.2 under a prior of 0.1.
    With a narrow prior choose a small posterior std.

    Args:
        std: target Omega.
        updates, cycle, start, prior_std, schedule, warmup: as in `kl_only_std`.

    Returns:
        The rate, at most ``s_p^2``, so that a KL weight of 1/2 removes at most half of M in one update. A run that is
        too short to reach `std` at that rate ends below it.

    Raises:
        ConfigError: as `check_std`.
    """
    check_std(std, start=start, prior_std=prior_std)
    weights = _weights(updates, cycle, schedule, warmup)

    def excess(rate: float) -> float:
        return _grow(rate, weights, start, prior_std) - std

    highest = prior_std**2
    if excess(highest) <= 0:
        return highest
    smallest, precision = sys.float_info.min, 4 * sys.float_info.epsilon
    return float(root_scalar(excess, method="brentq", bracket=(0, highest), xtol=smallest, rtol=precision).root)


def _weights(updates: int, cycle: int, schedule: Schedule, warmup: float) -> list[float]:
    """Return c_i pi_i for the updates in which it is not negligible."""
    rising = math.ceil(warmup * updates)
    weights = []
    for step in range(updates):
        share = step / rising if step < rising else (updates - step) / max(1, updates - rising)
        weights.append(share * schedule(step, cycle))
    return [weight for weight in weights if weight > _NEGLIGIBLE]


def _grow(rate: float, weights: list[float], start: float, prior_std: float) -> float:
    g, best = math.sqrt(start), math.sqrt(prior_std)
    for weight in weights:
        moved = g + 2 * rate * weight * (1 / g - g**3 / prior_std**2)
        g = min(moved, best) if g <= best else max(moved, best)
    return g * g
