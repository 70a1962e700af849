"""N1: M, G and B live in float32 (or float64), whatever the precision of the base and whoever casts the model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from bayestune.adapters import gaussian_layers
from bayestune.functional import std
from bayestune.inference.draws import draw
from models import BERT, LLAMA, T5, Architecture, adapter_state, assert_same, blob, logits, scatter

TWO = pytest.mark.parametrize("architecture", [LLAMA, T5], ids=lambda a: a.name)
HALVES = pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
CASTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "bfloat16": lambda model: model.bfloat16(),
    "to cpu and bfloat16": lambda model: model.to("cpu", dtype=torch.bfloat16),
    "there and back": lambda model: model.half().float(),
}


def train_a_step(model: PeftModel, architecture: Architecture) -> torch.optim.AdamW:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
    model.train()(**architecture.inputs()).logits.float().square().mean().backward()
    optimizer.step()
    return optimizer


def assert_adapter_is(dtype: torch.dtype, model: PeftModel) -> None:
    adapter = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert len(adapter) == len(adapter_state(model)) > 0
    assert {parameter.dtype for parameter in adapter.values()} == {dtype}
    for name, parameter in adapter.items():
        if parameter.grad is not None:
            assert parameter.grad.dtype == dtype and parameter.grad.isfinite().all(), name


@pytest.mark.property("N01")
@TWO
@HALVES
def test_a_half_base(architecture: Architecture, half: torch.dtype, tmp_path: Path) -> None:
    autocast_adapter = half is torch.bfloat16  # PEFT casts the adapter, or leaves it as it was made
    base = architecture.build().to(half)
    model = get_peft_model(base, architecture.config(), autocast_adapter_dtype=autocast_adapter)
    scatter(model)
    assert_adapter_is(torch.float32, model)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    optimizer = train_a_step(model, architecture)
    assert_adapter_is(torch.float32, model)
    for name, tensor in adapter_state(model).items():
        assert not torch.equal(tensor, before[name]), name
    for layer in gaussian_layers(model).values():
        assert layer.rho.grad is not None and layer.rho.grad.abs().max() > 0
        assert {value.dtype for value in optimizer.state[layer.rho].values()} == {torch.float32}
        assert layer.kl().dtype == torch.float64

    model.eval()
    assert logits(model, architecture.inputs()).dtype == half
    model.save_pretrained(tmp_path)
    for low in (False, True):
        loaded = PeftModel.from_pretrained(
            architecture.build().to(half),
            tmp_path,
            autocast_adapter_dtype=autocast_adapter,
            low_cpu_mem_usage=low,
        )
        assert_adapter_is(torch.float32, loaded)
        assert_same(adapter_state(loaded), adapter_state(model))
    by_transformers = architecture.build().to(half)
    by_transformers.load_adapter(tmp_path)
    assert_same(adapter_state(by_transformers), adapter_state(model))


@pytest.mark.property("N01")
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casting_the_model_leaves_the_posterior(cast: Callable) -> None:
    model = blob(LLAMA)
    train_a_step(model, LLAMA)
    before = {name: tensor.clone() for name, tensor in adapter_state(model).items()}
    gradients = {name: layer.rho.grad.clone() for name, layer in gaussian_layers(model).items()}
    cast(model)
    assert_same(adapter_state(model), before)
    assert_same({name: layer.rho.grad for name, layer in gaussian_layers(model).items()}, gradients)
    assert_adapter_is(torch.float32, model)
    base = next(p for name, p in model.named_parameters() if "base_layer.weight" in name)
    assert (base.dtype == torch.float32) is (cast is CASTS["there and back"])
    model.zero_grad()
    train_a_step(model, LLAMA)
    assert_adapter_is(torch.float32, model)


@pytest.mark.property("N01")
@pytest.mark.parametrize("estimator", ["independent", "flipout", "flipout_token"])
def test_under_autocast(estimator: str) -> None:
    architecture = LLAMA
    model = blob(architecture, estimator=estimator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train_a_step(model, architecture)
        drawn = {name: layer.drawn(torch.ones_like(layer.rho)) for name, layer in gaussian_layers(model).items()}
        kl = sum(layer.kl() for layer in gaussian_layers(model).values())
    assert_adapter_is(torch.float32, model)
    assert kl == sum(layer.kl() for layer in gaussian_layers(model).values())
    for name, layer in gaussian_layers(model).items():
        assert layer.rho.grad.abs().max() > 0
        torch.testing.assert_close(drawn[name], layer.weight + layer.rho**2, rtol=0, atol=0)
    model.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), draw(model):
        assert logits(model, architecture.inputs()).isfinite().all()


@pytest.mark.property("N01")
@HALVES
def test_a_small_update_and_a_small_std_survive(half: torch.dtype) -> None:
    model = get_peft_model(LLAMA.build().to(half), LLAMA.config()).to(half)
    layers = gaussian_layers(model).values()
    with torch.no_grad():
        for layer in layers:
            layer.rho.fill_(0.05)
            layer.rho.grad = torch.ones_like(layer.rho)
    torch.optim.SGD([layer.rho for layer in layers], lr=1e-5).step()
    for layer in layers:
        torch.testing.assert_close(layer.rho, torch.full_like(layer.rho, 0.05 - 1e-5), rtol=1e-6, atol=0)
        layer.rho.data.fill_(1e-4)
        assert std(layer.rho).min() > 0.99e-8  # zero in float16
        assert layer.kl().isfinite()


@TWO
def test_a_float64_model_stays_float64(architecture: Architecture, tmp_path: Path) -> None:
    built_in = scatter(get_peft_model(architecture.build().double(), architecture.config()))
    cast = blob(architecture).double()
    for model in (built_in, cast):
        assert_adapter_is(torch.float64, model)
        optimizer = train_a_step(model, architecture)
        assert_adapter_is(torch.float64, model)
        assert all(
            optimizer.state[layer.rho]["exp_avg"].dtype == torch.float64 for layer in gaussian_layers(model).values()
        )
        model.eval()
        with draw(model):
            assert logits(model, architecture.inputs()).dtype == torch.float64
    before = {name: tensor.float() for name, tensor in adapter_state(built_in).items()}
    assert_same(adapter_state(built_in.float()), before)
    cast.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(architecture.build().double(), tmp_path)
    assert_same(adapter_state(loaded), adapter_state(cast))


def test_the_meta_device() -> None:
    inputs = {"input_ids": LLAMA.inputs()["input_ids"].to("meta")}
    model = blob(LLAMA).to(torch.bfloat16).eval()
    shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in adapter_state(model).items()}
    assert {dtype for _, dtype in shapes.values()} == {torch.float32}
    model.to("meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in adapter_state(model).items()} == shapes
    with draw(model):
        assert logits(model, inputs).shape == (3, 5, 64)
    model.to_empty(device="cpu")
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in adapter_state(model).items()} == shapes


def test_making_an_adapter_on_the_meta_device() -> None:
    with torch.device("meta"):
        base = BERT.build()
    model = get_peft_model(base, BERT.config())
    assert all(layer.rho.is_meta and layer.weight.is_meta for layer in gaussian_layers(model).values())
    assert len(gaussian_layers(model)) == BERT.layers
