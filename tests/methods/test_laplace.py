"""A Laplace posterior from fit to answer: its draws, its closed-form answer, its precision, and its settings."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from bayestune.errors import DrawError
from bayestune.functional import prediction_noise
from bayestune.inference import predict
from bayestune.methods import LaplacePosterior, Point, fit_laplace
from bayestune.methods.laplace.prior_precision import CANDIDATES
from bayestune.tasks import Row
from inference.cases import Letters, Sequences, rows
from methods.laplace_cases import Labels, alike, bert_with_head, covered, jacobians, one_batch, plain
from models import scatter
from probes import z_bound


def fitted(task: Letters | None = None, *, dtype: torch.dtype = torch.float64, **settings: Any) -> LaplacePosterior:
    return fit_laplace(plain(r=2, dtype=dtype), task or Letters(), rows(7), **settings)


def dense(
    posterior: LaplacePosterior, task: Letters, questions: list[Row]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Logits at the mode, Jacobians by layer, and the logits' covariance ``J Sigma J^T``, [rows, classes, classes]."""
    batch = one_batch(task, questions)
    with torch.no_grad():
        mode = task.outputs(posterior.model, batch)
    found = jacobians(posterior.model, covered(posterior.model, posterior.layers), task, batch)
    covariance = torch.zeros(len(questions), task.columns, task.columns, dtype=torch.float64)
    for name, factor in posterior.factors.items():
        outputs = factor.output_vectors @ torch.diag(factor.output_values) @ factor.output_vectors.T
        inputs = factor.input_vectors @ torch.diag(factor.input_values) @ factor.input_vectors.T
        precision = torch.kron(outputs, inputs)
        precision = precision + posterior.precision * torch.eye(len(precision), dtype=torch.float64)
        flat = found[name].flatten(2)
        covariance += flat @ torch.linalg.inv(precision) @ flat.transpose(1, 2)
    return mode, found, covariance


def probs_of(logits: Tensor) -> Tensor:
    return logits.double().softmax(-1)


def test_a_draw_is_one_linear_function_of_any_batch() -> None:
    """theta_k - theta* is the root of the covariance times keyed noise, whatever the batch and the other draws."""
    task, questions = Letters(), rows(7)
    posterior = fitted()
    mode, found, _ = dense(posterior, task, questions)
    expected = mode.repeat(4, 1, 1)
    for name, factor in posterior.factors.items():
        noise = torch.stack([prediction_noise(5, k, name, tuple(factor.curvature.shape)) for k in range(4)]).double()
        step = factor.covariance_root(noise, posterior.precision)
        expected += torch.einsum("rcij,kij->krc", found[name], step)
    for batch_size, draws in ((1, 4), (3, 4), (16, 4), (3, 2)):
        answer = predict(posterior, task, questions, draws=draws, seed=5, batch_size=batch_size)
        assert (answer.draw_log_probs.exp() - probs_of(expected[:draws])).abs().max() <= 1e-6  # float32 in RMSNorm
    other = predict(posterior, task, questions, draws=4, seed=6)
    assert (other.draw_log_probs.exp() - probs_of(expected)).abs().max() > 1e-2


def test_logits_of_draws_have_the_covariance_J_Sigma_JT() -> None:
    task, questions, draws = Letters(), alike(1, letters=6), 3000
    posterior = fitted(layers="last", precision=2.0)
    mode, _, covariance = dense(posterior, task, questions)
    sampler = posterior.sampler(draws=draws, seed=0)
    logits = sampler.outputs(task, one_batch(task, questions), range(draws))[:, 0].detach()
    assert covariance.diagonal(dim1=1, dim2=2).min() > 1e-4
    variance = covariance[0].diag()
    z = (logits.mean(0) - mode[0]) / (variance / draws).sqrt()
    assert z.abs().max() <= z_bound(4)
    spread = ((torch.outer(variance, variance) + covariance[0].square()) / draws).sqrt()
    centred = logits - mode[0]
    z = (centred.T @ centred / draws - covariance[0]) / spread
    assert z.abs().max() <= z_bound(10)


