r"""The scale of a posterior's standard deviation, chosen on held-out rows after training.

In training, the KL and the number of updates determine the width of the posterior, not the data (docs/recipe.md).
Afterwards one factor c multiplies all standard deviations, ``Omega <- c Omega``: the factor for which the averaged
prediction of the draws has the smallest mean negative log-likelihood on held-out rows. c = 0 is the mean alone.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from bayestune.adapters import GaussianLinear, gaussian_layers
from bayestune.errors import BayestuneWarning, ConfigError, DataError, PosteriorError
from bayestune.functional import clamp_rho, derive_seed
from bayestune.inference import predict
from bayestune.methods.temperature import best_temperature
from bayestune.sampling import Posterior
from bayestune.storage.saving import as_posterior
from bayestune.tasks import AnyRow, Task

FACTORS = tuple(2 ** (k / 2) for k in range(-4, 13))
"""1/4 to 64, in steps of the square root of 2."""
ALWAYS = FACTORS[:7]
"""The factors up to 2; every search tries these, and 0."""
TOLERANCE = 1e-3
"""NLLs that differ by less than this, in nats, count as equal; of equal factors, the one nearest to 1 is taken."""


@dataclass(frozen=True, kw_only=True)
class ScaleSearch:
    """The result of `fit_scale`.

    Attributes:
        scale: the chosen factor c.
        nll: mean NLL of the held-out rows (nats) by factor.
    """

    scale: float
    nll: dict[float, float]


def fit_scale(
    model: PeftModel | Posterior,
    task: Task,
    rows: Sequence[AnyRow],
    *,
    draws: int = 4,
    seed: int = 0,
    tempered: bool = False,
    batch_size: int = 8,
    progress: bool = False,
) -> ScaleSearch:
    """Multiply every standard deviation of a posterior, in place, by the factor with the smallest held-out NLL.

    The search tries 0 and 2^(k/2) from 1/4 to 2, then larger factors, up to 64, until the NLL exceeds its minimum by
    more than 0.001 nats twice in a row. Of the factors within 0.001 nats of the minimum, the one nearest to 1 is
    taken. All factors share the same noise, in antithetic pairs, which is not that of `predict` with the same seed.

    Args:
        model, task: as in `predict`.
        rows: labeled rows that the posterior was not trained on.
        draws: draws per factor, an even number.
        seed: seed of the noise.
        tempered: judge each factor at its own best temperature, for a posterior whose temperature is fitted next.
        batch_size, progress: as in `predict`.

    Raises:
        ConfigError: the adapter has no Gaussian, or `draws` is not a positive even number.
        DataError: there are no rows, or a row has no label.
    """
    posterior = as_posterior(model)
    layers = gaussian_layers(posterior.model).values()
    if not layers:
        raise ConfigError("fit_scale: found an adapter without a Gaussian, expected one, as BLoB has.")
    _check(rows, draws)
    start = [layer.rho.detach().clone() for layer in layers]
    pairs, noise = posterior.with_predictive("antithetic"), derive_seed("scale", seed)

    def nll(factor: float) -> float:
        _set_scale(layers, start, factor)
        given = predict(pairs, task, rows, draws=draws if factor else 0, seed=noise, batch_size=batch_size)
        return (given.tempered(best_temperature(given)) if tempered else given).row_nll().mean().item()

    scale = 1.0  # if the search fails
    try:
        nlls = _search(nll, progress)
        scale = chosen(nlls)
    finally:
        _set_scale(layers, start, scale)
    return ScaleSearch(scale=scale, nll=nlls)


def chosen(nll: Mapping[float, float]) -> float:
    """Return the factor with the smallest NLL; of equal ones, the one nearest to 1."""
    best = min(nll.values()) + TOLERANCE
    return min((factor for factor in nll if nll[factor] <= best), key=lambda f: abs(math.log(f)) if f else math.inf)


def scale_std(model: PeftModel | Posterior, factor: float) -> None:
    """Multiply every standard deviation of a posterior by `factor`, in place."""
    layers = gaussian_layers(as_posterior(model).model).values()
    _set_scale(layers, [layer.rho.detach().clone() for layer in layers], factor)


@torch.no_grad()
def _set_scale(layers: Iterable[GaussianLinear], start: Iterable[Tensor], factor: float) -> None:
    for layer, rho in zip(layers, start, strict=True):
        layer.rho.copy_(clamp_rho(rho * math.sqrt(factor)))


def _check(rows: Sequence[AnyRow], draws: int) -> None:
    if draws < 2 or draws % 2:
        raise ConfigError(f"fit_scale: found draws={draws}, expected an even number: draws come in opposite pairs.")
    if not rows or any(row.target is None for row in rows):
        raise DataError(f"fit_scale: found {len(rows)} rows, expected at least one, each with a label.")


def _search(nll: Callable[[float], float], progress: bool) -> dict[float, float]:
    """Return the NLL by factor, in rising order of factors, and warn if the best factor is at an end."""
    found, above = {0.0: nll(0.0)}, 0
    with tqdm(FACTORS, desc="scale", unit="factor", disable=not progress) as factors:
        for factor in factors:
            if factor > ALWAYS[-1] and above >= 2:
                break
            try:
                found[factor] = nll(factor)
            except PosteriorError:  # so wide that the logits are no longer finite
                break
            above = above + 1 if found[factor] > min(found.values()) + TOLERANCE else 0
    scale = chosen(found)
    message = f"fit_scale: the NLL still falls at the largest factor, {FACTORS[-1]:g}: train with a wider posterior."
    if scale == 0:
        message = (
            "fit_scale: the mean alone has the lowest NLL on the held-out rows, so every draw is the mean now, "
            "without epistemic uncertainty: give more rows, or keep the std of training (posterior_scale 1)."
        )
    if scale in (0, FACTORS[-1]):
        warnings.warn(message, BayestuneWarning, stacklevel=3)
    return found
