"""Jacobians, K-FAC factors and the marginal likelihood against dense matrices and loops written out."""

import itertools
import math
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from bayestune.errors import ConfigError
from bayestune.methods.laplace.kfac import FactorSums, KroneckerFactor, add_batch
from bayestune.methods.laplace.prior_precision import CANDIDATES, best_candidate, log_evidence, most_evident
from bayestune.sampling.jacobian import traced
from bayestune.tasks.classes import loss_roots
from inference.cases import Letters, Sequences, rows
from methods.laplace_cases import Labels, alike, bert_with_head, covered, curvature_of, jacobians, one_batch, plain
from models import GPT2

# A Llama in float64 still normalises, and rounds gradients, in float32.
CASES: dict[str, Any] = {
    "llama": (lambda: plain(r=2), Letters, "all", 1e-6),
    "llama_last": (lambda: plain(r=2), Letters, "last", 1e-6),
    "gpt2": (lambda: plain(GPT2, r=2), Letters, "all", 1e-12),
    "choices": (lambda: plain(r=2), Sequences, "all", 1e-6),
    "bert": (bert_with_head, Labels, "all", 1e-12),
    "bert_head": (bert_with_head, Labels, "last", 1e-12),
}


def assert_relative(found: Tensor, expected: Tensor, bound: float) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= bound * expected.abs().max()


def factors(case: str, batch_size: int, count: int = 7) -> dict[str, tuple[Tensor, Tensor, int]]:
    """G, the sum of a a^T and the number of positions of each layer, from batches with padding."""
    make, task, layers, _ = CASES[case]
    model, task = make(), task()
    linears = covered(model, layers)
    sums = {name: FactorSums(linear) for name, linear in linears.items()}
    for start in range(0, count, batch_size):
        batch = one_batch(task, rows(count)[start : start + batch_size])
        add_batch(sums, traced(model, linears, task, batch), task)
    return {name: (layer.outputs, layer.inputs, layer.positions) for name, layer in sums.items()}


@pytest.mark.parametrize("case", ["llama", "choices", "bert_head"])
def test_row_jacobians_are_those_of_jacrev(case: str) -> None:
    make, task, layers, bound = CASES[case]
    model, task = make(), task()
    linears, batch = covered(model, layers), one_batch(task, rows(5))
    expected = jacobians(model, linears, task, batch)
    forward = traced(model, linears, task, batch)
    found = [dict(row) for row in forward.row_jacobians(forward.classes, dict.fromkeys(linears, torch.float64))]
    assert len(found) == task.columns
    for (name, jacobian), c in itertools.product(expected.items(), range(task.columns)):
        assert_relative(found[c][name], jacobian[:, c], bound)
        assert jacobian[:, c].abs().max() > 1e-4 or not forward.present[:, c].any()


