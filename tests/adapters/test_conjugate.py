"""Posteriors that are known in closed form: what the library's path finds must be them."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from bayestune.adapters import BlobConfig, GaussianLinear, drawn_weights, gaussian_layers, training_noise
from bayestune.functional import clamp_rho, gaussian_kl, gaussian_kl_gradient
from probes import z_bound

PRIOR_STD = 0.05  # as strong as the data: an error in either shows
NOISE_STD = 0.3
ROWS, INPUTS, OUTPUTS, RANK = 40, 4, 3, 2


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted_linear(base: Tensor, up: Tensor, *, estimator: str = "independent", alpha: int = 3) -> PeftModel:
    """y = (W0 + alpha / r B A) x in float64, A Gaussian and as it is made, B fixed to `up` [m, r]."""
    linear = nn.Linear(base.shape[1], base.shape[0], bias=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BlobConfig(
            r=up.shape[1], lora_alpha=alpha, target_modules=["0"], prior_std=PRIOR_STD, estimator=estimator
        )
        model = get_peft_model(nn.Sequential(linear), config).double().train()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(base)
        layer.lora_B["default"].weight.copy_(up)
    layer.lora_B["default"].weight.requires_grad_(False)
    return model


def only_layer(model: PeftModel) -> GaussianLinear:
    (layer,) = gaussian_layers(model).values()
    return layer


@dataclass
class Regression:
    """y = (W0 + c B A) x + e with e ~ N(0, s^2) and A ~ N(0, s_p^2): everything about A is known."""

    estimator: str = "independent"

    def __post_init__(self) -> None:
        self.x, self.base, self.up = (
            randn(ROWS, INPUTS, seed=1),
            randn(OUTPUTS, INPUTS, seed=2),
            randn(3, RANK, seed=3),
        )
        self.scaling = 3 / RANK
        truth = self.base + self.scaling * self.up @ (PRIOR_STD * randn(RANK, INPUTS, seed=4))
        self.y = self.x @ truth.T + NOISE_STD * randn(ROWS, OUTPUTS, seed=5)
        self.model = adapted_linear(self.base, self.up, estimator=self.estimator)
        self.layer = only_layer(self.model)

    @cached_property
    def precision(self) -> Tensor:
        """Of the exact posterior of vec(A), row-major."""
        data = torch.kron(self.up.T @ self.up, self.x.T @ self.x) * self.scaling**2 / NOISE_STD**2
        return data + torch.eye(RANK * INPUTS, dtype=torch.float64) / PRIOR_STD**2

    @cached_property
    def mean(self) -> Tensor:
        residual = self.y - self.x @ self.base.T
        right = self.scaling / NOISE_STD**2 * (self.up.T @ residual.T @ self.x).flatten()
        return torch.linalg.solve(self.precision, right).view(RANK, INPUTS)

    @cached_property
    def deviation(self) -> Tensor:
        """Of the best mean-field Gaussian."""
        return self.precision.diagonal().rsqrt().view(RANK, INPUTS)

    @cached_property
    def log_evidence(self) -> Tensor:
        design = self.scaling * torch.kron(self.up, self.x)  # vec(residual), one output after the other
        noise = NOISE_STD**2 * torch.eye(ROWS * OUTPUTS, dtype=torch.float64)
        marginal = MultivariateNormal(torch.zeros(ROWS * OUTPUTS).double(), noise + PRIOR_STD**2 * design @ design.T)
        return marginal.log_prob((self.y - self.x @ self.base.T).T.flatten())

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Per row, nats."""
        squared = ((output - target) / NOISE_STD).square() / 2
        return (squared + math.log(NOISE_STD) + math.log(2 * math.pi) / 2).sum(-1)

    def exact_elbo(self) -> Tensor:
        """Through stacked draws at the points +-sqrt(D) e_d, whose average integrates any quadratic exactly."""
        size = RANK * INPUTS
        points = math.sqrt(size) * torch.eye(size, dtype=torch.float64)
        epsilon = torch.cat([points, -points]).view(2 * size, RANK, INPUTS)
        with drawn_weights({self.layer: self.layer.drawn(epsilon)}):
            output = self.model(self.x.repeat(2 * size, 1))
        expected_nll = self.nll(output, self.y.repeat(2 * size, 1)).sum() / (2 * size)
        return -expected_nll - gaussian_kl(self.layer.weight, self.layer.rho, PRIOR_STD)

    def go_to_optimum(self) -> None:
        with torch.no_grad():
            self.layer.weight.copy_(self.mean)
            self.layer.rho.copy_(self.deviation.sqrt())


def test_S06a_the_gradient_is_zero_at_the_optimum() -> None:
    problem = Regression()
    problem.go_to_optimum()
    gradients = torch.autograd.grad(problem.exact_elbo(), (problem.layer.weight, problem.layer.rho))
    assert max(gradient.abs().max() for gradient in gradients) <= 1e-8
    with torch.no_grad():
        problem.layer.rho.mul_(1.01)
    gradients = torch.autograd.grad(problem.exact_elbo(), (problem.layer.weight, problem.layer.rho))
    assert gradients[1].abs().min() > 1e-2


