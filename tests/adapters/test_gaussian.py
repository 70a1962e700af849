"""Noise of the Gaussian layer: its moments, what shares it and what does not, and where it must be absent."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from bayestune.adapters import BayesLoraConfig, GaussianLinear, drawn_weights, gaussian_layers, noise, training_noise
from bayestune.errors import DrawError
from bayestune.functional import RHO_FLOOR
from models import LLAMA, blob, llama
from probes import Sum, bayesian_sum, departure, double_llama, moments_departure, output_of, z_bound

Figure = Callable[..., None]
ESTIMATORS = ("independent", "flipout", "flipout_token")
ROWWISE = ("independent", "flipout")


def sampled_matrices(model: PeftModel, rows: int) -> dict[str, Tensor]:
    """A of every row, [rows, r, n] a layer, seen through one training forward: the image of the unit vectors."""
    found = {}
    layers = gaussian_layers(model)
    size = next(iter(layers.values())).in_features
    inputs = torch.eye(size, dtype=torch.float64).expand(rows, size, size)
    handles = [
        layer.register_forward_hook(lambda _, args, output, name=name: found.update({name: output.detach()}))
        for name, layer in layers.items()
    ]
    model(inputs)
    for handle in handles:
        handle.remove()
    return {name: output.transpose(1, 2) for name, output in found.items()}


def standardised(model: PeftModel, matrices: dict[str, Tensor]) -> Tensor:
    """(A - M) / G^2 of all layers side by side, [draws, entries]."""
    layers = gaussian_layers(model)
    parts = [((matrices[name] - layer.weight) / layer.rho**2).flatten(1) for name, layer in layers.items()]
    return torch.cat(parts, dim=1).detach()


MOMENTS = "mean, variance, fourth moment and correlations of training noise, standard errors"


def consecutive_departure(samples: Tensor) -> float:
    """Correlation of consecutive draws, in standard errors."""
    return departure((samples[1:] * samples[:-1]).mean(0), 0, 1 / math.sqrt(len(samples) - 1))


def test_rho_starts_uniform_in_its_interval_whatever_the_global_state() -> None:
    found = []
    for seed in (0, 1):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = get_peft_model(Sum(500, 3), BayesLoraConfig(r=8, target_modules=["left", "right"], rho_init=0.05))
        found.append(torch.stack([layer.rho.detach().double() for layer in gaussian_layers(model).values()]))
    assert torch.equal(*found)
    unit = (found[0] / 0.05 - 0.5**0.5) / (1 - 0.5**0.5)  # uniform in [0, 1]
    left, right = unit.flatten(1) - 0.5
    z, count = z_bound(5), left.numel()
    assert -1e-6 <= unit.min() and unit.max() <= 1 + 1e-6
    for part in (left, right):
        assert part.mean().abs() <= z * math.sqrt(1 / 12 / count)
        assert (part.square().mean() - 1 / 12).abs() <= z * math.sqrt(1 / 180 / count)
    assert (left * right).mean().abs() <= z / 12 / math.sqrt(count)


@pytest.mark.property("S10")
def test_independent_noise_of_rows_is_standard_normal(figure: Figure) -> None:
    model = bayesian_sum()
    samples = standardised(model, sampled_matrices(model, 20_000))
    worst, bound = moments_departure(samples)
    figure(MOMENTS, worst, at_most=bound)
    figure("correlation of the noise of rows", consecutive_departure(samples), at_most=z_bound(samples.shape[1]))


@pytest.mark.property("S10")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noise_of_consecutive_forwards_is_standard_normal(estimator: str, figure: Figure) -> None:
    model = bayesian_sum(estimator=estimator)
    samples = torch.cat([standardised(model, sampled_matrices(model, 1)) for _ in range(1200)])
    worst, bound = moments_departure(samples)
    figure(MOMENTS, worst, at_most=bound)
    figure("correlation of the noise of forwards", consecutive_departure(samples), at_most=z_bound(samples.shape[1]))


@pytest.mark.property("S10")
def test_noise_of_steps_micro_steps_ranks_and_seeds_is_uncorrelated(figure: Figure) -> None:
    model, rows = bayesian_sum(), 2000
    clock = training_noise(model)
    keys = [(0, 0, 0, 0), (0, 0, 1, 0), (0, 1, 0, 0), (0, 0, 0, 1), (1, 0, 0, 0), (0, 0, 0, 0)]
    samples = []
    for seed, step, micro, rank in keys:
        clock.seed, clock.step, clock.micro, clock.rank = seed, step, micro, rank
        samples.append(standardised(model, sampled_matrices(model, rows)).flatten())
        assert clock.micro == micro + 1
    assert torch.equal(samples[0], samples.pop())
    products = torch.stack(samples) @ torch.stack(samples).T / samples[0].numel()
    worst = departure(products - products.diagonal().diag(), 0, 1 / math.sqrt(samples[0].numel()))
    figure("correlation between steps, micro-steps, processes and seeds, standard errors", worst, at_most=z_bound(20))


@pytest.mark.property("S10")
@pytest.mark.parametrize("estimator", ROWWISE)
def test_layers_on_several_devices_have_streams_of_their_own(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {torch.device("cpu"): ["left"], torch.device("cpu", 0): ["right"]}  # as two cards would be
    monkeypatch.setattr(noise, "_by_device", lambda layers: places)
    model = bayesian_sum(estimator=estimator)
    samples = standardised(model, sampled_matrices(model, 2000)).view(2000, 2, -1)
    left, right = samples.unbind(1)
    assert not torch.equal(left, right)
    if estimator == "independent":
        assert (left * right).mean().abs() <= z_bound(1) / math.sqrt(left.numel())
    else:
        assert not torch.equal(left.sign() * left[:1].sign(), right.sign() * right[:1].sign())


@pytest.mark.property("S12")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_perturbations_have_mean_zero_the_right_variance_and_no_covariance_across_rows(
    estimator: str, figure: Figure
) -> None:
    count, rows = 1500, 3
    model = bayesian_sum(estimator=estimator)
    layer = gaussian_layers(model)["left"]
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with output_of(layer) as outputs:
        for _ in range(count):
            model.base_model(x)
    perturbation = torch.stack(outputs) - F.linear(x, layer.weight.detach())  # [count, rows, r]
    variance = F.linear(x.square(), layer.rho.detach() ** 4)
    unit = (perturbation / variance.sqrt()).flatten(1)
    z = z_bound(unit.shape[1] * (unit.shape[1] + 3) // 2)
    products = unit[:, :, None] * unit[:, None, :]
    error = products.std(0) / math.sqrt(count)
    mean = products.mean(0)
    figure("mean of the perturbations, standard errors", departure(unit.mean(0), 0, 1 / math.sqrt(count)), at_most=z)
    figure("variance, standard errors", departure(mean.diagonal(), 1, error.diagonal().max()), at_most=z)
    figure("covariances, standard errors", departure(mean - mean.diagonal().diag(), 0, error), at_most=z)


@pytest.mark.property("S12")
@pytest.mark.parametrize("estimator", ["flipout", "flipout_token"])
def test_both_sides_of_the_shared_noise_get_signs(estimator: str) -> None:
    """t * ((G^2 * E)(u * x)) of one x: 2^4 signs u times 2^2 signs t, of which (u, t) and (-u, -t) are the same."""
    model = bayesian_sum(estimator=estimator)
    layer = gaussian_layers(model)["left"]
    x = torch.ones(500, 4, dtype=torch.float64)
    with output_of(layer) as outputs:
        model(x)
    perturbation = outputs[0] - F.linear(x, layer.weight.detach())
    assert len((perturbation * 1e8).round().unique(dim=0)) == 32


def two_equal_positions(estimator: str) -> Tensor:
    """Perturbations [rows, r * layers, 2] of two tokens that are the same, of one sequence each row."""
    model = bayesian_sum(estimator=estimator)
    layer = gaussian_layers(model)["left"]
    token = torch.randn(500, 1, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    other = torch.randn(500, 1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with output_of(layer) as outputs:
        model(torch.cat([token, other, token], dim=1))
    mean = F.linear(token, layer.weight.detach())
    return (outputs[0][:, [0, 2]] - mean).transpose(1, 2)


@pytest.mark.property("S11")
@pytest.mark.parametrize("estimator", ROWWISE)
def test_equal_tokens_of_a_row_get_equal_perturbations(estimator: str, figure: Figure) -> None:
    first, second = two_equal_positions(estimator).unbind(-1)
    figure("perturbations of two equal tokens in training, difference", departure(first, second, 1), at_most=1e-13)
    assert first.abs().min() > 0


@pytest.mark.property("S11")
def test_the_parity_option_perturbs_every_token_by_itself() -> None:
    first, second = two_equal_positions("flipout_token").flatten(0, 1).unbind(-1)
    products = first * second
    assert products.mean().abs() <= z_bound(1) * products.std() / math.sqrt(len(products))
    assert not torch.allclose(first, second)


@pytest.mark.property("S13")
@pytest.mark.parametrize("estimator", ROWWISE)
def test_one_dropout_mask_for_mean_and_noise(estimator: str, figure: Figure) -> None:
    model = bayesian_sum(estimator=estimator, lora_dropout=0.5, target_modules=["left"])
    x = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        found = model(x)
        torch.manual_seed(5)
        dropped = F.dropout(x, 0.5)
    layer = gaussian_layers(model)["left"]
    assert layer.noise is not None
    up = model.base_model.model.left.lora_B["default"].weight
    a = layer.weight + layer.rho**2 * layer.noise.epsilon
    with model.disable_adapter():
        base = model(x)
    expected = base + torch.einsum("btn,brn,mr->btm", dropped, a, up) * 1.5  # alpha / r = 3 / 2
    figure("output less that with one mask, float64", departure(found, expected, 1), at_most=1e-12)


@pytest.mark.property("S13")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_noise_is_where_dropout_leaves_something_and_nowhere_else(estimator: str) -> None:
    model = bayesian_sum(Sum(1, 3), estimator=estimator, lora_dropout=0.5, target_modules=["left"])
    x, layer = torch.ones(200, 3, 1, dtype=torch.float64), gaussian_layers(model)["left"]
    with torch.no_grad():
        layer.weight.zero_()
    with output_of(layer) as outputs, torch.random.fork_rng():
        torch.manual_seed(5)
        model(x)
        torch.manual_seed(5)
        kept = F.dropout(x, 0.5) != 0
    assert torch.equal(outputs[0] != 0, kept.expand_as(outputs[0]))
    assert 0 < kept.sum() < kept.numel()


@pytest.mark.property("S14")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_variance_training_is_plain_lora(estimator: str, figure: Figure) -> None:
    model = blob(LLAMA, estimator=estimator)
    with torch.no_grad():
        for layer in gaussian_layers(model).values():
            layer.rho.fill_(RHO_FLOOR)
    ids = LLAMA.inputs()["input_ids"]
    noisy = model.train()(input_ids=ids).logits
    model.eval()
    figure(
        "logits without variance, less plain LoRA's", departure(noisy, model(input_ids=ids).logits, 1), at_most=1e-6
    )


@pytest.mark.property("S14")
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_with_b_at_zero_training_is_the_base_bit_for_bit(estimator: str) -> None:
    model = blob(LLAMA, estimator=estimator)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    ids = LLAMA.inputs()["input_ids"]
    assert torch.equal(model(input_ids=ids).logits, llama().eval()(input_ids=ids).logits)


@pytest.mark.property("S15")
def test_evaluation_mode_is_the_mean_and_deterministic() -> None:
    model = blob(LLAMA).eval()
    ids = LLAMA.inputs()["input_ids"]
    first = model(input_ids=ids).logits
    model.train()(input_ids=ids)
    model.eval()
    assert torch.equal(first, model(input_ids=ids).logits)
    with drawn_weights({layer: layer.weight.detach() for layer in gaussian_layers(model).values()}):
        assert torch.equal(first, model(input_ids=ids).logits)
    assert training_noise(model).micro == 1


@pytest.mark.property("S15")
@pytest.mark.parametrize("mode", [True, False])
def test_a_disabled_adapter_is_the_base_bit_for_bit(mode: bool) -> None:
    model = blob(LLAMA).train(mode)
    ids = LLAMA.inputs()["input_ids"]
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, llama().eval()(input_ids=ids).logits)


@pytest.mark.property("S15")
def test_a_merged_adapter_cannot_be_trained() -> None:
    model = blob(LLAMA)
    ids = LLAMA.inputs()["input_ids"]
    model.merge_adapter()
    with pytest.raises(DrawError, match="merged"):
        model(input_ids=ids)
    model.eval()(input_ids=ids)
    model.train().unmerge_adapter()
    model(input_ids=ids)


@pytest.mark.parametrize("estimator", ROWWISE)
def test_choices_flattened_into_rows_share_the_draw_of_their_row(estimator: str) -> None:
    model = double_llama(estimator=estimator).train()
    clock = training_noise(model)
    ids = LLAMA.inputs(rows=2, tokens=5)["input_ids"].repeat_interleave(3, dim=0)  # 2 rows of 3 choices, all equal
    clock.rows = 2
    first = model(input_ids=ids).logits.unflatten(0, (2, 3))
    assert (first - first[:, :1]).abs().max() <= 1e-12
    assert (model(input_ids=ids[::3].repeat(2, 1)).logits[0] - first[0, 0]).abs().max() > 1e-3
    clock.rows, clock.micro = None, 0
    apart = model(input_ids=ids).logits.unflatten(0, (2, 3))
    assert (apart[:, 0] - apart[:, 1]).abs().amax((1, 2)).min() > 1e-3


def test_a_layer_fed_with_flattened_tokens_keeps_one_draw_a_row() -> None:
    class Flattening(Sum):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    model = bayesian_sum()
    x = torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = model(x)
    model.base_model.model.__class__ = Flattening
    training_noise(model).micro = 0
    assert (model(x) - expected).abs().max() <= 1e-12


class Routed(nn.Module):
    """Half of the tokens of a batch, in an order of its own, go through the one expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 3, bias=False)])
        self.chosen: Callable[[int], Tensor] = lambda count: torch.arange(count).flip(0)[: count // 2]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        out = x.new_zeros(len(flat), 3)
        chosen = self.chosen(len(flat))
        out[chosen] = self.experts[0](flat[chosen])
        return out.unflatten(0, x.shape[:2])


@pytest.fixture
def routed() -> Iterator[tuple[PeftModel, GaussianLinear]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bayesian_sum(Routed(), target_modules=["experts.0"])
    yield model, gaussian_layers(model)["experts.0"]


def test_tokens_routed_to_an_expert_share_one_draw(routed: tuple[PeftModel, GaussianLinear]) -> None:
    model, layer = routed
    x = torch.ones(4, 6, 4, dtype=torch.float64)
    with output_of(layer) as outputs:
        model(x)
    assert layer.routed and layer.noise is not None and layer.noise.epsilon.shape[0] == 4
    assert (outputs[0] - outputs[0][0]).abs().max() <= 1e-13


def test_stacked_draws_refuse_a_layer_that_sees_other_rows() -> None:
    model = bayesian_sum().eval()
    layer = gaussian_layers(model)["left"]
    stacked = layer.weight.detach().expand(4, -1, -1)
    with drawn_weights({layer: stacked}), pytest.raises(DrawError, match="6 rows for 4 stacked draws"):
        model(torch.ones(6, 2, 4, dtype=torch.float64))


def test_a_part_of_the_model_called_by_itself_in_training_is_refused() -> None:
    model = bayesian_sum()
    with pytest.raises(DrawError, match="got no noise"):
        model.base_model.model.left(torch.ones(1, 4, dtype=torch.float64))


def test_noise_needs_a_tensor_or_a_number_of_rows() -> None:
    model = bayesian_sum()
    with pytest.raises(DrawError, match="number of rows"):
        model("text")
    with pytest.raises(DrawError, match="no random adapter"):
        training_noise(Sum(2, 2))
