"""TRL's `RewardTrainer` with `KLCallback`, and `BayesTrainer` with a `Preference` task, train the same posterior."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import GPT2Config, GPT2ForSequenceClassification

import bayestune as bt
from bayestune.adapters import training_noise
from bayestune.tasks import DatasetSpec, Preference, PreferenceRow
from bayestune.training import BayesTrainer, KLSettings
from models import scatter
from toys import byte_tokenizer
from training.by_trl import train_by_trl
from training.toys import arguments, trained

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")

ROWS = [
    PreferenceRow(id=str(i), prompt=f"The {thing} is ", chosen=right, rejected=wrong)
    for i, (thing, right, wrong) in enumerate(
        [("cup", "red", "a cup"), ("hat", "green, I see", "blue"), ("door", "black", "not"), ("leaf", "wet", "iron")]
    )
]
SETTINGS: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
SETTINGS |= {"train_sampling_strategy": "sequential", "learning_rate": 1e-3}
KL = KLSettings(cycle=4, learning_rate=0.01)


def reward_model(tokenizer: Any) -> PeftModel:
    """A posterior over a tiny GPT-2 with a scalar head, in float64, every parameter away from its start."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=64, num_labels=1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        base = GPT2ForSequenceClassification(config)
        blob = bt.BlobConfig(
            r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, modules_to_save=["score"]
        )
        model = get_peft_model(base, blob)  # type: ignore[arg-type]
    assert isinstance(model, PeftModel)
    return scatter(model).double().train()


def fields() -> Iterator[dict[str, str]]:
    return ({"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected} for row in ROWS)


@pytest.mark.filterwarnings("ignore")  # those of TRL and datasets
def test_both_trainers_make_the_same_updates(tmp_path: Path) -> None:
    """Eight updates of two micro-batches of one pair, whose two texts share one draw of the weights, in float64."""
    from trl import RewardConfig, RewardTrainer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    ours, theirs = reward_model(tokenizer), reward_model(tokenizer)
    before = trained(ours)
    spec = DatasetSpec(name="pairs", folder="pairs", row=PreferenceRow, classes=2)
    task = Preference(spec, tokenizer, data=None, max_tokens=60)
    BayesTrainer(ours, task=task, args=arguments(tmp_path, **SETTINGS), train_rows=ROWS, kl=KL).train()

    training_noise(theirs).rows = 1
    train_by_trl(RewardTrainer, RewardConfig, theirs, tmp_path, fields, SETTINGS, KL, processing_class=tokenizer)

    expected = trained(theirs)
    for name, value in trained(ours).items():
        assert (value - expected[name]).abs().max().item() <= 1e-12, name
        assert (value - before[name]).abs().max().item() > 1e-3, name