@pytest.mark.parametrize("task", [Letters(), Sequences()], ids=lambda task: task.name)
def test_the_probit_answer_scales_centred_logits_by_their_variance(task: Letters) -> None:
    questions = rows(7)
    posterior = fitted(task, predictive="probit")
    mode, _, covariance = dense(posterior, task, questions)
    found = predict(posterior, task, questions, draws=10, batch_size=3)
    assert len(found.draw_log_probs) == 1
    for row in range(7):
        present = mode[row].isfinite()
        count = int(present.sum())
        centre = torch.eye(count, dtype=torch.float64) - 1 / count
        variance = (centre @ covariance[row][present][:, present] @ centre.T).diag()
        scaled = (centre @ mode[row][present]) / (1 + math.pi / 8 * variance).sqrt()
        assert (found.probs[row][present] - scaled.softmax(-1)).abs().max() <= 1e-6
        assert torch.equal(found.probs[row][~present], torch.zeros(4 - count, dtype=torch.float64))
        assert variance.min() > 1e-3


@pytest.mark.parametrize("predictive", ["mc", "probit"])
def test_a_constant_a_row_changes_no_answer(predictive: str) -> None:
    """Logits are known up to a constant a row, which may depend on the row and on the weights."""

    class Shifted(Letters):
        def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            inputs = {name: tensor for name, tensor in batch.items() if name != "present"}
            whole = model(**inputs).logits[:, -1]
            logits = whole[:, 4:8] + 40 + 10 * whole[:, 40:41]
            return logits.masked_fill(~batch["present"], -torch.inf)

    plain_task, shifted = (
        predict(fitted(task, predictive=predictive, precision=1.0), task, rows(5), draws=3).probs
        for task in (Letters(), Shifted())
    )
    assert (plain_task - shifted).abs().max() <= 1e-6


def test_absent_choices_stay_absent() -> None:
    task, questions = Letters(), rows(7)
    found = predict(fitted(task), task, questions, draws=5).draw_log_probs
    present = torch.tensor([[c < len(row.choices) for c in range(4)] for row in questions])
    assert torch.equal(found.isneginf(), ~present.expand_as(found))
    assert found[:, present].isfinite().all()


@pytest.mark.parametrize("predictive", ["mc", "probit"])
def test_without_variance_the_answer_is_the_mode(predictive: str) -> None:
    posterior = fitted(predictive=predictive, precision=1e24)
    mode = predict(posterior, Letters(), rows(7), draws=0).probs
    answer = predict(posterior, Letters(), rows(7), draws=3)
    assert (answer.draw_log_probs.exp() - mode).abs().max() <= 1e-9
    loose = predict(fitted(predictive=predictive, precision=1e-2), Letters(), rows(7), draws=3)
    assert (loose.draw_log_probs.exp() - mode).abs().max() > 1e-2


def test_part_of_the_draws_are_those_draws() -> None:
    task = Letters()
    sampler, batch = fitted(task).sampler(draws=5, seed=1), one_batch(task, rows(3))
    assert sampler.at_once(batch) == 5
    whole = sampler.outputs(task, batch, range(5)).softmax(-1)
    assert (sampler.outputs(task, batch, range(2, 4)).softmax(-1) - whole[2:4]).abs().max() <= 1e-6


def test_no_draws_are_the_answer_of_the_adapter_itself() -> None:
    posterior = fitted()
    expected = predict(Point(posterior.model), Letters(), rows(7), draws=0).draw_log_probs
    assert torch.equal(predict(posterior, Letters(), rows(7), draws=0).draw_log_probs, expected)
    assert (posterior.kind, posterior.default_draws) == ("laplace", 10)


def test_the_fit_does_not_depend_on_the_batches_or_on_labels() -> None:
    task = Letters()
    unlabelled = [Row(id=row.id, question=row.question, choices=row.choices, answer=None) for row in rows(7)]
    one = fitted(task, batch_size=1)
    for other in (fitted(task, batch_size=16), fit_laplace(plain(r=2), task, unlabelled, batch_size=3)):
        assert other.precision == pytest.approx(one.precision, rel=1e-6)
        for name, factor in one.factors.items():
            found, expected = other.factors[name].curvature, factor.curvature
            assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_more_rows_are_more_curvature() -> None:
    """H is a sum over rows: the same rows twice give twice its trace, and no part of N is lost."""
    once, twice = (fit_laplace(plain(r=2), Letters(), questions) for questions in (rows(7), rows(7) * 2))
    for name, factor in once.factors.items():
        assert twice.factors[name].curvature.sum().item() == pytest.approx(2 * factor.curvature.sum().item(), rel=1e-6)
    assert (once.rows, twice.rows) == (7, 14)


def test_the_most_evident_precision_is_that_of_the_fitted_weights() -> None:
    """tau ||theta*||^2 is the number of directions that the data determine, sum of lambda / (lambda + tau)."""
    posterior = fitted()
    weights = torch.cat([linear.weight.detach().flatten() for linear in covered(posterior.model).values()])
    curvature = torch.cat([factor.curvature.flatten() for factor in posterior.factors.values()])
    assert len(weights) == len(curvature)
    determined = (curvature / (curvature + posterior.precision)).sum().item()
    assert posterior.precision * weights.square().sum().item() == pytest.approx(determined, rel=1e-9)


