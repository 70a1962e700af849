"""TFB: the same mean, the closed-form covariance, and a search that never returns what it rejected."""

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, LlamaForCausalLM

from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneError, ConfigError, DataError, PosteriorError
from bayestune.functional import derive_seed, std
from bayestune.inference import draw, predict
from bayestune.methods import anchor_loss, fit_tfb, load_posterior, save_posterior, search_sigma
from bayestune.methods.tfb import rotated
from bayestune.metrics import nll
from bayestune.serving.lora import export_lora
from bayestune.storage.state import adapter_tensors
from bayestune.tasks import Row
from inference.cases import Letters, rows
from models import BERT, GPT2, LLAMA, Architecture, assert_same, blob, logits, scatter
from probes import z_bound

SETTINGS: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "gpt2": (GPT2, {}),
    "head": (BERT, {"task_type": None, "modules_to_save": ["classifier"]}),
    "ranks": (
        LLAMA,
        {
            "rank_pattern": {"layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"v_proj": 5},
            "use_rslora": True,
            "lora_dropout": 0.5,
        },
    ),
    "all_linear": (LLAMA, {"target_modules": "all-linear"}),
    "wide": (LLAMA, {"r": 40}),  # more than the 16 outputs of v_proj and the 32 of q_proj
}


def lora(architecture: Architecture = LLAMA, *, adapter: str = "default", **settings: Any) -> PeftModel:
    """A plain LoRA model in training mode whose weights are all away from their start."""
    default = {"r": 4, "lora_alpha": 8, "target_modules": list(architecture.targets), **architecture.adapter}
    config = LoraConfig(**{**default, "task_type": architecture.task_type, **settings})
    return scatter(get_peft_model(architecture.build(), config, adapter_name=adapter), adapter=adapter).train()


def square(model: PeftModel) -> float:
    """1 + sigma_q^2, read off the widths: a loss with the closed-form threshold sqrt(tolerance)."""
    squares = []
    for name, layer in gaussian_layers(model).items():
        column = model.get_base_model().get_submodule(name).lora_B["default"].weight[:, 0]
        squares.append((std(layer.rho[0, 0].double()) * column.double().norm()).square())
    return 1 + torch.stack(squares).mean().item()


