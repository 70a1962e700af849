"""Posteriors on 8- and 4-bit bases: packed weights cannot be sampled, the others still tell one base from another."""

import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel, TorchAoConfig

from bayestune.errors import PosteriorError
from bayestune.inference.draws import draw
from bayestune.methods import load_posterior, save_posterior
from bayestune.serving.lora import export_lora
from models import LLAMA, logits, scatter

SIZES = {"hidden_size": 64, "intermediate_size": 128}  # 4-bit blocks hold 64 weights


def load_base(kind: str, folder: Path) -> PreTrainedModel:
    if kind == "torchao":
        config = TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    else:
        pytest.importorskip("bitsandbytes")
        config = BitsAndBytesConfig(load_in_8bit=kind == "int8", load_in_4bit=kind == "nf4")
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()


@pytest.mark.property("P01")
@pytest.mark.parametrize("kind", ["int8", "nf4", "torchao"])
def test_P6_a_posterior_on_a_quantised_base(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    caplog.set_level(logging.ERROR, logger="bitsandbytes")
    for seed in (0, 1):
        LLAMA.build(seed, **SIZES).save_pretrained(tmp_path / f"base_{seed}")
    inputs = LLAMA.inputs()
    model = scatter(get_peft_model(load_base(kind, tmp_path / "base_0"), LLAMA.config())).eval()
    mean = logits(model, inputs)
    with draw(model, index=1):
        drawn = logits(model, inputs)
    save_posterior(model, tmp_path / "p")
    folders = export_lora(model, tmp_path / "e", draws=2)

    loaded = load_posterior(load_base(kind, tmp_path / "base_0"), tmp_path / "p")
    assert torch.equal(logits(loaded, inputs), mean)
    with draw(loaded, index=1):
        assert torch.equal(logits(loaded, inputs), drawn)
    plain = PeftModel.from_pretrained(load_base(kind, tmp_path / "base_0"), folders[2])
    assert torch.equal(logits(plain, inputs), drawn)

    load_posterior(LLAMA.build(**SIZES), tmp_path / "p")  # the same base, not quantised
    for other in (load_base(kind, tmp_path / "base_1"), LLAMA.build(1, **SIZES)):
        with pytest.raises(PosteriorError, match="parameters have other values, the first is"):
            load_posterior(other, tmp_path / "p")