def test_a_layer_that_is_called_twice_has_one_weight() -> None:
    class Twice(Letters):
        def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            other = {**batch, "input_ids": batch["input_ids"] // 2}
            return super().outputs(model, batch) + super().outputs(model, other)

    model, task = plain(GPT2, r=2), Twice()
    linears, batch = covered(model), one_batch(task, alike(3, letters=4))
    forward = traced(model, linears, task, batch)
    assert len(forward.calls) == 2 * len(linears)
    expected = jacobians(model, linears, task, batch)
    found = [dict(row) for row in forward.row_jacobians(forward.classes, dict.fromkeys(linears, torch.float64))]
    for name, jacobian in expected.items():
        assert_relative(torch.stack([row[name] for row in found], 1), jacobian, 1e-12)


@pytest.mark.parametrize("case", ["llama_last", "gpt2", "bert"])
def test_one_row_with_one_position_has_its_exact_curvature(case: str) -> None:
    """Where nothing is shared and nothing summed, the Kronecker product is J^T (diag p - p p^T) J itself."""
    make, task, layers, bound = CASES[case]
    model, task = make(), Letters() if task is Sequences else task()
    linears, batch = covered(model, layers), one_batch(task, alike(1, letters=1))
    sums = {name: FactorSums(linear) for name, linear in linears.items()}
    forward = traced(model, linears, task, batch)
    add_batch(sums, forward, task)
    for name, jacobian in jacobians(model, linears, task, batch).items():
        expected = curvature_of(jacobian, forward.logits.detach().softmax(-1))
        factor = sums[name].decomposed()
        vectors = torch.kron(factor.output_vectors, factor.input_vectors)
        if expected.abs().max() < 1e-20:  # one token attends to itself whatever its query
            assert factor.curvature.abs().max() < 1e-20
            continue
        assert_relative(vectors @ torch.diag(factor.curvature.flatten()) @ vectors.T, expected, bound)
        covariance = torch.linalg.inv(expected + 0.3 * torch.eye(len(expected), dtype=torch.float64))
        units = torch.eye(len(expected), dtype=torch.float64).unflatten(1, jacobian.shape[2:])
        root = factor.covariance_root(units, 0.3).flatten(1)
        assert_relative(root @ root.T, covariance, bound)
        assert_relative(root, root.T, 1e-12)


@pytest.mark.parametrize("case", ["gpt2", "choices", "bert_head"])
def test_factors_are_sums_over_rows_and_tokens(case: str) -> None:
    """Every row alone, class by class, with the matrix Lambda written out; tokens that reach no logit left out."""
    make, task, layers, bound = CASES[case]
    model, task = make(), task()
    linears = covered(model, layers)
    expected = {name: [torch.zeros(()), torch.zeros(()), 0] for name in linears}
    for row in rows(7):
        forward = traced(model, linears, task, one_batch(task, [row]))
        p = forward.logits.detach()[0].softmax(-1)
        middle = torch.diag(p) - torch.outer(p, p)
        for call in forward.calls:
            gradients = [
                torch.autograd.grad(forward.logits[0, c], call.outputs, retain_graph=True, allow_unused=True)[0]
                for c in range(task.columns)
                if forward.present[0, c]
            ]
            if gradients[0] is None:
                continue
            of_classes = torch.stack(gradients).flatten(1, -2)
            kept = middle[forward.present[0]][:, forward.present[0]]
            used = of_classes.abs().amax((0, 2)) > 1e-10 * of_classes.abs().max()
            inputs = call.inputs.flatten(0, -2)[used]
            total = expected[call.layer]
            total[0] = total[0] + torch.einsum("cti,cd,dtj->ij", of_classes, kept, of_classes)
            total[1] = total[1] + inputs.T @ inputs
            total[2] += len(inputs)
    for batch_size in (1, 3, 16):
        for name, (outputs, inputs, positions) in factors(case, batch_size).items():
            assert positions == expected[name][2] > 0
            assert_relative(outputs, expected[name][0], bound)
            assert_relative(inputs, expected[name][1], bound)


def test_inputs_are_averaged_and_gradients_are_added_up() -> None:
    """Twice the same data: twice the curvature, not once and not four times."""
    once, twice = FactorSums(torch.nn.Linear(3, 2)), FactorSums(torch.nn.Linear(3, 2))
    generator = torch.Generator().manual_seed(0)
    inputs, gradients = torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)
    for sums, times in ((once, 1), (twice, 2)):
        for _ in range(times):
            sums.add_inputs(inputs)
            sums.add_gradient(gradients)
    assert_relative(twice.decomposed().curvature, 2 * once.decomposed().curvature, 1e-5)


def test_a_layer_that_reaches_no_logit_has_no_curvature() -> None:
    factor = FactorSums(torch.nn.Linear(3, 2)).decomposed()
    assert torch.equal(factor.curvature, torch.zeros(2, 3))


def dense_evidence(curvature: Tensor, weights: Tensor, precision: float) -> float:
    """log N(theta | 0, 1 / tau) + P/2 log(2 pi) - 1/2 log det(H + tau I)."""
    prior = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), precision**-0.5)
    determinant = torch.linalg.slogdet(curvature + precision * torch.eye(len(curvature), dtype=torch.float64))
    log_prior = prior.log_prob(weights).sum() + len(weights) / 2 * math.log(2 * math.pi)
    return (log_prior - determinant.logabsdet / 2).item()


@pytest.fixture
def two_layers() -> tuple[list[KroneckerFactor], Tensor, Tensor]:
    """The factors of two layers, their dense curvature and weights."""
    generator, factors, blocks = torch.Generator().manual_seed(1), [], []
    for m, n in ((2, 3), (4, 2)):
        sums = FactorSums(torch.nn.Linear(n, m, dtype=torch.float64))
        sums.add_gradient(torch.randn(5, m, generator=generator, dtype=torch.float64))
        sums.add_inputs(torch.randn(1, n, generator=generator, dtype=torch.float64))
        blocks.append(torch.kron(sums.outputs, sums.inputs))
        factors.append(sums.decomposed())
    weights = torch.randn(14, generator=generator, dtype=torch.float64)
    return factors, torch.block_diag(*blocks), weights