def products(model: PeftModel, adapter: str = "default") -> dict[str, Tensor]:
    """BA of every layer, float64."""
    tensors = adapter_tensors(model, adapter)
    layers = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    return {k: tensors[f"{k}.lora_B.weight"].double() @ tensors[f"{k}.lora_A.weight"].double() for k in layers}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def shape(model: PeftModel) -> dict[str, tuple[bool, bool]]:
    """Modes of the modules and trainability of the parameters."""
    modes = {name: (module.training, False) for name, module in model.named_modules()}
    return modes | {name: (parameter.requires_grad, True) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("name", ["gpt2", "head", "ranks", "all_linear", "wide"])
def test_the_mean_is_the_adapter_and_the_base_is_bit_equal(name: str) -> None:
    architecture, settings = SETTINGS[name]
    base, model = state(architecture.build()), lora(architecture, **settings)
    before = products(model)
    inputs = architecture.inputs()
    expected = logits(model.eval(), inputs)
    config = model.peft_config["default"]
    found, _ = fit_tfb(model, square)
    after = products(found)
    assert before.keys() == after.keys() and len(after) >= 4
    for key, product in before.items():
        # Rounding B' and A' to float32 moves each of r terms by at most eps of its size.
        bound = 2 * 1.2e-7 * torch.linalg.norm(after[key], 2) * math.sqrt(config.r)
        assert (after[key] - product).abs().max() <= bound, key
    assert not found.training and not any(parameter.requires_grad for parameter in found.parameters())
    assert (logits(found, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert found.peft_config["default"].modules_to_save == config.modules_to_save
    assert found.peft_config["default"].lora_dropout == config.lora_dropout
    for path, module in list(found.get_base_model().named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            assert not torch.equal(module.modules_to_save["default"].weight, module.original_module.weight)
            found.get_base_model().set_submodule(path, module.original_module)
    assert_same(base, state(found.unload()))


def test_a_half_precision_base_and_head_stay_as_they_are() -> None:
    base = BERT.build().bfloat16()
    config = LoraConfig(r=4, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = scatter(get_peft_model(base, config, autocast_adapter_dtype=False))
    before, tensors = products(model), {k: t.clone() for k, t in adapter_tensors(model, "default").items()}
    found, _ = fit_tfb(model, square)
    after = adapter_tensors(found, "default")
    for key, tensor in tensors.items():
        if "lora" not in key:
            assert after[key].dtype == torch.bfloat16 and torch.equal(after[key], tensor)
    assert all(tensor.dtype == torch.float32 for key, tensor in after.items() if "lora" in key)
    for key, product in products(found).items():
        assert (product - before[key]).abs().max() <= 1e-6 * torch.linalg.norm(product)  # B' and A' are float32


def test_rotated_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    for m, r in ((7, 3), (3, 7), (1, 1), (5, 5)):
        a, b = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((r, 4), (m, r)))
        a_new, b_new, d = rotated(a, b)
        assert a_new.shape == a.shape and b_new.shape == b.shape and d.shape == (r,)
        assert (b_new @ a_new - b @ a).abs().max() <= 1e-14 * torch.linalg.norm(b) * torch.linalg.norm(a)
        assert (b_new.T @ b_new - d.square().diag()).abs().max() <= 1e-14 * torch.linalg.norm(b) ** 2
        assert (d > 0).sum() == min(m, r)


def test_widths_are_sigma_over_the_singular_values() -> None:
    model = lora(LLAMA)
    singular = {
        key.removesuffix(".lora_B.weight"): torch.linalg.svdvals(tensor.double())
        for key, tensor in adapter_tensors(model, "default").items()
        if key.endswith(".lora_B.weight")
    }
    found, search = fit_tfb(model, square)
    for name, layer in gaussian_layers(found).items():
        expected = search.sigma / singular[f"base_model.model.{name}"]
        assert (std(layer.rho.double()) / expected[:, None] - 1).abs().max() <= 1e-6


def test_the_covariance_of_sampled_BA() -> None:
    """Every column of BA has covariance sigma_q^2 U U^T, and columns are independent."""
    model = lora(LLAMA, target_modules=["v_proj"], layers_to_transform=[0])
    (mean,) = products(model).values()
    b = adapter_tensors(model, "default")["base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"].double()
    found, search = fit_tfb(model, square)
    (layer,) = gaussian_layers(found).values()
    (b_new,) = (t.double() for k, t in adapter_tensors(found, "default").items() if k.endswith("lora_B.weight"))
    draws = 4000
    noise = torch.randn(draws, *layer.weight.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        sampled = b_new @ layer.drawn(noise).double() - mean  # [draws, m, n]
    u, _, _ = torch.linalg.svd(b, full_matrices=False)
    expected = search.sigma**2 * (u @ u.T)
    columns = sampled[:, :, :8].permute(0, 2, 1).reshape(-1, len(b))  # 8 of the 32 columns
    count = len(columns)
    # float32 M and noise leave about 1e-7 of each entry, far below the standard error of 1 %.
    variances = expected.diagonal()
    error = ((variances[:, None] * variances + expected.square()) / count).sqrt()
    covariance = columns.T @ columns / count
    assert ((covariance - expected).abs() <= z_bound(expected.numel()) * error).all()
    cross = sampled[:, :, 0].T @ sampled[:, :, 1] / draws
    assert (cross.abs() <= z_bound(cross.numel()) * (variances[:, None] * variances / draws).sqrt()).all()


def test_draws_of_the_model_are_those_of_its_layers() -> None:
    found, search = fit_tfb(lora(LLAMA), square)
    inputs = LLAMA.inputs()
    mean = logits(found, inputs)
    with draw(found, index=0, seed=1):
        drawn = logits(found, inputs)
    assert search.sigma > 0 and (drawn - mean).abs().max() > 1e-4


@pytest.mark.parametrize(("power", "scale"), [(1, 1.0), (2, -2.0), (1, 1e6)])
def test_the_threshold_of_a_monotone_loss(power: int, scale: float) -> None:
    """loss = scale (2 + sigma^p): accepted up to (2 tolerance)^(1/p), whatever the scale."""
    tried: list[float] = []

    def loss(sigma: float) -> float:
        tried.append(sigma)
        return scale * (2 + sigma**power)

    found = search_sigma(loss, tolerance=0.01, low=1e-4, high=1.0, iterations=30)
    threshold = 0.02 ** (1 / power)
    # The bisection ends 1e-8 below; the comparison itself rounds at eps / tolerance.
    assert 1 - 2e-8 <= found.sigma / threshold <= 1 + 1e-12
    assert found.loss == scale * (2 + found.sigma**power) and found.reference == scale * 2
    assert not found.at_high and tried == [0.0, *(trial.sigma for trial in found.trace)]
    assert len(found.trace) == 32


@pytest.mark.parametrize("iterations", [0, 5])
def test_the_bracket_closes_at_the_stated_rate(iterations: int) -> None:
    found = search_sigma(lambda s: 1 + s, tolerance=0.02, low=1e-4, high=1.0, iterations=iterations)
    rejected = min(trial.sigma for trial in found.trace if not trial.accepted)
    assert rejected / found.sigma == pytest.approx(1e4 ** (2.0**-iterations), rel=1e-12)
    assert found.sigma <= 0.02 < rejected


@pytest.mark.parametrize("frequency", [3.0, 20.0])
def test_what_is_returned_was_accepted_also_where_the_loss_is_not_monotone(frequency: float) -> None:
    def loss(sigma: float) -> float:
        return 1 + (0.004 * math.sin(frequency * math.log(sigma)) if sigma > 2e-4 else 0.0)

    for iterations in range(8):
        found = search_sigma(loss, tolerance=0.003, low=1e-4, high=0.9, iterations=iterations)
        best = max((trial for trial in found.trace if trial.accepted), key=lambda trial: trial.sigma)
        assert (found.sigma, found.loss) == (best.sigma, best.loss)
        assert abs(loss(found.sigma) - 1) <= 0.003
        for trial in found.trace:
            assert trial.loss == loss(trial.sigma) and trial.accepted == (abs(trial.loss - 1) <= 0.003)


def test_a_change_in_either_direction_counts() -> None:
    """An accuracy falls, and an NLL may fall too: both are changes."""
    falling = search_sigma(lambda s: 1 - s, tolerance=0.02, low=1e-4, high=1.0, iterations=40)
    assert falling.sigma == pytest.approx(0.02, rel=1e-10) and falling.loss < 1


def test_the_upper_end_is_named_when_it_is_accepted() -> None:
    found = search_sigma(lambda s: 1.0, tolerance=0.0, low=1e-4, high=0.25, iterations=5)
    assert found.at_high and found.sigma == 0.25 and [trial.sigma for trial in found.trace] == [1e-4, 0.25]


def test_an_infinite_loss_is_rejected() -> None:
    found = search_sigma(lambda s: math.inf if s > 0.1 else 1.0, tolerance=0.1, low=1e-3, high=1.0, iterations=40)
    assert found.sigma == pytest.approx(0.1, rel=1e-9) and not found.at_high


@pytest.mark.parametrize(
    ("loss", "settings", "error", "words"),
    [
        (lambda s: 1 + s, {"tolerance": 1e-5}, ConfigError, ("1.0001", "low=0.0001", "1e-05")),
        (lambda s: math.nan if s > 0.5 else 1.0, {}, PosteriorError, ("NaN", "sigma_q=1")),
        (lambda s: math.inf, {}, PosteriorError, ("infinite",)),
        (lambda s: 1.0, {"low": 1.0}, ConfigError, ("low=1.0", "high=1.0")),
        (lambda s: 1.0, {"tolerance": math.nan}, ConfigError, ("tolerance=nan",)),
    ],
)
def test_a_search_that_cannot_be_right(
    loss: Callable[[float], float], settings: dict[str, Any], error: type[BayestuneError], words: tuple[str, ...]
) -> None:
    with pytest.raises(error) as caught:
        search_sigma(loss, **{"tolerance": 0.003, "low": 1e-4, "high": 1.0, "iterations": 3, **settings})
    assert "\n" not in str(caught.value) and all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("iterations", [0, 20])
def test_tfb_searches_on_the_model_and_leaves_it_at_the_width_found(iterations: int) -> None:
    seen: list[float] = []

    def loss(model: PeftModel) -> float:
        seen.append(square(model))
        return seen[-1]

    found, search = fit_tfb(lora(GPT2), loss, tolerance=1e-4, low=1e-3, high=1.0, iterations=iterations)
    assert seen[0] == 1.0 == search.reference
    # square() reads a width that was rounded to float32 twice, the root and its square.
    assert 1e-2 * 1e3 ** -(2.0**-iterations) * (1 - 1e-4) <= search.sigma <= 1e-2 * (1 + 1e-4)
    assert square(found) == search.loss and abs(search.loss - 1) <= 1e-4


@pytest.mark.parametrize("rank", [0, 3])
def test_directions_that_B_lacks_get_no_noise(rank: int) -> None:
    model = lora(LLAMA, r=4)
    generator = torch.Generator().manual_seed(1)
    bases = {}
    for key, tensor in adapter_tensors(model, "default").items():
        if key.endswith(".lora_B.weight"):
            left = torch.randn(len(tensor), rank, generator=generator)
            tensor.copy_(left @ torch.randn(rank, 4, generator=generator))
            bases[key.removeprefix("base_model.model.").removesuffix(".lora_B.weight")] = left.double()
    expected = logits(model.eval(), LLAMA.inputs())
    found, search = fit_tfb(model, lambda m: 1.0, low=0.1, high=0.5)
    assert (logits(found, LLAMA.inputs()) - expected).abs().max() <= 1e-5 * expected.abs().max()
    for name, layer in gaussian_layers(found).items():
        b = found.get_base_model().get_submodule(name).lora_B["default"].weight.double()
        assert torch.isfinite(layer.rho).all() and (layer.rho > 0).all()
        assert torch.equal(b[:, rank:], torch.zeros_like(b[:, rank:]))
        projector = bases[name] @ torch.linalg.pinv(bases[name])
        covariance = b @ std(layer.rho[:, 0].double()).square().diag() @ b.T
        # B = left right was rounded to float32, which tilts its range by eps times its condition number.
        assert (covariance - search.sigma**2 * projector).abs().max() <= 1e-4 * search.sigma**2
    with draw(found, seed=2):
        drawn = logits(found, LLAMA.inputs())
    assert torch.isfinite(drawn).all() and torch.equal(drawn, logits(found, LLAMA.inputs())) == (rank == 0)


def test_a_tiny_B_gives_finite_widths() -> None:
    model = lora(LLAMA)
    with torch.no_grad():
        for key, tensor in adapter_tensors(model, "default").items():
            if key.endswith(".lora_B.weight"):
                tensor.mul_(1e-25)
    found, _ = fit_tfb(model, lambda m: 1.0)
    assert all(torch.isfinite(layer.rho).all() and (layer.rho > 0).all() for layer in gaussian_layers(found).values())
    with draw(found):
        assert torch.isfinite(logits(found, LLAMA.inputs())).all()


@pytest.mark.parametrize("name", ["head", "ranks"])
def test_the_posterior_is_saved_loaded_drawn_and_exported(name: str, tmp_path: Path) -> None:
    architecture, settings = SETTINGS[name]
    found, _ = fit_tfb(lora(architecture, **settings), square)
    inputs = architecture.inputs()
    save_posterior(found, tmp_path / "posterior")
    loaded = load_posterior(architecture.build().eval(), tmp_path / "posterior")
    assert_same(adapter_tensors(found, "default"), adapter_tensors(loaded, "default"))
    with draw(found, index=1, seed=5):
        expected = logits(found, inputs)
    with draw(loaded, index=1, seed=5):
        assert torch.equal(logits(loaded, inputs), expected)
    paths = export_lora(found, tmp_path / "served", draws=2, seed=5)
    served = PeftModel.from_pretrained(architecture.build().eval(), str(paths[2])).eval()
    assert (logits(served, inputs) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert not any(key.endswith("rho") for key in load_file(paths[2] / "adapter_model.safetensors"))


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_keeps_its_packed_weights(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("bitsandbytes")
    caplog.set_level(logging.ERROR, logger="bitsandbytes")
    LLAMA.build(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)  # 4-bit blocks hold 64 weights
    packing = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4")
    base = LlamaForCausalLM.from_pretrained(
        tmp_path, quantization_config=packing, device_map="cpu", dtype=torch.float32
    )
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = scatter(get_peft_model(base, config)).eval()
    inputs = LLAMA.inputs()
    expected = logits(model, inputs)
    packed = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}
    found, _ = fit_tfb(model, square)
    # The 4-bit kernel of the CPU rounds its inputs to bfloat16, so a float32 rounding before it can move one by 2^-8.
    bound = {"int8": 1e-5, "nf4": 2**-6}[kind] * expected.abs().max()
    assert (logits(found, inputs) - expected).abs().max() <= bound
    assert_same(packed, {name: p.detach() for name, p in found.named_parameters() if "lora_" not in name})
    with draw(found):
        assert (logits(found, inputs) - expected).abs().max() > 2 * bound


def test_the_anchor_loss_of_predictions() -> None:
    task, anchors = Letters(), rows(6)
    found, search = fit_tfb(lora(LLAMA), anchor_loss(task, anchors, draws=3, seed=4), tolerance=0.001, high=10.0)
    prediction = predict(found, task, anchors, draws=3, seed=derive_seed("anchor", 4))
    assert prediction.labels is not None and not search.at_high
    assert search.loss != nll(predict(found, task, anchors, draws=3, seed=4).log_probs, prediction.labels)
    assert search.loss == nll(prediction.log_probs, prediction.labels) != search.reference
    at_mean = predict(found, task, anchors, draws=0)
    assert search.reference == pytest.approx(nll(at_mean.log_probs, prediction.labels), rel=1e-5)


def test_anchor_rows_and_draws_are_needed() -> None:
    unlabelled = Row(id="u", question="why", choices=("a", "b"), answer=None)
    with pytest.raises(DataError, match="'u'"):
        anchor_loss(Letters(), [*rows(2), unlabelled])
    with pytest.raises(ConfigError, match="draws=0"):
        anchor_loss(Letters(), rows(2), draws=0)


def merged() -> PeftModel:
    model = lora()
    model.merge_adapter()
    return model


def two_adapters() -> PeftModel:
    model = lora()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    return model


def broken() -> PeftModel:
    model = lora()
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name)[0, 0] = math.nan
    return model


REFUSED: dict[str, tuple[Callable[[], PeftModel], str]] = {
    "blob": (lambda: blob(LLAMA), "already"),
    "merged": (merged, "unmerge_adapter"),
    "dora": (lambda: lora(use_dora=True), "use_dora"),
    "embedding": (lambda: lora(target_modules=["q_proj", "embed_tokens"]), "embed_tokens"),
    "two": (two_adapters, "delete_adapter"),
    "nan": (broken, "NaN"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_and_left_alone(name: str) -> None:
    make, word = REFUSED[name]
    model = make()
    before, kept = state(model), shape(model)
    with pytest.raises(PosteriorError if name == "nan" else ConfigError) as caught:
        fit_tfb(model, square)
    assert word in str(caught.value) and "\n" not in str(caught.value)
    torch.testing.assert_close(state(model), before, rtol=0, atol=0, equal_nan=True)
    assert shape(model) == kept


@pytest.mark.parametrize(("name", "adapter"), [("head", "default"), ("gpt2", "mine")])
def test_a_search_that_fails_leaves_the_adapter_as_it_was(name: str, adapter: str, tmp_path: Path) -> None:
    architecture, settings = SETTINGS[name]
    model = lora(architecture, adapter=adapter, **settings)
    next(p for name, p in model.named_parameters() if "lora_A" in name).requires_grad_(False)
    before, kept = state(model), shape(model)
    expected = logits(model.eval(), architecture.inputs())
    model.train()

    def interrupted(model: PeftModel) -> float:
        raise KeyboardInterrupt

    for loss, error in ((interrupted, KeyboardInterrupt), (lambda m: math.nan, PosteriorError)):
        with pytest.raises(error):
            fit_tfb(model, loss)
        assert_same(before, state(model))
        assert shape(model) == kept
        assert model.get_base_model().peft_config is model.peft_config
    assert torch.equal(logits(model.eval(), architecture.inputs()), expected)
    save_posterior(model, tmp_path / "point")
    found, _ = fit_tfb(model, square)  # and it can be tried again
    assert (logits(found, architecture.inputs()) - expected).abs().max() <= 1e-5 * expected.abs().max()
