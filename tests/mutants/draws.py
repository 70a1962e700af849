"""Defects of random layers, their draws, and the sums over draws."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mutants.defect import defect, replace, wrap

DRAWN = "bayestune.adapters.gaussian.GaussianLinear.drawn"
LAYERS = "adapters/test_gaussian.py"


@defect("inference/test_draws.py", "S10")
def variance_for_standard_deviation_in_a_draw() -> None:
    replace(DRAWN, lambda self, epsilon: self.weight + self.rho**4 * epsilon.to(self.weight))


@defect("training/test_gradient.py", "S03 and gradient_equals")
def gradient_of_g_of_a_linear_std() -> None:
    replace(DRAWN, lambda self, epsilon: self.weight + self.rho.detach() * self.rho * epsilon.to(self.weight))


@defect("adapters/test_conjugate.py", "S04 and not nightly")
def no_gradient_reaches_g() -> None:
    replace(DRAWN, lambda self, epsilon: self.weight + self.rho.detach() ** 2 * epsilon.to(self.weight))


@defect(LAYERS, "S14")
def a_standard_deviation_that_never_vanishes() -> None:
    replace(DRAWN, lambda self, epsilon: self.weight + (self.rho**2 + 1e-4) * epsilon.to(self.weight))


@defect("inference/test_draws.py", "S10")
def draws_that_are_ten_percent_too_wide() -> None:
    wrap(DRAWN, lambda right: lambda self, epsilon: right(self, 1.1 * epsilon))


@defect("adapters/test_distributions.py", "dropout")
def masks_that_do_not_rescale() -> None:
    wrap(
        "bayestune.adapters.dropout.DropoutLinear.drawn",
        lambda right: lambda self, epsilon: right(self, epsilon) * (1 - self.p),
    )


@defect(LAYERS, "S15")
def noise_in_evaluation_mode() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, x: Tensor) -> Tensor:
            if self.training:
                return right(self, x)
            return F.linear(x, self.drawn(torch.randn(self.weight.shape)))

        return wrong

    wrap("bayestune.adapters.random.RandomLinear.forward", make)


@defect(LAYERS, "consecutive")
def training_noise_that_does_not_move_on() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, *inputs: Any) -> None:
            micro = self.micro
            right(self, *inputs)
            self.micro = micro

        return wrong

    wrap("bayestune.adapters.noise.TrainingNoise.__call__", make)


@defect(LAYERS, "S10")
def rows_share_their_training_noise() -> None:
    def make(right: Any) -> Any:
        def wrong(layers: Any, rows: int, key: Any) -> dict[str, Tensor]:
            return {name: noise.expand(rows, -1, -1) for name, noise in right(layers, 1, key).items()}

        return wrong

    wrap("bayestune.adapters.noise._normal", make)


@defect(LAYERS, "S12")
def flipout_without_signs() -> None:
    from bayestune.adapters.noise import _normal

    def wrong(layers: Any, rows: int, key: Any) -> dict[str, Tensor]:
        return {name: noise.expand(rows, -1, -1) for name, noise in _normal(layers, 1, key).items()}

    replace("bayestune.adapters.noise._flipout", wrong)


@defect("inference/test_draws.py", "S15")
def a_draw_of_a_merged_adapter() -> None:
    replace("bayestune.adapters.layers.is_merged", lambda model: False)


@defect("inference/test_draws.py", "P13")
def a_draw_leaks_out_of_its_context() -> None:
    kept: list[Any] = []

    def make(right: Any) -> Any:
        @contextlib.contextmanager
        def wrong(*args: Any, **settings: Any) -> Iterator[None]:
            kept.append(right(*args, **settings))
            kept[-1].__enter__()
            yield

        return wrong

    wrap("bayestune.adapters.random.drawn_weights", make)


@defect("inference/test_draws.py", "layers or names or same")
def layers_in_the_order_of_the_model() -> None:
    def make(right: Any) -> Any:
        return lambda *args: {str(number): layer for number, layer in enumerate(right(*args).values())}

    wrap("bayestune.adapters.layers.random_layers", make)


@defect("sampling/test_variational.py", "antithetic")
def antithetic_draws_that_are_independent() -> None:
    wrap(
        "bayestune.sampling.stacked.stacked_weights",
        lambda right: lambda model, indices, seed, *, antithetic=False: right(model, indices, seed),
    )


@defect("sampling/test_variational.py", "covariance")
def covariance_of_logits_twice_too_large() -> None:
    name = "bayestune.sampling.logit_space.difference_covariance"
    wrap(name, lambda right: lambda forward, layers: 2 * right(forward, layers))


@defect("sampling/test_variational.py", "root")
def a_root_that_turns_with_the_signs_of_eigenvectors() -> None:
    def wrong(covariance: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(covariance)
        return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)

    replace("bayestune.sampling.logit_space.symmetric_root", wrong)


@defect("adapters/test_precision.py", "N01")
def variances_cast_to_half_precision_with_the_model() -> None:
    from torch import nn

    replace("bayestune.adapters.random.FullPrecisionLinear._apply", nn.Linear._apply)
