"""The ways of averaging over a Gaussian adapter: antithetic pairs, and logits linearised about the mean."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayestune.adapters import gaussian_layers, random_layers
from bayestune.errors import ConfigError, DrawError
from bayestune.functional import prediction_noise
from bayestune.inference import predict
from bayestune.methods import Variational, load, save_posterior
from bayestune.sampling.jacobian import traced
from bayestune.sampling.logit_space import difference_covariance, symmetric_root
from bayestune.sampling.posteriors import PREDICTIVES
from bayestune.sampling.stacked import StackedDraws
from inference.cases import CLASSES, Letters, rows
from methods.laplace_cases import jacobians
from models import GPT2, LLAMA, blob
from probes import double_llama, z_bound

TASK = Letters()


def batch(count: int) -> dict[str, Tensor]:
    return TASK.collate([TASK.example(row) for row in rows(count)])


def test_antithetic_draws_are_pairs_about_the_mean() -> None:
    """Draw 2j is draw j of the independent ones, and a pair's average is M, entry by entry."""
    model = double_llama()
    pairs = StackedDraws.of(model, draws=6, seed=3, antithetic=True).weights
    singles = StackedDraws.of(model, draws=3, seed=3).weights
    for layer, weights in pairs.items():
        assert torch.equal(weights[::2], singles[layer])
        torch.testing.assert_close(weights.unflatten(0, (3, 2)).mean(1), layer.weight.expand(3, -1, -1))
        assert not torch.equal(weights[0], weights[1])


def test_antithetic_answers_are_those_of_their_weights() -> None:
    model = double_llama()
    found = predict(Variational(model, predictive="antithetic"), TASK, rows(5), draws=4, seed=1)
    expected = predict(model, TASK, rows(5), draws=2, seed=1)
    torch.testing.assert_close(found.draw_log_probs[::2], expected.draw_log_probs, rtol=0, atol=1e-12)
    assert predict(Variational(model, predictive="antithetic"), TASK, rows(5), draws=0).draws == 0


def test_an_odd_number_of_antithetic_draws_is_refused() -> None:
    with pytest.raises(DrawError, match="draws: found 3; antithetic draws come in pairs"):
        predict(Variational(double_llama(), predictive="antithetic"), TASK, rows(2), draws=3)


def test_another_predictive_is_refused() -> None:
    with pytest.raises(ConfigError, match="predictive: found 'sobol', expected one of mc, antithetic, linearised"):
        Variational(double_llama(), predictive="sobol")


@pytest.mark.parametrize("distribution", ["gaussian_a", "gaussian_ab"])
def test_the_covariance_is_that_of_all_jacobians(distribution: str) -> None:
    model = blob(GPT2, distribution=distribution).double().eval()  # Llama's norms compute in float32
    layers, inputs = gaussian_layers(model), batch(5)
    expected = torch.zeros(5, CLASSES - 1, CLASSES - 1, dtype=torch.float64)
    for name, jacobian in jacobians(model, layers, TASK, inputs).items():
        scaled = (jacobian[:, 1:] - jacobian[:, :1]) * layers[name].rho.detach() ** 2
        scaled = scaled.flatten(2) * inputs["present"][:, 1:, None]
        expected += scaled @ scaled.transpose(1, 2)
    found = difference_covariance(traced(model, layers, TASK, inputs), layers)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    root = symmetric_root(found)
    torch.testing.assert_close(root @ root.transpose(1, 2), found, rtol=1e-9, atol=1e-9)


def test_small_widths_make_both_predictives_the_same() -> None:
    """To first order in the width a draw's logits are the linearised ones: their covariance over draws agrees."""
    model, draws = double_llama(), 4000
    with torch.no_grad():
        for layer in gaussian_layers(model).values():
            layer.rho.mul_(0.03)
    questions = rows(3)
    found, expected = (
        predict(Variational(model, predictive=way), TASK, questions, draws=draws, seed=2)
        for way in ("linearised", "mc")
    )
    bound = z_bound(6) * (2 / draws) ** 0.5
    for row, question in enumerate(questions):
        for choice in range(1, len(question.choices)):
            spreads = [
                (p.draw_log_probs[:, row, choice] - p.draw_log_probs[:, row, 0]).var().item()
                for p in (found, expected)
            ]
            assert abs(spreads[0] / spreads[1] - 1) <= 2**0.5 * bound