def test_validation_takes_the_candidate_with_the_smallest_nll() -> None:
    task, held_out = Letters(), rows(12)[7:]
    found = fitted(task, precision="validation", validation_rows=held_out, batch_size=2)
    labels = torch.tensor([row.answer for row in held_out])
    nll, posterior = [], fitted(task, precision=1.0, predictive="probit")
    for candidate in CANDIDATES:
        posterior.precision = candidate
        log_probs = predict(posterior, task, held_out, draws=1).log_probs
        nll.append(-log_probs[torch.arange(len(labels)), labels].mean().item())
    assert nll[CANDIDATES.index(found.precision)] <= min(nll) + 1e-9
    assert min(nll) < max(nll) - 1e-2


def test_the_last_layer_is_the_trained_head_or_the_last_adapted_one() -> None:
    last = "model.layers.1.self_attn.v_proj"
    assert list(covered(plain(), "last")) == [f"{last}.lora_A", f"{last}.lora_B"]
    assert list(covered(bert_with_head(), "last")) == ["classifier"]


def test_all_layers_are_every_A_and_B() -> None:
    paths = [f"model.layers.{i}.self_attn.{part}" for i in (0, 1) for part in ("q_proj", "v_proj")]
    assert list(covered(plain())) == [f"{path}.lora_{ab}" for path in paths for ab in "AB"]
    assert len(covered(bert_with_head())) == 8


def test_a_head_can_be_fitted() -> None:
    posterior = fit_laplace(bert_with_head(), Labels(), alike(6, letters=5), layers="last")
    answer = predict(posterior, Labels(), alike(6, letters=5))
    assert (answer.draw_log_probs[0] - answer.draw_log_probs[1]).abs().max() > 1e-3


def test_fitting_and_predicting_leave_the_model_and_the_random_state_as_they_were() -> None:
    model = plain(r=2).requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    predict(fit_laplace(model, Letters(), rows(4)), Letters(), rows(4), draws=2)
    assert torch.equal(torch.get_rng_state(), state)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name][0]) and parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not any(module._forward_hooks for module in model.modules())


def test_a_frozen_adapter_gives_the_same_posterior() -> None:
    model = plain(r=2)
    expected = fit_laplace(model, Letters(), rows(4))
    found = fit_laplace(model.requires_grad_(False), Letters(), rows(4))
    for name, factor in expected.factors.items():
        assert (found.factors[name].curvature - factor.curvature).abs().max() <= 1e-6 * factor.curvature.max()


def test_autocast_rounds_the_forward_and_nothing_else() -> None:
    class Exact(Letters):
        def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().outputs(model, batch)

    task, questions = Exact(), rows(7)
    outside = fitted(task, dtype=torch.float32)
    expected = predict(outside, task, questions, draws=4).draw_log_probs
    with torch.autocast("cpu", torch.bfloat16):
        inside = fitted(task, dtype=torch.float32)
        found = predict(inside, task, questions, draws=4).draw_log_probs
    assert inside.precision == outside.precision
    assert torch.equal(found, expected)


def test_under_autocast_answers_are_those_of_float32_to_some_roundings() -> None:
    task, questions = Letters(), rows(7)
    exact = fitted(task, dtype=torch.float32, predictive="probit", precision=1.0)
    expected = predict(exact, task, questions, draws=4).draw_log_probs.exp()
    with torch.autocast("cpu", torch.bfloat16):
        half = fitted(task, dtype=torch.float32, predictive="probit", precision=1.0)
        found = predict(half, task, questions, draws=4).draw_log_probs.exp()
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.float32}
    assert 0 < (found - expected).abs().max() <= 8 * torch.finfo(torch.bfloat16).eps


def test_half_precision_adapters_have_factors_in_float32() -> None:
    posterior = fitted(dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in posterior.tensors().values()} == {torch.float32}
    assert predict(posterior, Letters(), rows(3), draws=2).probs.isfinite().all()


def test_draws_of_another_adapter_are_refused() -> None:
    posterior = fitted()
    model = posterior.model
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    scatter(model, adapter="other")
    with pytest.raises(DrawError, match="the active adapter is not the one"):
        predict(posterior, Letters(), rows(2), draws=2)
    model.set_adapter("default")
    assert predict(posterior, Letters(), rows(2), draws=2).probs.isfinite().all()
