"""`diagnostics`: whether the draws of a posterior change its answers, and how wide the posterior is."""

from dataclasses import dataclass

from torch import nn

from bayestune.adapters import BayesLoraConfig, gaussian_layers, mean_std
from bayestune.errors import DataError
from bayestune.functional import initial_std
from bayestune.metrics import Spread
from bayestune.sampling import Posterior
from bayestune.storage.state import active_adapter
from bayestune.tasks import AnyPrediction

EXCESS_NLL = 0.01
"""`draws_needed` is the number of draws whose NLL is within this distance, in nats, of that of infinitely many."""

_ROUNDING = 1e-12  # logit variance below which the epistemic uncertainty may be a rounding error of 1e-16


@dataclass(frozen=True, kw_only=True)
class Diagnostics:
    """How far the draws move the answers, and how wide the adapter is; the first three are means over rows.

    Attributes:
        logit_variance: variance of the centered logits over draws, after division by the posterior's temperature.
        mean_logit_variance: variance over classes of the logits' mean over draws.
        epistemic: mutual information of answer and weights, in nats.
        softmax_factor: `epistemic` / `logit_variance`; None if the draws are equal up to rounding.
        draws_needed: number of independent draws whose NLL is within 0.01 nats of that of infinitely many.
        mean_std: mean standard deviation of the adapter's Gaussian weights; like the next two, None if it has none.
        initial_std: mean standard deviation of a new adapter with the `rho_init` of this one.
        prior_std: standard deviation of the prior.
    """

    logit_variance: float
    mean_logit_variance: float
    epistemic: float
    softmax_factor: float | None
    draws_needed: int
    mean_std: float | None
    initial_std: float | None
    prior_std: float | None


def diagnostics(model: nn.Module | Posterior, prediction: AnyPrediction) -> Diagnostics:
    r"""Return how far the draws of a posterior move its logits and answers, and how wide its weights are.

    To second order in the variance of the logits z of a row with predictive p, the epistemic uncertainty is

    .. math::
        I[y; \theta] \approx \tfrac12 \sum_c p_c \mathrm{Var}[z_c] - \tfrac12 \mathrm{Var}\Big[\sum_c p_c z_c\Big] .

    If all classes of a row are equally probable, this is 1/2 of the logit variance. The softmax factor,
    epistemic / logit variance, falls to 0 as the answers become certain, because the softmax then hides changes of the
    logits. It does not depend on the width of the adapter. K draws give (K - 1)/K of it, as their mutual information
    contains that share of the sample variance.

    Args:
        model: the posterior, or its model, that made the prediction.
        prediction: a prediction of classes with at least 2 draws and at least one row.

    Returns:
        The diagnostics. Those of the weights are None unless the adapter has Gaussian weights. `initial_std` has no
        meaning for IVON and TFB, which do not train the std from an initial value; nor does `prior_std` for TFB, which
        has no prior.

    Raises:
        DataError: the prediction has no classes, fewer than 2 draws, or no rows.
        ConfigError: the weights are Gaussian, but several adapters are active.

    Example:
        >>> import torch
        >>> from bayestune.tasks import Prediction
        >>> log_probs = torch.tensor([[[0.75, 0.25]], [[0.25, 0.75]]]).log()
        >>> answer = Prediction(ids=("a",), draw_log_probs=log_probs, labels=None, draws=2, seed=0, task="made")
        >>> found = diagnostics(torch.nn.Identity(), answer)  # a model without Gaussian weights
        >>> round(found.epistemic, 3), round(found.softmax_factor, 3)
        (0.131, 0.217)

    References:
        Epistemic uncertainty: Houlsby et al. 2011, arXiv 1112.5745, equation 2. Widths: BLoB, Wang et al. 2024, arXiv
        2406.11675, section 3.
    """
    module = model.model if isinstance(model, Posterior) else model
    spread = prediction.spread()
    if spread is None:
        found = f"{max(prediction.draws, 1)} draws of {len(prediction.ids)} rows"
        raise DataError(f"diagnostics: found {found}, expected at least 2 draws of classes (task {prediction.task}).")
    return _diagnosed(module, spread)


def _diagnosed(module: nn.Module, found: Spread) -> Diagnostics:
    layers = gaussian_layers(module).values()
    config = _config(module) if layers else None
    return Diagnostics(
        logit_variance=found.logit_variance,
        mean_logit_variance=found.mean_logit_variance,
        epistemic=found.epistemic,
        softmax_factor=found.epistemic / found.logit_variance if found.logit_variance > _ROUNDING else None,
        draws_needed=found.draws_needed(EXCESS_NLL),
        mean_std=mean_std(layers) if config else None,
        initial_std=initial_std(config.rho_init) if config else None,
        prior_std=config.prior_std if config else None,
    )


def _config(model: nn.Module) -> BayesLoraConfig | None:
    """Return the configuration of the active adapter if it is Bayesian."""
    peft_model, adapter, _ = active_adapter(model)
    config = peft_model.peft_config[adapter]
    return config if isinstance(config, BayesLoraConfig) else None
