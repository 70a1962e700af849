"""A draw is one function: the same weights for every token, with a cache or without, and gone afterwards."""

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import DynamicCache

from bayestune.adapters import BlobConfig, gaussian_layers, training_noise
from bayestune.errors import DrawError
from bayestune.functional import prediction_noise
from bayestune.inference import draw
from models import LLAMA, blob, llama
from probes import bayesian_sum, departure, double_llama, moments_departure, output_of, z_bound

Figure = Callable[..., None]
IDS = LLAMA.inputs(rows=3, tokens=9)["input_ids"]


def logits(model: torch.nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


def cached_logits(model: PeftModel) -> Tensor:
    """As `logits`, three tokens first and then one at a time, from a cache; training noise starts afresh each time."""
    cache, parts = DynamicCache(), []
    with torch.no_grad():
        for part in (IDS[:, :3], *IDS[:, 3:].split(1, dim=1)):
            training_noise(model).micro = 0
            parts.append(model(input_ids=part, past_key_values=cache, use_cache=True).logits)
    training_noise(model).micro = 0
    return torch.cat(parts, dim=1)


def test_a_draw_is_the_mean_plus_named_noise() -> None:
    model = bayesian_sum().eval()
    eye = torch.eye(4, dtype=torch.float64)
    for name, layer in gaussian_layers(model).items():
        noise = prediction_noise(7, 2, name, (2, 4)).double()
        with draw(model, index=2, seed=7), output_of(layer) as outputs:
            model(eye)
        assert torch.allclose(outputs[0].T, layer.weight + layer.rho**2 * noise, rtol=1e-14, atol=1e-14)


@pytest.mark.property("S10")
def test_draws_are_standard_normal_and_independent(figure: Figure) -> None:
    model, count = bayesian_sum(), 1200
    eye, samples = torch.eye(4, dtype=torch.float64), []
    layers = gaussian_layers(model)
    with output_of(layers["left"]) as left, output_of(layers["right"]) as right:
        for index in range(count):
            with draw(model, index=index % 600, seed=index // 600):
                model.base_model(eye)
    for layer, outputs in ((layers["left"], left), (layers["right"], right)):
        samples.append(((torch.stack(outputs).transpose(1, 2) - layer.weight) / layer.rho**2).flatten(1).detach())
    unit = torch.cat(samples, dim=1)
    columns = unit.shape[1]
    worst, bound = moments_departure(unit)
    between = max(
        departure((unit[1:] * unit[:-1]).mean(0), 0, 1 / math.sqrt(count - 1)),
        departure((unit[:600] * unit[600:]).mean(0), 0, 1 / math.sqrt(600)),
    )
    figure("mean, variance, fourth moment and correlations of draws, standard errors", worst, at_most=bound)
    figure("correlation of consecutive draws and of seeds, standard errors", between, at_most=z_bound(2 * columns))


def test_a_layer_has_the_same_draw_whatever_else_is_adapted() -> None:
    found = []
    for targets in (["q_proj"], ["q_proj", "v_proj", "lm_head"]):
        model = blob(LLAMA, target_modules=targets)
        layer = gaussian_layers(model)["model.layers.0.self_attn.q_proj"]
        with torch.no_grad():
            layer.weight.zero_(), layer.rho.fill_(1.0)
        with draw(model, index=3), output_of(layer) as outputs:
            logits(model)
        found.append(outputs[0])
    assert torch.equal(*found)


@pytest.mark.property("S11")
def test_equal_tokens_get_equal_perturbations(figure: Figure) -> None:
    model = double_llama()
    layer = gaussian_layers(model)["model.layers.0.self_attn.q_proj"]  # its input is the token alone
    with output_of(layer) as outputs:
        logits(model, torch.tensor([[5, 9, 5, 5], [7, 7, 9, 5]]))
        with draw(model, index=1):
            logits(model, torch.tensor([[5, 9, 5, 5], [7, 7, 9, 5]]))
    shift = outputs[1] - outputs[0]
    for one, two in [((0, 0), (0, 2)), ((0, 0), (0, 3)), ((0, 0), (1, 3)), ((1, 0), (1, 1)), ((0, 1), (1, 2))]:
        figure("perturbations of two equal tokens, difference", departure(shift[one], shift[two], 1), at_most=1e-12)
        assert shift[one].abs().min() > 1e-6


@pytest.mark.property("S11")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_a_cache_changes_nothing_within_a_draw(dtype: torch.dtype, bound: float, figure: Figure) -> None:
    model = double_llama().to(dtype)
    with draw(model, index=4):
        error = departure(logits(model), cached_logits(model), 1)
    figure(f"logits with a cache less those without, {dtype}".replace("torch.", ""), error, at_most=bound)


@pytest.mark.property("S11")
def test_generation_is_that_of_one_draw() -> None:
    model = double_llama()
    with draw(model, index=4):
        found = model.generate(
            input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False, eos_token_id=None
        )
        expected = IDS
        for _ in range(8):
            expected = torch.cat([expected, logits(model, expected)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(found, expected)


@pytest.mark.property("S11")
@pytest.mark.parametrize("estimator", ["independent", "flipout"])
def test_training_noise_of_a_row_is_one_draw(estimator: str) -> None:
    model = double_llama(estimator=estimator).train()
    assert (logits(model) - cached_logits(model)).abs().max() <= 1e-10


@pytest.mark.property("S11")
def test_the_parity_option_is_not_one_draw() -> None:
    model = double_llama(estimator="flipout_token").train()
    assert (logits(model) - cached_logits(model)).abs().max() > 1e-2
    with draw(model, index=4):  # it is an option of training: draws do not know it
        assert (logits(model) - cached_logits(model)).abs().max() <= 1e-10


@pytest.mark.property("S14")
def test_with_b_at_zero_every_draw_is_the_base_bit_for_bit() -> None:
    model = get_peft_model(llama(), LLAMA.config())
    expected = logits(llama().eval())
    for index in range(3):
        with draw(model, index=index):
            assert torch.equal(logits(model), expected)


@pytest.mark.property("S15")
def test_a_disabled_adapter_within_a_draw_is_the_base_bit_for_bit() -> None:
    model, expected = blob(LLAMA), logits(llama().eval())
    with draw(model), model.disable_adapter():
        assert torch.equal(logits(model), expected)
    with model.disable_adapter(), draw(model):
        assert torch.equal(logits(model), expected)
    with draw(model):
        assert not torch.equal(logits(model), expected)


@pytest.mark.property("S15")
def test_a_merged_adapter_has_no_draws() -> None:
    model = blob(LLAMA).eval()
    model.merge_adapter()
    with pytest.raises(DrawError, match="merged"), draw(model):
        pass
    model.unmerge_adapter()
    with draw(model):
        logits(model)


def test_nothing_is_merged_inside_a_draw() -> None:
    """PEFT would merge the mean."""
    model = blob(LLAMA).eval()
    expected = logits(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(DrawError, match="inside draw.*export_lora"), draw(model, index=1):
            merge()
        assert torch.equal(logits(model), expected)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def test_a_cache_belongs_to_one_draw() -> None:
    """Also a cache that the model made itself, and that of the mean. The same draw may be entered again."""
    model = blob(LLAMA).eval()
    with torch.no_grad(), draw(model, index=0, seed=3):
        expected = model(input_ids=IDS).logits[:, 5:]
        cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
    for index in (0, 1):
        with torch.no_grad(), draw(model, index=index, seed=3):
            if index == 1:
                with pytest.raises(DrawError, match="cache of draw 0 of seed 3, expected one of draw 1 of seed 3"):
                    model(input_ids=IDS[:, 5:], past_key_values=cache)
                assert model(input_ids=IDS, past_key_values=DynamicCache()).logits.isfinite().all()
            else:
                found = model(input_ids=IDS[:, 5:], past_key_values=copy.deepcopy(cache)).logits
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(DrawError, match="cache of draw 0 of seed 3, expected one of the mean"), torch.no_grad():
        model(input_ids=IDS[:, 5:], past_key_values=cache)
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :5], use_cache=True).past_key_values
    with pytest.raises(DrawError, match="cache of the mean, expected one of draw 0"), draw(model):
        model(input_ids=IDS[:, 5:], past_key_values=cache)


def test_a_model_without_a_posterior_has_no_draws() -> None:
    plain = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    with pytest.raises(DrawError, match="no active Gaussian adapter"), draw(plain):
        pass


@pytest.mark.property("P13")
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("training", [True, False])
def test_an_exception_inside_restores_mean_and_modes(failure: type[BaseException], training: bool) -> None:
    model = blob(LLAMA).train(training)
    model.get_submodule("base_model.model.model.layers.0").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(failure), draw(model, index=1):
        logits(model)
        assert not any(module.training for module in model.modules())
        raise failure
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    assert torch.equal(logits(model), logits(blob(LLAMA).eval()))


@pytest.mark.property("P13")
def test_a_draw_that_cannot_start_changes_nothing() -> None:
    model = blob(LLAMA).train()
    model.merge_adapter()
    with pytest.raises(DrawError), draw(model):
        pass
    assert all(module.training for module in model.modules())


@pytest.mark.property("K06")
def test_draws_nest() -> None:
    model, other = blob(LLAMA).eval(), blob(LLAMA, seed=5).eval()
    alone = {}
    for index in (1, 2):
        with draw(model, index=index):
            alone[index] = logits(model)
    with draw(other, index=1):
        alone[3] = logits(other)
    with draw(model, index=1):
        with draw(model, index=2):
            assert torch.equal(logits(model), alone[2])
        assert torch.equal(logits(model), alone[1])
        with draw(other, index=1):
            assert torch.equal(logits(other), alone[3])
            assert torch.equal(logits(model), alone[1])
        assert torch.equal(logits(other), logits(blob(LLAMA, seed=5).eval()))
    assert not torch.equal(alone[1], alone[2])


@pytest.mark.property("K06")
def test_a_deep_copy_is_a_model_of_its_own() -> None:
    model = blob(LLAMA)
    with draw(model, index=1):
        expected, clone = logits(model), copy.deepcopy(model)
        assert torch.equal(logits(clone), logits(blob(LLAMA).eval()))  # the draw is the original's
    with draw(clone, index=1):
        assert torch.equal(logits(clone), expected)
    training_noise(clone).seed = 9
    assert training_noise(model).seed == 0 and training_noise(model).micro == 0
    clone.train()
    assert not torch.equal(logits(clone), logits(model))
    assert (training_noise(clone).micro, training_noise(model).micro) == (1, 1)
    with torch.no_grad():
        for layer in gaussian_layers(clone).values():
            layer.weight.add_(1.0)
    with draw(model, index=1):
        assert torch.equal(logits(model), expected)


@pytest.mark.property("K06")
def test_a_pickled_model_has_the_same_draws() -> None:
    model = blob(LLAMA).eval()
    clone = pickle.loads(pickle.dumps(model))
    for index in range(2):
        with draw(model, index=index), draw(clone, index=index):
            assert torch.equal(logits(model), logits(clone))
    training_noise(clone.train()).seed = training_noise(model.train()).seed = 3
    assert torch.equal(logits(model), logits(clone))


@pytest.mark.property("K04")
def test_an_adapter_moves_the_global_state_as_plain_lora_does() -> None:
    states, matrices = [], []
    for config in (
        LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
        BlobConfig(r=4, target_modules=["q_proj", "lm_head"]),
    ):
        base = llama()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            model = get_peft_model(base, config)
            states.append(torch.get_rng_state())
        matrices.append([value for name, value in model.named_parameters() if name.endswith("lora_A.default.weight")])
    assert torch.equal(*states)
    assert all(torch.equal(one, two) for one, two in zip(*matrices, strict=True)) and len(matrices[0]) == 3


@pytest.mark.property("K04")
@pytest.mark.parametrize("estimator", ["independent", "flipout", "flipout_token"])
def test_draws_and_training_noise_leave_the_global_state_alone(estimator: str) -> None:
    model = blob(LLAMA, estimator=estimator)
    before = torch.get_rng_state()
    with draw(model, index=1):
        logits(model)
    first = logits(model)
    assert torch.equal(torch.get_rng_state(), before)
    training_noise(model).micro = 0
    with torch.random.fork_rng():
        torch.manual_seed(99)
        assert torch.equal(first, logits(model))


@pytest.mark.property("K04")
def test_dropout_moves_the_global_state_as_in_plain_lora() -> None:
    states = []
    for config in (
        LLAMA.config(lora_dropout=0.5),
        LoraConfig(r=4, target_modules=list(LLAMA.targets), lora_dropout=0.5),
    ):
        model = get_peft_model(llama(), config).train()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            logits(model)
            states.append(torch.get_rng_state())
    assert torch.equal(*states)