def test_S06c_evidence_less_elbo_is_half_the_log_ratio_of_determinants() -> None:
    problem = Regression()
    problem.go_to_optimum()
    gap = (problem.precision.diagonal().log().sum() - torch.linalg.slogdet(problem.precision)[1]) / 2
    assert abs(problem.log_evidence - problem.exact_elbo() - gap) <= 1e-8
    assert gap > 0.1


@pytest.mark.parametrize("estimator", ["independent", "flipout", "flipout_token"])
def test_S04_minibatch_gradients_are_those_of_the_elbo_on_average(estimator: str) -> None:
    problem = Regression(estimator)
    layer, copies = problem.layer, 1500
    with torch.no_grad():
        layer.weight.copy_(problem.mean + 0.1)
        layer.rho.copy_(1.3 * problem.deviation.sqrt())
    exact = torch.autograd.grad(-problem.exact_elbo(), (layer.weight, layer.rho))
    kl = gaussian_kl_gradient(layer.weight.detach(), layer.rho.detach(), PRIOR_STD)
    order = np.random.default_rng(0)
    found = []
    for _ in range(copies):
        batches = np.split(order.permutation(ROWS), range(7, ROWS, 7))  # the last has 5 rows
        rows = torch.from_numpy(batches[order.integers(len(batches))])
        nll = problem.nll(problem.model.base_model(problem.x[rows]), problem.y[rows]).sum() * len(batches)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(nll, (layer.weight, layer.rho))]))
    samples = torch.stack(found)
    error = samples.std(0) / math.sqrt(copies)
    expected = torch.cat([(e - k).flatten() for e, k in zip(exact, kl, strict=True)])
    assert ((samples.mean(0) - expected).abs() <= z_bound(samples.shape[1]) * error).all()


