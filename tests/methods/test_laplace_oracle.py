"""The Laplace posterior against laplace-torch: Kronecker factors, linearised predictions, marginal likelihood.

On layers whose every position reaches the logits: laplace-torch counts the inputs of the others as data.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bayestune.inference import predict
from bayestune.methods import LaplacePosterior, fit_laplace
from bayestune.methods.laplace.prior_precision import log_evidence
from bayestune.tasks import Row
from inference.cases import Letters
from methods.laplace_cases import Labels, alike, bert_with_head, covered, plain

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    oracle = pytest.importorskip("laplace", reason="laplace-torch, the oracle, is not installed: see the Makefile")
    from laplace.curvature import CurvlinopsGGN

# What laplace-torch and curvlinops warn of, they warn of themselves.
pytestmark = pytest.mark.filterwarnings("ignore")


class Centred(nn.Module):
    """Logits less their mean over the classes, which is how `probit_logits` takes them."""

    def __init__(self, model: PeftModel, task: Letters) -> None:
        super().__init__()
        self.model, self.task = model, task

    def forward(self, ids: Tensor) -> Tensor:
        present = torch.ones(len(ids), 4, dtype=torch.bool)
        positions = torch.arange(ids.shape[1]).expand_as(ids)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
        logits = self.task.outputs(self.model, {**batch, "present": present})
        return logits - logits.mean(1, keepdim=True)


def llama_case() -> tuple[PeftModel, Letters, str]:
    targets = r".*layers\.0\.(self_attn\.[kvo]|mlp\..*)_proj|.*layers\.1\.self_attn\.[kv]_proj"
    return plain(r=3, target_modules=targets), Letters(), "all"


def head_case() -> tuple[PeftModel, Letters, str]:
    return bert_with_head(), Labels(), "last"


Fitted = tuple[Any, LaplacePosterior, Tensor, Letters, list[Row]]


@pytest.fixture(params=[llama_case, head_case], ids=["llama", "head"])
def fitted(request: pytest.FixtureRequest) -> Fitted:
    """laplace-torch's posterior and ours, of the same adapter on the same rows."""
    make: Callable[[], tuple[PeftModel, Letters, str]] = request.param
    model, task, layers = make()
    questions = alike(11, letters=5)
    ours = fit_laplace(model, task, questions, layers=layers, batch_size=3)
    model.requires_grad_(False)
    for linear in covered(model, layers).values():
        linear.weight.requires_grad_(True)
    ids = torch.tensor([task.example(row)["ids"] for row in questions])
    labels = torch.tensor([row.answer for row in questions])
    theirs = oracle.Laplace(
        Centred(model, task),
        "classification",
        subset_of_weights="all",
        hessian_structure="kron",
        backend=CurvlinopsGGN,
    )
    theirs.fit(DataLoader(TensorDataset(ids, labels), batch_size=4))
    theirs.prior_precision = torch.tensor(ours.precision, dtype=torch.float64)
    return theirs, ours, ids, task, questions


def test_the_kronecker_products_are_those_of_laplace_torch(fitted: Fitted) -> None:
    theirs, ours, *_ = fitted
    assert len(theirs.H_facs.kfacs) == len(ours.factors)
    for (outputs, inputs), (name, factor) in zip(theirs.H_facs.kfacs, ours.factors.items(), strict=True):
        vectors = torch.kron(factor.output_vectors, factor.input_vectors)
        found = vectors @ torch.diag(factor.curvature.flatten()) @ vectors.T
        expected = torch.kron(outputs, inputs)
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max(), name
        assert expected.abs().max() > 1e-9, name


def test_the_linearised_answer_is_that_of_laplace_torch(fitted: Fitted) -> None:
    theirs, ours, ids, task, questions = fitted
    ours.predictive, ours.precision = "probit", 0.01
    theirs.prior_precision = torch.tensor(0.01, dtype=torch.float64)
    answer = predict(ours, task, questions, draws=1, batch_size=4)
    expected = theirs(ids, pred_type="glm", link_approx="probit")
    assert (answer.probs - expected).abs().max() <= 1e-5
    at_mode = predict(ours, task, questions, draws=0).probs
    assert (at_mode - expected).abs().max() > 1e-3


def test_the_draws_have_the_covariance_of_laplace_torch(fitted: Fitted) -> None:
    """Not by sampling: unit noise in one weight at a time gives the columns of J times the root of the covariance."""
    theirs, ours, ids, task, questions = fitted
    batch = task.collate([task.example(row) for row in questions])
    units = sum(factor.curvature.numel() for factor in ours.factors.values())
    sampler: Any = ours.sampler(draws=1, seed=0)
    eye, start, sampler.slices = torch.eye(units, dtype=torch.float64), 0, units
    for name, factor in ours.factors.items():
        size = factor.curvature.numel()
        noise = eye[:, start : start + size].unflatten(1, tuple(factor.curvature.shape))
        sampler.steps[name], start = factor.covariance_root(noise, ours.precision), start + size
    logits = sampler.outputs(task, batch, range(units)).detach()
    with torch.no_grad():
        columns = logits - task.outputs(ours.model, batch)
    columns = columns - columns.mean(2, keepdim=True)
    found = torch.einsum("krc,krd->rcd", columns, columns)
    _, expected = theirs._glm_predictive_distribution(ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_marginal_likelihood_is_that_of_laplace_torch(fitted: Fitted) -> None:
    theirs, ours, *_ = fitted
    curvatures = [factor.curvature for factor in ours.factors.values()]
    norm = sum(linear.weight.square().sum().item() for linear in covered(ours.model, ours.layers).values())
    found = {}
    for scale in (0.01, 0.9, 1.0, 1.1, 100.0):
        tau = scale * ours.precision
        expected = theirs.log_marginal_likelihood(torch.tensor(tau, dtype=torch.float64)).item()
        found[scale] = expected
        evidence = theirs.log_likelihood.item() + log_evidence(curvatures, norm, tau)
        assert evidence == pytest.approx(expected, rel=1e-5)
    assert max(found, key=lambda scale: found[scale]) == 1.0
