"""Defects of the KL, its gradient and weights, and the keys of the noise."""

import math
from typing import Any

import torch
from torch import Tensor

from mutants.defect import defect, replace, wrap

F = "bayestune.functional"
TESTS = "test_functional.py"


@defect(TESTS, "S01")
def standard_deviation_g_instead_of_g_squared() -> None:
    replace(f"{F}.std", lambda rho: rho.abs())


@defect(TESTS, "S01")
def kl_with_the_wrong_sign_of_its_logarithm() -> None:
    def wrong(mean: Tensor, rho: Tensor, prior_std: float) -> Tensor:
        m, omega = mean.double(), rho.double().square()
        log = omega.log() - math.log(prior_std)
        return (log + (omega.square() + m.square()) / (2 * prior_std**2) - 0.5).sum()

    replace(f"{F}.gaussian_kl", wrong)


@defect(TESTS, "S01")
def kl_in_single_precision() -> None:
    def wrong(mean: Tensor, rho: Tensor, prior_std: float) -> Tensor:
        m, omega = mean.float(), rho.float().square()
        terms = math.log(prior_std) - omega.log() + (omega.square() + m.square()) / (2 * prior_std**2) - 0.5
        return terms.sum().double()

    replace(f"{F}.gaussian_kl", wrong)


@defect(TESTS, "S01")
def kl_averaged_over_its_entries() -> None:
    wrap(f"{F}.gaussian_kl", lambda right: lambda mean, rho, s: right(mean, rho, s) / mean.numel())


@defect("adapters/test_conjugate.py", "S09")
def kl_of_the_first_row_of_a() -> None:
    from bayestune.functional import gaussian_kl

    name = "bayestune.adapters.gaussian.GaussianLinear.kl"
    replace(name, lambda self: gaussian_kl(self.weight[:1], self.rho[:1], self.prior_std))


@defect(TESTS, "S02")
def kl_gradient_of_the_variance_instead_of_g() -> None:
    replace(f"{F}.gaussian_kl_gradient", lambda mean, rho, s: (mean / s**2, rho**3 / s**2 - 1 / rho))


@defect(TESTS, "S02")
def kl_gradient_of_the_mean_twice_as_strong() -> None:
    def make(right: Any) -> Any:
        def wrong(mean: Tensor, rho: Tensor, prior_std: float) -> tuple[Tensor, Tensor]:
            d_mean, d_rho = right(mean, rho, prior_std)
            return 2 * d_mean, d_rho

        return wrong

    wrap(f"{F}.gaussian_kl_gradient", make)


@defect(TESTS, "S02")
def g_that_loses_its_sign_near_zero() -> None:
    replace(f"{F}.clamp_rho", lambda rho, floor=1e-4: rho.abs().clamp(min=floor))


@defect(TESTS, "S17")
def weights_of_the_papers_cycle_shifted_by_one() -> None:
    wrap(f"{F}.paper_kl_weight", lambda right: lambda step, cycle: right(step - 1, cycle))


@defect(TESTS, "S17")
def linear_weights_that_start_at_zero() -> None:
    replace(f"{F}.linear_kl_weight", lambda step, cycle: 2.0 * (step % cycle) / (cycle * (cycle + 1)))


@defect(TESTS, "S17")
def uniform_weights_that_add_up_to_the_cycle() -> None:
    replace(f"{F}.uniform_kl_weight", lambda step, cycle: 1.0)


@defect(TESTS, "cycle_steps")
def a_cycle_one_update_too_long() -> None:
    wrap(f"{F}.cycle_steps", lambda right: lambda rows, batch_size, **more: 1 + right(rows, batch_size, **more))


@defect("training/test_prior.py")
def the_prior_of_map_without_its_half() -> None:
    wrap(f"{F}.gaussian_penalty", lambda right: lambda parameters, s: 2 * right(parameters, s))


@defect(TESTS, "S10")
def the_same_noise_for_every_draw() -> None:
    wrap(f"{F}.prediction_noise", lambda right: lambda seed, index, name, shape: right(seed, 0, name, shape))


@defect(TESTS, "S10")
def the_same_noise_for_every_layer() -> None:
    wrap(f"{F}.prediction_noise", lambda right: lambda seed, index, name, shape: right(seed, index, "", shape))


@defect(TESTS, "S10")
def the_same_noise_for_every_seed() -> None:
    wrap(f"{F}.prediction_noise", lambda right: lambda seed, index, name, shape: right(0, index, name, shape))


@defect(TESTS, "K04")
def prediction_noise_from_the_global_generator() -> None:
    replace(f"{F}.prediction_noise", lambda seed, index, name, shape: torch.randn(shape))


@defect(TESTS, "S10")
def training_noise_that_ignores_the_process() -> None:
    wrap(f"{F}.training_generator", lambda right: lambda a, b, c, rank, *more: right(a, b, c, 0, *more))


@defect(TESTS, "S10")
def training_noise_that_ignores_the_micro_batch() -> None:
    wrap(f"{F}.training_generator", lambda right: lambda a, b, micro, *more: right(a, b, 0, *more))


@defect(TESTS, "seed")
def a_key_that_confuses_numbers_and_strings() -> None:
    wrap(f"{F}.derive_seed", lambda right: lambda *key: right(*(str(part) for part in key)))
