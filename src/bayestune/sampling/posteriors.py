"""The posteriors that one adapter holds: `Point`, plain LoRA, and `Variational`, a Bayesian LoRA adapter."""

from peft import PeftModel

from bayestune.errors import ConfigError
from bayestune.sampling.base import Posterior, Sampler, refuse_draws
from bayestune.sampling.logit_space import LogitDraws
from bayestune.sampling.stacked import StackedDraws

PREDICTIVES = ("mc", "antithetic", "linearised")


class Point(Posterior):
    """A point estimate, ``q(theta) = delta(theta - theta_hat)``: one plain LoRA adapter, as MLE and MAP train it.

    Only predictions with ``draws=0`` exist.
    """

    kind = "point"
    default_draws = 0

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        if draws:
            raise refuse_draws(draws, "plain LoRA is a point without a spread, expected 0.")
        return StackedDraws.of(self.model, draws=0, seed=seed)


class Variational(Posterior):
    """The distribution of a Bayesian LoRA adapter: draw k has weights ``layer.drawn(noise(seed, k, layer.name))``.

    For BLoB these are ``A = M + G^2 * noise``.

    Args:
        model: model with the adapter.
        temperature: T of the predictive, as in `Posterior`.
        predictive: how `predict` averages over draws; it is not saved. "mc": independent draws. "antithetic": an even
            number of draws, in pairs of opposite noise, whose averages vary less. "linearised", for Gaussian adapters:
            logits linearized about the mean are Gaussian, so one forward and C - 1 backward passes give any number of
            draws of the logits.

    Raises:
        ConfigError: `predictive` is unknown.
    """

    kind = "variational"
    adapter = "variational"
    default_draws = 10

    def __init__(self, model: PeftModel, *, temperature: float = 1.0, predictive: str = "mc") -> None:
        super().__init__(model, temperature=temperature)
        if predictive not in PREDICTIVES:
            raise ConfigError(f"predictive: found {predictive!r}, expected one of {', '.join(PREDICTIVES)}.")
        self.predictive = predictive

    def with_predictive(self, name: str) -> "Variational":
        other = Variational(self.model, temperature=self.temperature, predictive=name)
        other.known = self.known
        return other

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        if self.predictive == "linearised" and draws:
            return LogitDraws(self.model, draws=draws, seed=seed)
        if self.predictive == "antithetic" and draws % 2:
            raise refuse_draws(draws, "antithetic draws come in pairs: ask for an even number.")
        return StackedDraws.of(self.model, draws=draws, seed=seed, antithetic=self.predictive == "antithetic")
