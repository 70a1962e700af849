"""The mathematics: KL and its gradient against oracles, KL weights against fractions, noise keyed by its name."""

import hashlib
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from bayestune import functional
from bayestune.functional import (
    RHO_FLOOR,
    clamp_rho,
    cycle_steps,
    derive_seed,
    gaussian_kl,
    gaussian_kl_gradient,
    linear_kl_weight,
    paper_kl_weight,
    prediction_noise,
    std,
    training_generator,
    uniform_kl_weight,
)
from probes import departure, z_bound

Figure = Callable[..., None]
GOLDEN_SEED = 593881292489614372
GOLDEN_NOISE = [0.30668920278549194, 0.6310138702392578, -0.2016453742980957, -1.4310078620910645]
GRID = [
    (mean, sign * rho, prior)
    for mean in (0.0, 1e-3, -10.0)
    for rho in (1e-4, 0.05, 1.0)
    for sign in (1, -1)
    for prior in (0.02, 0.2, 1.0)
]
CYCLES = (1, 2, 53, 1023, 1075, 100_000)


def scalar(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.property("S01")
def test_kl_is_that_of_two_normals(figure: Figure) -> None:
    for mean, rho, prior in GRID:
        expected = kl_divergence(Normal(scalar(mean), scalar(rho) ** 2), Normal(0.0, scalar(prior))).item()
        error = abs(gaussian_kl(scalar(mean), scalar(rho), prior).item() - expected)
        figure("error of the KL, of itself or 0.01 nats if that is more", error / max(expected, 0.01), at_most=1e-13)


@pytest.mark.property("S01")
def test_the_published_form_would_not_pass() -> None:
    rho, prior, tiny = 0.05, 0.2, 1e-6
    published = math.log((prior + tiny) / (rho**2 + tiny)) + rho**4 / (2 * prior**2 + tiny) - 0.5
    assert abs(published / gaussian_kl(scalar(0.0), scalar(rho), prior).item() - 1) > 1e-5


@pytest.mark.property("S01")
def test_kl_adds_up_entries_in_float64_whatever_their_dtype() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        mean, rho = torch.full((1000, 1000), 0.25, dtype=dtype), torch.full((1000, 1000), 0.0625, dtype=dtype)
        total = gaussian_kl(mean, rho, 0.2)
        assert total.dtype == torch.float64
        assert total.item() == pytest.approx(1e6 * gaussian_kl(scalar(0.25), scalar(0.0625), 0.2).item(), rel=1e-12)


@pytest.mark.property("S02")
def test_kl_gradient_is_the_closed_form(figure: Figure) -> None:
    for mean, rho, prior in GRID:
        m, g = scalar(mean).requires_grad_(), scalar(rho).requires_grad_()
        automatic = torch.autograd.grad(gaussian_kl(m, g, prior), (m, g))
        by_hand = (mean / prior**2, 2 * rho * (rho**2 / prior**2 - 1 / rho**2))
        size = (abs(mean) / prior**2, 2 * abs(rho) ** 3 / prior**2 + 2 / abs(rho))  # of the terms, which may cancel
        closed = gaussian_kl_gradient(scalar(mean), scalar(rho), prior)
        for one, two, hand, scale in zip(automatic, closed, by_hand, size, strict=True):
            for computed in (one.item(), two.item()):
                error = abs(computed - hand) / scale if scale else abs(computed - hand)
                figure("error of the KL's gradient, of the size of its terms", error, at_most=1e-12)


@pytest.mark.property("S02")
def test_a_rho_of_zero_is_held_away_from_it() -> None:
    rho = torch.tensor([0.0, -0.0, 1e-30, -1e-30, RHO_FLOOR / 2, -RHO_FLOOR / 2, 0.3, -0.3], dtype=torch.float64)
    held = clamp_rho(rho)
    expected = [RHO_FLOOR, RHO_FLOOR, RHO_FLOOR, -RHO_FLOOR, RHO_FLOOR, -RHO_FLOOR, 0.3, -0.3]
    assert held.tolist() == expected
    for gradient in gaussian_kl_gradient(torch.ones_like(rho), rho, 0.2):
        assert gradient.isfinite().all()
    assert torch.equal(gaussian_kl_gradient(held, rho, 0.2)[1], gaussian_kl_gradient(held, held, 0.2)[1])
    assert gaussian_kl(torch.zeros_like(rho), rho, 0.2).item() == math.inf


@pytest.mark.property("S02")
def test_the_gradient_keeps_the_dtype() -> None:
    mean, rho = torch.ones(3), torch.full((3,), 0.05)
    assert [part.dtype for part in gaussian_kl_gradient(mean, rho, 0.2)] == [torch.float32] * 2
    assert torch.equal(std(torch.tensor([-3.0, 0.5])), torch.tensor([9.0, 0.25]))


@pytest.mark.property("S17")
@pytest.mark.parametrize("cycle", CYCLES)
def test_kl_weights_add_up_over_a_cycle(cycle: int, figure: Figure) -> None:
    missing = 0.0 if cycle > 60 else 1 / (2 ** (cycle + 1) - 1)
    for schedule, expected in [(uniform_kl_weight, 1), (linear_kl_weight, 1), (paper_kl_weight, 1 - missing)]:
        for start in (0, 3 * cycle) if cycle < 2000 else (cycle,):
            weights = [schedule(step, cycle) for step in range(start, start + cycle)]
            error = abs(math.fsum(weights) / expected - 1)
            figure(f"sum of a cycle of {schedule.__name__}, relative error", error, at_most=1e-12)
            assert min(weights) >= 0


@pytest.mark.property("S17")
@pytest.mark.parametrize("cycle", [c for c in CYCLES if c < 2000])
def test_the_papers_weights_are_exact(cycle: int) -> None:
    for i in {1, 2, cycle // 2, cycle - 1, cycle} & set(range(1, cycle + 1)):
        exact = Fraction(2**i, 2 ** (cycle + 1) - 1)
        assert paper_kl_weight(i - 1, cycle) == pytest.approx(float(exact), rel=1e-15, abs=5e-324)
    assert Fraction(2 ** (cycle + 1) - 2, 2 ** (cycle + 1) - 1) == sum(
        Fraction(2**i, 2 ** (cycle + 1) - 1) for i in range(1, cycle + 1)
    )


@pytest.mark.property("S17")
def test_linear_weights_rise_in_equal_steps() -> None:
    weights = [linear_kl_weight(step, 40) for step in range(40)]
    assert np.diff(weights) == pytest.approx(weights[0], rel=1e-12)


def test_cycle_steps_are_the_papers() -> None:
    for rows, steps in [(640, 316), (1119, 393), (2251, 518), (2558, 544), (4957, 706), (9427, 909)]:
        assert cycle_steps(rows, 4) == cycle_steps(rows, 2, processes=2) == steps
    assert cycle_steps(1, 4096) == 1
    assert cycle_steps(640, 4, gamma=4.0) == int(100 * 640 ** (3.14159 / 4) / 4)


def test_keys_give_distinct_seeds_that_never_change() -> None:
    keys = [
        (kind, seed, index, name)
        for kind, seed, index, name in itertools.product(("draw", "rho"), (0, 1, 11, -1), (0, 1, 11, 111), ("a", "1"))
    ]
    assert len({derive_seed(*key) for key in keys}) == len(keys)
    assert derive_seed(1) != derive_seed("1") and derive_seed("ab", "c") != derive_seed("a", "bc")
    assert all(0 <= derive_seed(*key) < 2**63 for key in keys)
    assert derive_seed("draw", 0, 0, "model.layers.0.self_attn.q_proj") == GOLDEN_SEED  # saved draws depend on it
    assert derive_seed("draw", np.int64(7), np.int32(3), "q") == derive_seed("draw", 7, 3, "q")


def test_prediction_noise_never_changes() -> None:
    noise = prediction_noise(0, 0, "model.layers.0.self_attn.q_proj", (8, 16))
    assert noise.dtype == torch.float32 and noise.device.type == "cpu"
    assert noise[0, :4].tolist() == GOLDEN_NOISE


def test_prediction_noise_is_the_same_on_a_cpu_without_vector_instructions() -> None:
    program = (
        "import hashlib, importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('functional', {functional.__file__!r})\n"
        "functional = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(functional)\n"
        "noise = functional.prediction_noise(1, 2, 'q', (64, 1024))\n"
        "print(hashlib.sha256(noise.numpy().tobytes()).hexdigest())\n"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default"}
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    noise = prediction_noise(1, 2, "q", (64, 1024))
    assert output.stdout.strip() == hashlib.sha256(noise.numpy().tobytes()).hexdigest()


@pytest.mark.property("S10")
def test_prediction_noise_depends_on_every_part_of_its_key(figure: Figure) -> None:
    size = 40_000
    keys = [(0, 0, "q"), (1, 0, "q"), (0, 1, "q"), (1, 1, "q"), (0, 0, "v")]
    noise = torch.stack([prediction_noise(*key, (size,)).double() for key in keys])
    products = noise @ noise.T / size
    worst = max(
        departure(products.diagonal(), 1, math.sqrt(2 / size)),
        departure(products - products.diagonal().diag(), 0, 1 / math.sqrt(size)),
    )
    figure("variance and correlation between seeds, draws and layers, standard errors", worst, at_most=z_bound(25))


@pytest.mark.property("S10")
def test_training_noise_depends_on_every_part_of_its_key(figure: Figure) -> None:
    size = 40_000
    keys = [(0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    noise = torch.stack([torch.randn(size, generator=training_generator(*key, "cpu")).double() for key in keys])
    again = torch.randn(size, generator=training_generator(*keys[0], torch.device("cpu"))).double()
    products = noise @ noise.T / size
    assert torch.equal(again, noise[0])
    worst = departure(products - products.diagonal().diag(), 0, 1 / math.sqrt(size))
    figure("correlation between parts of the key of training noise, standard errors", worst, at_most=z_bound(20))


@pytest.mark.property("K04")
def test_noise_neither_reads_nor_moves_the_global_state() -> None:
    before = torch.get_rng_state()  # jaxtyping's checks use Python's own, which a fresh process checks
    first = prediction_noise(3, 4, "q", (5, 6))
    torch.rand(7)
    assert torch.equal(first, prediction_noise(3, 4, "q", (5, 6)))
    torch.set_rng_state(before)
    training_generator(0, 0, 0, 0, "cpu")
    prediction_noise(3, 5, "q", (5, 6))
    assert torch.equal(torch.get_rng_state(), before)
