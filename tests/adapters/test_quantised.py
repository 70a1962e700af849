"""Adapters on 8- and 4-bit bases: the same module serves them, since PEFT's layers call A and B the same way."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel, TorchAoConfig

from bayestune.adapters import drawn_weights, gaussian_layers, training_noise
from bayestune.inference.draws import draw
from bayestune.sampling.stacked import stacked_weights
from models import LLAMA, adapter_state, assert_same, logits, scatter

# 4-bit blocks hold 64 weights
SIZES = {"hidden_size": 64, "intermediate_size": 128}


def _int8() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="int8 bases need bitsandbytes: pip install '.[quant]'")
    return BitsAndBytesConfig(load_in_8bit=True)


def _nf4() -> BitsAndBytesConfig:
    pytest.importorskip("bitsandbytes", reason="nf4 bases need bitsandbytes: pip install '.[quant]'")
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)


def _torchao() -> TorchAoConfig:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="torchao bases need torchao: pip install '.[quant]'"
    )
    return TorchAoConfig(quantization.Int8WeightOnlyConfig())


KINDS = {"int8": (_int8, "Linear8bitLt"), "nf4": (_nf4, "Linear4bit"), "torchao": (_torchao, "TorchaoLoraLinear")}


@pytest.fixture(autouse=True)
def without_a_line_for_every_matrix(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="bitsandbytes")


@pytest.fixture(scope="module")
def saved_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    LLAMA.build(**SIZES).save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def base(request: pytest.FixtureRequest, saved_base: Path) -> tuple[Callable[[], PreTrainedModel], str]:
    """How to load a quantised base, and PEFT's name for its layers."""
    make_config, layer = KINDS[request.param]
    config = make_config()
    return lambda: LlamaForCausalLM.from_pretrained(saved_base, quantization_config=config, device_map="cpu"), layer


Base = tuple[Callable[[], PreTrainedModel], str]


def adapted(base: Base, **settings: str) -> PeftModel:
    model = scatter(get_peft_model(base[0](), LLAMA.config(**settings)))
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, LoraLayer)}
    assert kinds == {base[1]} and len(gaussian_layers(model)) == LLAMA.layers
    return model


@pytest.mark.property("N08")
@pytest.mark.parametrize("estimator", ["independent", "flipout_token"])
def test_training_on_a_quantised_base(base: Base, estimator: str) -> None:
    model = adapted(base, estimator=estimator).train()
    inputs = LLAMA.inputs()
    clock = training_noise(model)
    noisy = [logits(model, inputs) for _ in range(2)]
    assert not torch.allclose(*noisy, atol=1e-3)
    clock.micro = 0
    torch.testing.assert_close(logits(model, inputs), noisy[0], rtol=0, atol=0)

    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0
        else:
            assert not parameter.requires_grad


@pytest.mark.property("N08")
def test_draws_on_a_quantised_base(base: Base) -> None:
    model = adapted(base).eval()
    inputs = LLAMA.inputs()
    mean = logits(model, inputs)
    torch.testing.assert_close(logits(model, inputs), mean, rtol=0, atol=0)
    drawn = []
    for index in range(3):
        with draw(model, index=index):
            drawn.append(logits(model, inputs))
    assert not any(torch.allclose(one, mean, atol=1e-3) for one in drawn)
    assert not torch.allclose(drawn[0], drawn[1], atol=1e-3)
    with draw(model, index=2):
        torch.testing.assert_close(logits(model, inputs), drawn[2], rtol=0, atol=0)
    repeated = {name: tensor.repeat(3, 1) for name, tensor in inputs.items()}
    with drawn_weights(stacked_weights(model, range(3), seed=0)):
        # int8 rounds activations to 8 bits, so a difference in the last bit of float32 can become a step of 1/127
        bound = 1 / 127 if base[1] == "Linear8bitLt" else 1e-5
        torch.testing.assert_close(logits(model, repeated), torch.cat(drawn), rtol=0, atol=bound)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), logits(base[0]().eval(), inputs), rtol=0, atol=0)


@pytest.mark.property("P01")
def test_saved_and_loaded_on_a_quantised_base(base: Base, tmp_path: Path) -> None:
    model = adapted(base).eval()
    inputs = LLAMA.inputs()
    expected = logits(model, inputs)
    model.save_pretrained(tmp_path)
    for settings in ({}, {"low_cpu_mem_usage": True}, {"autocast_adapter_dtype": False}):
        loaded = PeftModel.from_pretrained(base[0](), tmp_path, **settings)
        assert_same(adapter_state(loaded), adapter_state(model))
        assert {tensor.dtype for tensor in adapter_state(loaded).values()} == {torch.float32}
        torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)


@pytest.mark.property("N01")
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_half_compute_around_a_quantised_base(saved_base: Path, cast: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes", reason="nf4 bases need bitsandbytes: pip install '.[quant]'")
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=cast)
    base = LlamaForCausalLM.from_pretrained(saved_base, quantization_config=config, dtype=cast, device_map="cpu")
    model = scatter(get_peft_model(base, LLAMA.config(), autocast_adapter_dtype=False)).train()
    model(**LLAMA.inputs()).logits.float().square().mean().backward()
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            assert parameter.dtype == parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
