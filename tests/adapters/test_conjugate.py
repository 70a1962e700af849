"""Posteriors that are known in closed form: what the library's path finds must be them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from adapters.conjugate import (
    PRIOR_STD,
    ROWS,
    Regression,
    adapted_linear,
    only_layer,
    randn,
)
from bayestune.adapters import GaussianLinear, training_noise
from bayestune.functional import clamp_rho, gaussian_kl_gradient
from bayestune.training.kl import kl_step
from probes import z_bound

Figure = Callable[..., None]
ESTIMATORS = pytest.mark.parametrize(
    ("estimator", "processes"), [("independent", 1), ("independent", 2), ("flipout", 1), ("flipout_token", 1)]
)


@pytest.mark.property("S06")
def test_the_gradient_is_zero_at_the_optimum(figure: Figure) -> None:
    problem = Regression()
    problem.go_to_optimum()
    gradients = torch.autograd.grad(problem.exact_elbo(), (problem.layer.weight, problem.layer.rho))
    figure("gradient at the optimum", max(gradient.abs().max().item() for gradient in gradients), at_most=1e-8)
    with torch.no_grad():
        problem.layer.rho.mul_(1.01)
    gradients = torch.autograd.grad(problem.exact_elbo(), (problem.layer.weight, problem.layer.rho))
    assert gradients[1].abs().min() > 1e-2


@pytest.mark.property("S06")
def test_evidence_less_elbo_is_half_the_log_ratio_of_determinants(figure: Figure) -> None:
    problem = Regression()
    problem.go_to_optimum()
    gap = (problem.precision.diagonal().log().sum() - torch.linalg.slogdet(problem.precision)[1]) / 2
    error = abs(problem.log_evidence - problem.exact_elbo() - gap).item()
    figure("log evidence - ELBO, less 1/2 (sum log diag - log det), nats", error, at_most=1e-8)
    assert gap > 0.1


@pytest.mark.property("S04")
@ESTIMATORS
def test_minibatch_gradients_are_those_of_the_elbo_on_average(estimator: str, processes: int, figure: Figure) -> None:
    departure, checks = gradient_departure(estimator, processes, copies=1500, seed=0)
    figure("mean gradient less the ELBO's, standard errors", departure, at_most=z_bound(checks))


@pytest.mark.property("S04")
@pytest.mark.nightly
@ESTIMATORS
def test_twenty_thousand_gradients_are_those_of_the_elbo_on_average(
    estimator: str, processes: int, nightly_seed: int, figure: Figure
) -> None:
    departure, checks = gradient_departure(estimator, processes, copies=20_000, seed=nightly_seed)
    figure("mean of 20,000 gradients less the ELBO's, standard errors", departure, at_most=z_bound(checks))


def gradient_departure(estimator: str, processes: int, *, copies: int, seed: int) -> tuple[float, int]:
    """The mean gradient of updates of 7 of 40 rows each, less the ELBO's, in standard errors; and the coordinates.

    Batches are those of shuffled epochs, the last of 5 rows, split among the processes; the gradient of an update is
    the mean of the processes', each of which has noise of its own.
    """
    problem = Regression(estimator)
    layer, clock = problem.layer, training_noise(problem.model)
    with torch.no_grad():
        layer.weight.copy_(problem.mean + 0.1)
        layer.rho.copy_(1.3 * problem.deviation.sqrt())
    exact = torch.autograd.grad(-problem.exact_elbo(), (layer.weight, layer.rho))
    kl = gaussian_kl_gradient(layer.weight.detach(), layer.rho.detach(), PRIOR_STD)
    order = np.random.default_rng(seed)
    found = []
    clock.seed = seed
    for step in range(copies):
        batches = np.split(order.permutation(ROWS), range(7, ROWS, 7))
        rows = batches[order.integers(len(batches))]
        nll = torch.zeros((), dtype=torch.float64)
        for rank, share in enumerate(np.array_split(rows, processes)):
            clock.step, clock.micro, clock.rank = step, 0, rank
            ours = torch.from_numpy(share)
            nll = nll + problem.nll(problem.model.base_model(problem.x[ours]), problem.y[ours]).sum() * len(batches)
        found.append(torch.cat([g.flatten() for g in torch.autograd.grad(nll, (layer.weight, layer.rho))]))
    samples = torch.stack(found)
    error = samples.std(0) / math.sqrt(copies)
    expected = torch.cat([(e - k).flatten() for e, k in zip(exact, kl, strict=True)])
    return ((samples.mean(0) - expected).abs() / error).max().item(), samples.shape[1]


@pytest.mark.property("S06")
def test_training_from_the_start_finds_the_posterior(figure: Figure) -> None:
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
    figure("mean, posterior stds", ((mean - problem.mean) / problem.deviation).abs().max().item(), at_most=0.05)
    figure("std, relative", (deviation / problem.deviation - 1).abs().max().item(), at_most=0.03)


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


@pytest.mark.property("S07")
@pytest.mark.parametrize("estimator", ["independent", "flipout_token"])
def test_logistic_optimum(estimator: str, figure: Figure) -> None:
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
    figure("mean, posterior stds", abs(m - best_m) / best_s, at_most=0.02)
    figure("std, relative", abs(s / best_s - 1), at_most=0.02)


@pytest.mark.property("S07")
def test_without_data_the_posterior_is_the_prior(figure: Figure) -> None:
    one = torch.ones(1, 1, dtype=torch.float64)
    layer = only_layer(adapted_linear(0 * one, one))
    with torch.no_grad():
        layer.weight.fill_(0.3)
    before = layer.kl().item()
    for _ in range(2000):
        kl_step([layer], rate=1e-4, weight=1.0, along_nll=False)
    assert before > 1
    figure("KL without data, nats", abs(layer.kl().item()), at_most=1e-4)


UPS = {
    "full rank": randn(4, 2, seed=3),
    "rank 1": randn(4, 1, seed=3) @ randn(1, 2, seed=4),
    "zero": torch.zeros(4, 2, dtype=torch.float64),
}


@pytest.mark.property("S09")
@pytest.mark.parametrize("name", UPS)
def test_the_full_weights_have_the_covariance_of_theorem_3_1(name: str, figure: Figure) -> None:
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
    error = ((torch.outer(variance, variance) + covariance.square()) / rows).sqrt()
    tiny = 1e-12  # where B has no row the weights do not move
    departures = [
        centred.mean(0).abs() / ((variance / rows).sqrt() + tiny),
        (centred.T @ centred / rows - covariance).abs() / (error + tiny),
    ]
    bound = z_bound(len(mean) * (len(mean) + 3) // 2)
    figure("mean and covariance of W, standard errors", max(d.max().item() for d in departures), at_most=bound)


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


@pytest.mark.property("S09")
@pytest.mark.parametrize("name", UPS)
def test_the_kl_of_the_full_weights_is_that_of_a(name: str, figure: Figure) -> None:
    base, up = randn(4, 3, seed=1), 1.5 * UPS[name]
    layer = only_layer(adapted_linear(base, up))
    with torch.no_grad():
        layer.rho.copy_(0.5 + 0.2 * randn(2, 3, seed=6))
        full, small = full_weight_kl(layer, base, up).item(), layer.kl().item()
    assert math.isfinite(small)
    if name == "full rank":
        figure("KL of W over that of A, less 1", abs(full / small - 1), at_most=1e-10)
    else:  # what B cannot see is regularised in A all the same
        assert 0 <= full < small
