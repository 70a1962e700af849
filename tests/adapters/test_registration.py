"""The PEFT type "BAYES_LORA": a whole member of PEFT's enumeration, and what happens without bayestune."""

import copy
import importlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftType, get_peft_config
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

import bayestune
from bayestune.adapters import BayesLoraConfig, BayesLoraModel, BlobConfig, registration
from bayestune.errors import ConfigError
from models import LLAMA, blob, logits


def test_the_type_is_a_whole_member() -> None:
    member = PeftType("BAYES_LORA")
    assert member is PeftType.BAYES_LORA is PeftType["BAYES_LORA"] is registration.BAYES_LORA
    assert isinstance(member, PeftType) and member == "BAYES_LORA"
    assert (member.name, member.value) == ("BAYES_LORA", "BAYES_LORA")
    assert [each for each in PeftType if each.value == "BAYES_LORA"] == [member]
    assert list(PeftType)[-1] is member and len(set(PeftType)) == len(list(PeftType)) == len(PeftType)
    assert repr(member) == "<PeftType.BAYES_LORA: 'BAYES_LORA'>"
    assert {member: 1}["BAYES_LORA"] == 1 and member != PeftType.LORA
    assert pickle.loads(pickle.dumps(member)) is copy.deepcopy(member) is copy.copy(member) is member
    assert json.loads(json.dumps({"peft_type": member})) == {"peft_type": "BAYES_LORA"}
    with pytest.raises(ValueError, match="not a valid PeftType"):
        PeftType("BLUB")


def test_peft_knows_the_method() -> None:
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BAYES_LORA] is BayesLoraConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[PeftType.BAYES_LORA] is BayesLoraModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.BAYES_LORA] == "lora_"
    config = get_peft_config({"peft_type": "BAYES_LORA", "r": 3, "prior_std": 0.5})
    assert isinstance(config, BayesLoraConfig) and (config.r, config.prior_std) == (3, 0.5)
    assert isinstance(PeftConfig.from_peft_type(peft_type="BAYES_LORA", r=3), BayesLoraConfig)


def test_blob_config_is_the_gaussian_over_a(tmp_path: Path) -> None:
    config = BlobConfig(r=3, prior_std=0.5)
    assert isinstance(config, BayesLoraConfig) and config.to_dict() == BayesLoraConfig(r=3, prior_std=0.5).to_dict()
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is BayesLoraConfig and (loaded.r, loaded.prior_std) == (3, 0.5)
    with pytest.raises(ConfigError, match="BlobConfig distribution: found 'gaussian_ab', expected 'gaussian_a'"):
        BlobConfig(distribution="gaussian_ab")


def test_importing_again_changes_nothing() -> None:
    before = list(PeftType)
    assert importlib.reload(bayestune) is bayestune
    assert bayestune.BayesLoraConfig is BayesLoraConfig is PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.BAYES_LORA]
    assert list(PeftType) == before


def test_a_peft_that_has_the_type_already_is_refused() -> None:
    before = list(PeftType)
    with pytest.raises(ImportError, match="already has a method named BAYES_LORA.*install a peft version in"):
        registration._add_member()
    assert list(PeftType) == before and PeftType("BAYES_LORA") is registration.BAYES_LORA


_FRESH_PROCESS = """
import json, sys
import torch
from peft import PeftConfig, PeftModel
from transformers import LlamaForCausalLM

torch.set_num_threads(1)
folder, ids = sys.argv[1], torch.tensor(json.loads(sys.argv[2]))
assert not any(name.startswith("bayestune") for name in sys.modules)
errors = []
for load in (PeftConfig.from_pretrained, lambda path: PeftModel.from_pretrained(base(), path)):
    base = lambda: LlamaForCausalLM.from_pretrained(folder + "/base")
    try:
        load(folder + "/posterior")
    except KeyError as error:
        errors.append(str(error))

card = open(folder + "/posterior/README.md", encoding="utf-8").read()
code = card.split("```python")[-1].split("```")[0].replace("this/folder", folder + "/posterior")
scope = {"base_model": base()}
exec(code, scope)  # what the card says to do
with torch.no_grad():
    logits = scope["model"](input_ids=ids).logits
print(json.dumps([errors, logits.tolist()]))
"""


@pytest.mark.property("P01")
def test_without_bayestune_the_card_says_what_to_do(tmp_path: Path) -> None:
    model = blob(LLAMA).eval()
    model.save_pretrained(tmp_path / "posterior")
    LLAMA.build().save_pretrained(tmp_path / "base")
    ids = LLAMA.inputs()["input_ids"]
    source = Path(bayestune.__file__).parents[1]
    result = subprocess.run(
        [sys.executable, "-c", _FRESH_PROCESS, str(tmp_path), json.dumps(ids.tolist())],
        env={**os.environ, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    errors, found = json.loads(result.stdout.splitlines()[-1])
    assert errors == ["'BAYES_LORA'", "'BAYES_LORA'"]
    torch.testing.assert_close(torch.tensor(found), logits(model, {"input_ids": ids}), rtol=0, atol=0)
