"""Calibration by simulation (Talts et al. 2018, arXiv 1804.06788): the truth ranks evenly among the draws.

The log-likelihood is among the quantities that are ranked: on the parameters alone, a posterior whose mean is shrunk
towards the prior's looks calibrated (Modrak et al. 2023, arXiv 2211.02383).
"""

from collections.abc import Callable, Iterator
from statistics import NormalDist

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from adapters.conjugate import INPUTS, NOISE_STD, OUTPUTS, PRIOR_STD, RANK, ROWS, Regression
from bayestune.sampling.stacked import stacked_weights
from probes import z_bound

Change = Callable[[Tensor, Tensor], Tensor]
"""Draws [K, r, n] of a broken library, from the mean [r, n] and its good draws."""

DATA_SETS, DRAWS, BINS = 1000, 99, 20
CHANGES: dict[str, Change] = {
    "none": lambda mean, drawn: drawn,
    "mean * 0.9": lambda mean, drawn: drawn - 0.1 * mean,
    "std * 1.1": lambda mean, drawn: mean + 1.1 * (drawn - mean),
}


def data_sets(problem: Regression, seed: int) -> Iterator[Tensor]:
    """Show `problem` data sets, each from a truth out of the prior; yields the truths."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(DATA_SETS):
        truth = PRIOR_STD * torch.randn(RANK, INPUTS, generator=generator, dtype=torch.float64)
        problem.see(truth, NOISE_STD * torch.randn(ROWS, OUTPUTS, generator=generator, dtype=torch.float64))
        problem.train_to_optimum()
        yield truth


def p_values(seed: int, changes: dict[str, Change]) -> dict[str, tuple[float, float]]:
    """p of chi-squared that the ranks of (the parameters, the log-likelihood) are uniform, for each change."""
    problem = Regression(orthogonal=True)
    ranks: dict[str, tuple[list[Tensor], list[Tensor]]] = {name: ([], []) for name in changes}
    for number, truth in enumerate(data_sets(problem, seed)):
        drawn = stacked_weights(problem.model, range(DRAWS), DATA_SETS * seed + number)[problem.layer]
        for name, change in changes.items():
            both = torch.cat([truth[None], change(problem.layer.weight.detach(), drawn)])
            with torch.no_grad():
                quantities = (both.flatten(1), problem.log_likelihoods(both)[:, None])
            for kept, quantity in zip(ranks[name], quantities, strict=True):
                kept.append((quantity[1:] < quantity[0]).sum(0))
    return {name: (p_value(parameters), p_value(likelihoods)) for name, (parameters, likelihoods) in ranks.items()}


def p_value(ranks: list[Tensor]) -> float:
    """Of ranks 0 to DRAWS in BINS equal bins. The entries of A are independent here, so theirs count together."""
    return float(chisquare(torch.bincount(torch.cat(ranks) * BINS // (DRAWS + 1), minlength=BINS).numpy()).pvalue)


@pytest.mark.property("S08")
def test_draws_of_the_library_are_calibrated_and_those_of_broken_ones_are_told_apart(
    figure: Callable[..., None],
) -> None:
    found = p_values(0, CHANGES)
    figure("p of uniform ranks of the parameters", found["none"][0], at_least=1e-3)
    figure("p of uniform ranks of the log-likelihood", found["none"][1], at_least=1e-3)
    figure("p of the parameters, all means 10 % too small: not seen", found["mean * 0.9"][0], at_least=1e-3)
    figure("p of the log-likelihood, all means 10 % too small: seen", found["mean * 0.9"][1], at_most=1e-6)
    figure("p of the parameters, widths 10 % too large: seen", found["std * 1.1"][0], at_most=1e-6)


@pytest.mark.property("S08")
@pytest.mark.nightly
def test_draws_are_calibrated_for_any_seed(nightly_seed: int, figure: Callable[..., None]) -> None:
    parameters, likelihoods = p_values(nightly_seed, {"none": CHANGES["none"]})["none"]
    figure("p of uniform ranks of the parameters, any seed", parameters, at_least=1e-6)
    figure("p of uniform ranks of the log-likelihood, any seed", likelihoods, at_least=1e-6)


@pytest.mark.property("S08")
def test_where_weights_depend_on_each_other_intervals_are_too_narrow_by_what_theory_says(
    figure: Callable[..., None],
) -> None:
    """Mean field has the width of each weight given the others; nominal 90 % intervals then cover less."""
    problem, normal = Regression(), NormalDist()
    width = normal.inv_cdf(0.95)
    hits = torch.zeros(RANK, INPUTS, dtype=torch.float64)
    for truth in data_sets(problem, seed=0):
        drawn = problem.layer.drawn(torch.tensor([-width, width])[:, None, None].expand(-1, RANK, INPUTS))
        hits += (drawn[0] <= truth) & (truth <= drawn[1])
    true_std = torch.linalg.inv(problem.precision).diagonal().sqrt().view(RANK, INPUTS)
    expected = (width * problem.deviation / true_std).apply_(lambda z: 2 * normal.cdf(z) - 1)
    error = (expected * (1 - expected) / DATA_SETS).sqrt()
    departure = ((hits / DATA_SETS - expected).abs() / error).max()
    figure("coverage less 2 Phi(1.645 s_MF / s_true) - 1, standard errors", departure, at_most=z_bound(hits.numel()))
    figure("mean coverage of nominal 90 % intervals, dependent weights", hits.mean() / DATA_SETS, at_most=0.9)
    assert expected.max() < 0.9
