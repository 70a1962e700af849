"""A point: one adapter and no spread. What maximum likelihood (MLE) and maximum a posteriori (MAP) training leave."""

from bayestune.sampling.base import Posterior, Sampler, refuse_draws
from bayestune.sampling.stacked import StackedDraws


class Point(Posterior):
    """One plain LoRA adapter, ``q(theta) = delta(theta - theta_hat)``; every prediction is that of `draws` = 0."""

    kind = "point"
    default_draws = 0

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        if draws:
            raise refuse_draws(draws, "plain LoRA is a point without a spread, expected 0.")
        return StackedDraws.of(self.model, draws=0, seed=seed)