def test_the_linearised_answer_does_not_depend_on_the_batch_and_leaves_the_model_alone() -> None:
    model = double_llama().train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    posterior = Variational(model, predictive="linearised")
    whole = predict(posterior, TASK, rows(7), draws=50, seed=4)
    for size in (1, 3):
        found = predict(posterior, TASK, rows(7), draws=50, seed=4, batch_size=size).draw_log_probs
        assert (found.exp() - whole.draw_log_probs.exp()).abs().max() <= 1e-9
    assert torch.equal(predict(posterior, TASK, rows(7), draws=50, seed=4).draw_log_probs, whole.draw_log_probs)
    few = predict(posterior, TASK, rows(7), draws=21, seed=4).draw_log_probs
    torch.testing.assert_close(few, whole.draw_log_probs[:21], rtol=0, atol=1e-9)
    assert not torch.equal(predict(posterior, TASK, rows(7), draws=50, seed=5).draw_log_probs, whole.draw_log_probs)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", [2, 25])
def test_a_root_moves_no_more_than_rounding_moves_the_covariance(size: int) -> None:
    """Also where eigenvalues are equal, or nearly: the root of a row does not depend on who else is in its batch."""
    for covariance in (torch.eye(size), torch.ones(size, size) + torch.eye(size), _covariance(size)):
        nudged = covariance * (1 + 3e-7 * _covariance(size).sign())
        nudged = (nudged + nudged.T) / 2
        root, other = symmetric_root(torch.stack([covariance, nudged]))
        torch.testing.assert_close(root, root.T, rtol=0, atol=1e-5)
        # A root of a matrix of norm n moves by at most sqrt of the change where it is singular (Powers and Stormer).
        change = torch.linalg.matrix_norm(covariance - nudged, ord="nuc").item()
        rounding = 10 * torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(covariance, ord=2).item()
        assert torch.linalg.matrix_norm(root - other) <= (change + size * rounding) ** 0.5


def _covariance(size: int) -> Tensor:
    factor = torch.randn(size, size + 2, generator=torch.Generator().manual_seed(size))
    return factor @ factor.T / size


def test_the_linearised_draws_have_the_keyed_noise() -> None:
    """Logits of draw k: the mean's plus R z_k, for two choices R being the standard deviation of their difference."""
    model = double_llama()
    pair = [row for row in rows(6) if len(row.choices) == 2]
    found = predict(Variational(model, predictive="linearised"), TASK, pair, draws=5, seed=9).draw_log_probs
    mean = predict(model, TASK, pair, draws=0).draw_log_probs[0]
    inputs = TASK.collate([TASK.example(row) for row in pair])
    layers = gaussian_layers(model)
    variances = difference_covariance(traced(model, layers, TASK, inputs), layers)[:, 0, 0]
    moved = found[..., 1] - found[..., 0] - (mean[:, 1] - mean[:, 0])
    noise = torch.stack([prediction_noise(9, k, "logits", (CLASSES - 1,)) for k in range(5)]).double()
    torch.testing.assert_close(moved, noise[:, :1] * variances.sqrt(), rtol=1e-6, atol=1e-9)


def test_predictions_can_be_asked_for_in_inference_mode() -> None:
    for way in PREDICTIVES:
        posterior = Variational(double_llama(), predictive=way)
        expected = predict(posterior, TASK, rows(3), draws=4)
        with torch.inference_mode():
            found = predict(posterior, TASK, rows(3), draws=4)
        assert torch.equal(found.draw_log_probs, expected.draw_log_probs)


def test_masks_are_not_gaussian_and_are_refused() -> None:
    model = blob(LLAMA, distribution="dropout", lora_dropout=0.2)
    assert random_layers(model)
    with pytest.raises(DrawError, match="not Gaussian"):
        predict(Variational(model, predictive="linearised"), TASK, rows(2), draws=5)


def test_the_way_of_averaging_is_not_saved(tmp_path: Path) -> None:
    save_posterior(Variational(blob(LLAMA), predictive="antithetic"), tmp_path / "p")
    loaded = load(LLAMA.build(), tmp_path / "p")
    assert isinstance(loaded, Variational) and loaded.predictive == "mc"
