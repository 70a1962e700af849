"""Bases that accelerate dispatches: layers on devices of their own are trained and asked, offloaded ones refused."""

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

import bayestune as bt
from bayestune.errors import ConfigError
from bayestune.training import BayesTrainer, KLSettings
from models import LLAMA, scatter
from training.toys import TASK, arguments, rows, trained


def blob(base: PreTrainedModel) -> PeftModel:
    return scatter(get_peft_model(base, LLAMA.config()))


def test_a_dispatched_base_predicts_and_trains_as_a_plain_one(tmp_path: Path) -> None:
    """Every module has the hooks that move inputs, to the one device there is."""
    plain, base = blob(LLAMA.build()), LLAMA.build()
    dispatch_model(base, {"": "cpu"}, main_device="cpu", force_hooks=True)
    dispatched = blob(base)
    found = []
    for model in (plain, dispatched):
        BayesTrainer(
            model, task=TASK, args=arguments(tmp_path, max_steps=4), train_rows=rows(8), kl=KLSettings(cycle=4)
        ).train()
        found.append((trained(model), bt.predict(model, TASK, rows(6), draws=3).probs))
    assert torch.equal(found[0][1], found[1][1])
    assert all(torch.equal(value, found[1][0][name]) for name, value in found[0][0].items())


def test_adapters_of_layers_on_disk_are_refused(tmp_path: Path) -> None:
    base = LLAMA.build()
    base.save_pretrained(tmp_path / "base")
    bt.save_posterior(blob(base), tmp_path / "posterior")
    places = {f"model.{part}": "cpu" for part in ("embed_tokens", "norm", "rotary_emb", "layers.0")}
    places |= {"lm_head": "cpu", "model.layers.1": "disk"}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "off")
    )
    with pytest.raises(ConfigError, match=r"found model\.layers\.1\..* without memory, .* without 'disk'"):
        bt.load_posterior(offloaded, tmp_path / "posterior")
