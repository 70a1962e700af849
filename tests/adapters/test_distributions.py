"""What else than A can be random: both matrices (Bayes by backprop), or which inputs A keeps (MC dropout)."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from torch import Tensor

from bayestune.adapters import BayesLoraConfig, DropoutLinear, GaussianLinear, gaussian_layers, random_layers
from bayestune.errors import ConfigError
from bayestune.functional import prediction_noise
from bayestune.inference.draws import draw
from bayestune.sampling.stacked import stacked_weights
from models import GPT2, LLAMA, blob, llama
from probes import bayesian_sum, output_of, z_bound

P = 0.3
COUNT = 4000


def dropout_sum() -> Any:
    return bayesian_sum(distribution="dropout", lora_dropout=P)


def test_a_draw_of_dropout_keeps_or_drops_whole_inputs() -> None:
    model = dropout_sum().eval()
    layer = random_layers(model)["left"]
    assert isinstance(layer, DropoutLinear)
    for index in range(20):
        weight = stacked_weights(model, [index], 3)[layer][0]
        kept = (weight != 0).all(0)
        assert torch.equal(kept, (weight != 0).any(0))
        torch.testing.assert_close(weight[:, kept], layer.weight[:, kept] / (1 - P), rtol=1e-14, atol=0)
        noise = prediction_noise(3, index, "left", (2, 4))[0].double()
        uniform = 0.5 * (1 + torch.erf(noise / math.sqrt(2)))
        assert torch.equal(kept, uniform < 1 - P)


@pytest.mark.property("S10")
def test_masks_have_their_probability_and_are_independent() -> None:
    model = dropout_sum().eval()
    weights = stacked_weights(model, range(COUNT), 0)
    layers = random_layers(model)
    kept = torch.cat([(weights[layers[name]][:, 0] != 0).double() for name in ("left", "right")], dim=1)
    z = z_bound(8 + 28 + 8)
    unit = (kept - (1 - P)) / math.sqrt(P * (1 - P))
    assert unit.mean(0).abs().max() <= z / math.sqrt(COUNT)
    products = unit.T @ unit / COUNT
    assert (products - products.diagonal().diag()).abs().max() <= z / math.sqrt(COUNT)
    assert (unit[1:] * unit[:-1]).mean(0).abs().max() <= z / math.sqrt(COUNT - 1)


@pytest.mark.property("S13")
def test_training_with_dropout_masks_the_inputs_of_a_once_a_row() -> None:
    model = dropout_sum()
    layer = random_layers(model)["right"]
    x = torch.ones(5, 6, 4, dtype=torch.float64)
    with output_of(layer) as outputs:
        model(x)
    assert layer.noise is not None
    mask = (layer.noise.epsilon[:, :1] < torch.special.ndtri(torch.tensor(1 - P))).double()
    torch.testing.assert_close(outputs[0], F.linear(x * mask / (1 - P), layer.weight), rtol=1e-14, atol=1e-14)
    assert len({tuple(row.flatten().tolist()) for row in mask}) > 1


def test_dropout_neither_reads_nor_moves_the_global_state() -> None:
    model = dropout_sum()
    x = torch.ones(2, 6, 4, dtype=torch.float64)
    state = torch.get_rng_state()
    first = model(x)
    assert torch.equal(torch.get_rng_state(), state)
    for hook in model.base_model.model._forward_pre_hooks.values():
        hook.micro = 0
    torch.manual_seed(7)
    assert torch.equal(model(x), first)


def test_the_mean_of_dropout_is_plain_lora_without_masks() -> None:
    model = blob(GPT2, distribution="dropout", lora_dropout=P).eval()
    plain = get_peft_model(GPT2.build(), GPT2.config())
    plain.load_state_dict(model.state_dict(), strict=False)
    for layer in gaussian_layers(plain).values():
        assert not layer.training or layer.eval()
    inputs = GPT2.inputs()
    assert torch.equal(model(**inputs).logits, plain.eval()(**inputs).logits)


@pytest.mark.property("S10")
def test_both_matrices_of_bbb_are_random_and_independent() -> None:
    """Var[sum_k B_ik A_kj] = sum_k (mu_b^2 s_a^2 + s_b^2 mu_a^2 + s_b^2 s_a^2), mean sum_k mu_b mu_a."""
    model = bayesian_sum(distribution="gaussian_ab").eval()
    layers = gaussian_layers(model)
    assert sorted(layers) == ["left", "left.lora_B", "right", "right.lora_B"]
    a, b = layers["left"], layers["left.lora_B"]
    weights = stacked_weights(model, range(COUNT), 1)
    products = weights[b] @ weights[a]
    va, vb = a.rho.detach() ** 4, b.rho.detach() ** 4
    mean = b.weight.detach() @ a.weight.detach()
    variance = b.weight.detach() ** 2 @ va + vb @ a.weight.detach() ** 2 + vb @ va
    spread = products.std(0) / math.sqrt(COUNT)
    z = z_bound(2 * mean.numel())
    assert ((products.mean(0) - mean).abs() <= z * spread).all()
    squares = (products - mean) ** 2
    assert ((squares.mean(0) - variance).abs() <= z * squares.std(0) / math.sqrt(COUNT)).all()


def test_a_draw_of_bbb_uses_both_matrices() -> None:
    model = bayesian_sum(distribution="gaussian_ab").eval()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = stacked_weights(model, [5], 2)
    expected = model.get_base_model()(x) * 0
    with torch.no_grad():
        for name in ("left", "right"):
            layer = model.get_submodule(f"base_model.model.{name}")
            a, b = (weights[layer.get_submodule(f"{part}.default")][0] for part in ("lora_A", "lora_B"))
            expected = expected + layer.base_layer(x) + 1.5 * x @ a.T @ b.T
        with draw(model, index=5, seed=2):
            torch.testing.assert_close(model(x), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.property("S01")
def test_the_kl_of_bbb_counts_both_matrices() -> None:
    model = bayesian_sum(distribution="gaussian_ab", prior_std=0.3)
    layers = gaussian_layers(model).values()
    found = sum(layer.kl().item() for layer in layers)
    normal = torch.distributions.Normal
    prior = normal(torch.zeros((), dtype=torch.float64), 0.3)
    expected = sum(
        torch.distributions.kl_divergence(normal(m.weight, m.rho**2), prior).sum().item()
        for m in model.modules()
        if isinstance(m, GaussianLinear)
    )
    assert found == pytest.approx(expected, rel=1e-12)
    assert len(layers) == 4


@pytest.mark.property("S14")
@pytest.mark.parametrize("settings", [{"distribution": "gaussian_ab"}, {"distribution": "dropout", "lora_dropout": P}])
def test_a_fresh_adapter_answers_as_the_base(settings: dict[str, Any]) -> None:
    """With B at its start, 0, only the noise of B itself can change an answer."""
    model = get_peft_model(llama(), LLAMA.config(**settings)).eval()
    inputs = LLAMA.inputs()
    base = llama().eval()(**inputs).logits
    assert torch.equal(model(**inputs).logits, base)
    with draw(model, index=1):
        same = torch.equal(model(**inputs).logits, base)
    assert same is (settings["distribution"] == "dropout")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"distribution": "dropout"}, "lora_dropout: found 0.0"),
        ({"distribution": "dropout", "lora_dropout": 1.0}, "lora_dropout: found 1.0"),
        ({"distribution": "dropout", "lora_dropout": P, "estimator": "flipout"}, "estimator: found 'flipout'"),
        ({"distribution": "gaussian_ab", "lora_bias": True}, "lora_bias: found True"),
    ],
)
def test_what_cannot_be_random_is_refused_by_name(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        BayesLoraConfig(**settings)


def test_training_noise_of_bbb_differs_between_the_two_matrices_and_the_rows() -> None:
    model = bayesian_sum(distribution="gaussian_ab")
    model(torch.ones(3, 4, dtype=torch.float64))
    noises: list[Tensor] = []
    for layer in random_layers(model).values():
        assert layer.noise is not None
        noises.extend(layer.noise.epsilon.flatten(1))
    values = torch.cat([noise[:4] for noise in noises])
    assert len(values.unique()) == len(values) == 4 * 3 * 4