@pytest.mark.parametrize("precision", [1e-3, 1e4])
def test_log_evidence_is_that_of_dense_matrices(two_layers: Any, precision: float) -> None:
    factors, dense, weights = two_layers
    found = log_evidence([f.curvature for f in factors], weights.square().sum().item(), precision)
    assert found == pytest.approx(dense_evidence(dense, weights, precision), rel=1e-10)


def test_the_most_evident_precision_is_the_maximum(two_layers: Any) -> None:
    factors, dense, weights = two_layers
    best = most_evident([f.curvature for f in factors], weights.square().sum().item())
    grid = [best * 10 ** (step / 10) for step in range(-60, 61)]
    assert max(grid, key=lambda tau: dense_evidence(dense, weights, tau)) == best


def test_the_most_evident_precision_of_equal_curvatures_in_closed_form() -> None:
    """tau s = P lambda / (lambda + tau), a quadratic in tau."""
    curvature, count, norm = 2.5, 12, 3.0
    expected = (-curvature + math.sqrt(curvature**2 + 4 * count * curvature / norm)) / 2
    assert most_evident([torch.full((3, 4), curvature)], norm) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize(("curvature", "norm"), [(0.0, 1.0), (1.0, 0.0)])
def test_nothing_to_choose_a_precision_by_is_refused(curvature: float, norm: float) -> None:
    with pytest.raises(ConfigError, match="no curvature or no weights"):
        most_evident([torch.full((2, 2), curvature)], norm)


def test_the_best_candidate_has_the_smallest_nll() -> None:
    logits = torch.zeros(len(CANDIDATES), 2, 2, dtype=torch.float64)
    logits[[7, 9], :, 1] = 5.0  # two alike: the larger precision
    assert best_candidate(logits.log_softmax(-1), torch.tensor([1, 1])) == CANDIDATES[9]
    with pytest.raises(ConfigError, match="probability 0"):
        best_candidate(torch.full_like(logits, -torch.inf), torch.tensor([1, 1]))


def test_calls_of_other_threads_are_not_recorded() -> None:
    model = plain(r=2)
    linears = covered(model)

    class Busy(Letters):
        def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            answer = super().outputs(model, batch)
            other = threading.Thread(target=super().outputs, args=(model, one_batch(Letters(), rows(2))))
            other.start()
            other.join()
            return answer

    forward = traced(model, linears, Busy(), one_batch(Letters(), rows(3)))
    assert [call.layer for call in forward.calls] == [
        call.layer for call in traced(model, linears, Letters(), one_batch(Letters(), rows(3))).calls
    ]
    assert {len(call.inputs) for call in forward.calls} == {3}


def test_logits_that_do_not_depend_on_the_layers_are_refused() -> None:
    model = plain(r=2)

    class Constant(Letters):
        def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            return torch.zeros(len(batch["input_ids"]), 4)

    with pytest.raises(ConfigError, match="do not depend"):
        traced(model, covered(model), Constant(), one_batch(Letters(), rows(2)))


def test_inputs_whose_rows_cannot_be_told_apart_are_refused() -> None:
    model = plain(r=2)

    class TokensPacked(Letters):
        def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            ids = torch.cat([batch["input_ids"], batch["input_ids"][:1]])
            return model(input_ids=ids).logits[:-1, -1, :4]

    with pytest.raises(ConfigError, match="rows first"):
        traced(model, covered(model), TokensPacked(), one_batch(Letters(), rows(3)))


@pytest.mark.parametrize("classes", [1, 5])
def test_the_roots_of_the_loss_give_its_curvature(classes: int) -> None:
    """One root less than classes, and their outer products add up to diag(p) - p p^T."""
    logits = 3 * torch.randn(20, classes, generator=torch.Generator().manual_seed(classes), dtype=torch.float64)
    if classes > 2:
        logits[0, -1] = logits[1, 0] = logits[2, 1] = -math.inf  # choices that a row does not have
        logits[3] = torch.tensor([800.0, 0, 0, 0, 0])  # sure beyond the range of exp
        logits[4, 2:] = -math.inf
    found = list(loss_roots(logits))
    assert len(found) == classes - 1
    probs = logits.softmax(-1)
    expected = torch.diag_embed(probs) - probs[:, :, None] * probs[:, None]
    total = sum((root[:, :, None] * root[:, None] for root in found), torch.zeros_like(expected))
    torch.testing.assert_close(total, expected, rtol=0, atol=4 * torch.finfo(torch.float64).eps)
    assert all((root[logits == -math.inf] == 0).all() for root in found)
