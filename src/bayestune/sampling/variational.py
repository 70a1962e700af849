"""A posterior that lives in the adapter itself: BLoB, Bayes by backprop, dropout masks, and what TFB leaves."""

from peft import PeftModel

from bayestune.errors import ConfigError
from bayestune.sampling.base import Posterior, Sampler, refuse_draws
from bayestune.sampling.logit_space import LogitDraws
from bayestune.sampling.stacked import StackedDraws

PREDICTIVES = ("mc", "antithetic", "linearised")


class Variational(Posterior):
    """The distribution of a Bayesian LoRA adapter: draw k has weights ``layer.drawn(noise(seed, k, layer.name))``.

    For BLoB (arXiv 2406.11675) these are ``A = M + G^2 * noise``.

    Args:
        predictive: how `predict` averages over it. "mc", independent draws. "antithetic", draws in pairs of opposite
            noise, whose averages vary less: an even number of them. "linearised", no draws of weights: logits
            linearised about the mean are Gaussian, so one forward and C - 1 backward passes give any number of
            draws of the logits; for Gaussian adapters. A choice of the prediction: it is not saved.

    Raises:
        ConfigError: another `predictive`.
    """

    kind = "blob"
    default_draws = 10

    def __init__(self, model: PeftModel, *, temperature: float = 1.0, predictive: str = "mc") -> None:
        super().__init__(model, temperature=temperature)
        if predictive not in PREDICTIVES:
            raise ConfigError(f"predictive: found {predictive!r}, expected one of {', '.join(PREDICTIVES)}.")
        self.predictive = predictive

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        if self.predictive == "linearised" and draws:
            return LogitDraws(self.model, draws=draws, seed=seed)
        if self.predictive == "antithetic" and draws % 2:
            raise refuse_draws(draws, "antithetic draws come in pairs: ask for an even number.")
        return StackedDraws.of(self.model, draws=draws, seed=seed, antithetic=self.predictive == "antithetic")