def test_S06b_training_from_the_start_finds_the_posterior() -> None:
    problem = Regression()
    layer, steps, repeats = problem.layer, 900, 256
    clock = training_noise(problem.model)
    optimiser = torch.optim.Adam([layer.weight, layer.rho], lr=0.02)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-3, total_iters=steps)
    order = np.random.default_rng(0)
    batches: list[Tensor] = []
    means, deviations = [], []
    for step in range(steps):
        clock.step, clock.micro = step, 0
        if not batches:
            batches = list(torch.from_numpy(order.permutation(ROWS)).split(7))
        rows = batches.pop()
        output = problem.model.base_model(problem.x[rows].repeat(repeats, 1))
        nll = problem.nll(output, problem.y[rows].repeat(repeats, 1)).mean() * len(rows) * 6
        layer.weight.grad, layer.rho.grad = gaussian_kl_gradient(layer.weight.detach(), layer.rho.detach(), PRIOR_STD)
        nll.backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            layer.rho.copy_(clamp_rho(layer.rho))
        means.append(layer.weight.detach().clone())
        deviations.append(layer.rho.detach() ** 2)
    late = slice(2 * steps // 3, None)
    mean, deviation = torch.stack(means[late]).mean(0), torch.stack(deviations[late]).mean(0)
    assert ((mean - problem.mean) / problem.deviation).abs().max() <= 0.05
    assert (deviation / problem.deviation - 1).abs().max() <= 0.03


LOGISTIC_PRIOR = 0.5
LOGISTIC_X = torch.tensor([-2.0, -1.5, -1.0, -0.5, 0.5, 1.0, 1.5, 2.0], dtype=torch.float64)
LOGISTIC_Y = torch.tensor([0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def logistic_optimum() -> tuple[float, float]:
    """(mean, standard deviation) that maximise the ELBO, integrated with 64 Gauss-Hermite nodes."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(64))
    weights = weights / weights.sum()
    m, log_s = torch.zeros((), dtype=torch.float64), torch.tensor(-1.0, dtype=torch.float64)
    m.requires_grad_(), log_s.requires_grad_()
    optimiser = torch.optim.LBFGS([m, log_s], max_iter=100, tolerance_grad=1e-12, tolerance_change=1e-14)

    def loss() -> Tensor:
        optimiser.zero_grad()
        logits = torch.outer(m + log_s.exp() * nodes, LOGISTIC_X)
        nll = F.binary_cross_entropy_with_logits(logits, LOGISTIC_Y.expand_as(logits), reduction="none").sum(1)
        kl = math.log(LOGISTIC_PRIOR) - log_s + ((2 * log_s).exp() + m**2) / (2 * LOGISTIC_PRIOR**2) - 0.5
        value = (weights * nll).sum() + kl
        value.backward()
        return value

    optimiser.step(loss)
    assert max(abs(m.grad.item()), abs(log_s.grad.item())) < 1e-6
    return m.item(), log_s.exp().item()


@pytest.mark.parametrize("estimator", ["independent", "flipout_token"])
def test_S07_logistic_optimum(estimator: str) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    model = adapted_linear(0 * one, one, estimator=estimator, alpha=1)
    layer, steps, repeats = only_layer(model), 900, 128
    optimiser = torch.optim.Adam([layer.weight, layer.rho], lr=0.03)
    x, y = LOGISTIC_X.repeat(repeats)[:, None], LOGISTIC_Y.repeat(repeats)[:, None]
    path = []
    for _ in range(steps):
        nll = F.binary_cross_entropy_with_logits(model.base_model(x), y) * len(LOGISTIC_X)
        layer.weight.grad, layer.rho.grad = gaussian_kl_gradient(
            layer.weight.detach(), layer.rho.detach(), LOGISTIC_PRIOR
        )
        nll.backward()
        optimiser.step()
        path.append((layer.weight.item(), layer.rho.item() ** 2))
    m, s = np.mean(path[steps // 3 :], axis=0)
    best_m, best_s = logistic_optimum()
    assert abs(m - best_m) <= 0.02 * best_s
    assert abs(s / best_s - 1) <= 0.02


def test_S07_without_data_the_posterior_is_the_prior() -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    layer = only_layer(adapted_linear(0 * one, one))
    mean, rho = layer.weight.detach(), layer.rho.detach()
    for _ in range(2000):
        d_mean, d_rho = gaussian_kl_gradient(mean, rho, LOGISTIC_PRIOR)
        mean, rho = mean - 0.01 * d_mean, clamp_rho(rho - 0.01 * d_rho)
    assert 0 <= gaussian_kl(mean, rho, LOGISTIC_PRIOR) <= 1e-4


UPS = {
    "full rank": randn(4, 2, seed=3),
    "rank 1": randn(4, 1, seed=3) @ randn(1, 2, seed=4),
    "zero": torch.zeros(4, 2, dtype=torch.float64),
}


@pytest.mark.parametrize("name", UPS)
def test_S09a_the_full_weights_have_the_covariance_of_theorem_3_1(name: str) -> None:
    rows, up = 50_000, UPS[name]
    base = randn(4, 3, seed=1)
    model = adapted_linear(base, up)
    layer = only_layer(model)
    with torch.no_grad():
        layer.rho.copy_(0.5 + 0.2 * randn(2, 3, seed=6))
    eye = torch.eye(3, dtype=torch.float64)
    with torch.no_grad():  # columns of W stacked: vec(W) as in the paper
        weights = model(eye.expand(rows, 3, 3)).flatten(1)
        lift = 1.5 * torch.kron(eye, up)
        mean = (base + 1.5 * up @ layer.weight).T.flatten()
        covariance = lift @ (layer.rho**4).T.flatten().diag() @ lift.T
    centred = weights - mean
    variance = covariance.diagonal()
    z = z_bound(len(mean) * (len(mean) + 3) // 2)
    tiny = 1e-12  # where B has no row the weights do not move
    assert (centred.mean(0).abs() <= z * (variance / rows).sqrt() + tiny).all()
    error = ((torch.outer(variance, variance) + covariance.square()) / rows).sqrt()
    assert ((centred.T @ centred / rows - covariance).abs() <= z * error + tiny).all()


def full_weight_kl(layer: GaussianLinear, base: Tensor, up: Tensor) -> Tensor:
    """KL of the degenerate Gaussians of W, on the space where they have a density (theorem 3.2)."""
    eye = torch.eye(layer.in_features, dtype=torch.float64)
    lift = torch.kron(eye, up)
    directions, singular, _ = torch.linalg.svd(lift)
    basis = directions[:, : int((singular > 1e-10 * singular.max()).sum())]
    if basis.shape[1] == 0:
        return torch.zeros((), dtype=torch.float64)

    def on_range(mean: Tensor, scale: Tensor) -> MultivariateNormal:
        root = basis.T @ lift @ scale.diag()
        return MultivariateNormal(basis.T @ mean, covariance_matrix=root @ root.T)

    posterior = on_range((base + up @ layer.weight).T.flatten(), (layer.rho**2).T.flatten())
    return kl_divergence(
        posterior, on_range(base.T.flatten(), torch.full((lift.shape[1],), PRIOR_STD, dtype=torch.float64))
    )


@pytest.mark.parametrize("scaling", [1.0, 1.5])
@pytest.mark.parametrize("name", UPS)
def test_S09b_the_kl_of_the_full_weights_is_that_of_a(name: str, scaling: float) -> None:
    base, up = randn(4, 3, seed=1), scaling * UPS[name]
    layer = only_layer(adapted_linear(base, up))
    with torch.no_grad():
        layer.rho.copy_(0.5 + 0.2 * randn(2, 3, seed=6))
        full, small = full_weight_kl(layer, base, up).item(), layer.kl().item()
    assert math.isfinite(small)
    if name == "full rank":
        assert full == pytest.approx(small, rel=1e-10)
    else:  # what B cannot see is regularised in A all the same
        assert 0 <= full < small
