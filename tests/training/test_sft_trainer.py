"""TRL's `SFTTrainer` with `KLCallback`, and `BayesTrainer` with a `generation` task, train the same posterior."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from bayestune.tasks import DatasetSpec
from bayestune.tasks.generation import GenerationTask
from bayestune.tasks.prompted import PromptRow
from bayestune.training import BayesTrainer, KLSettings
from models import LLAMA, scatter
from toys import byte_tokenizer
from training.by_trl import train_by_trl
from training.toys import arguments, trained

pytestmark = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")

ROWS = [
    PromptRow(id=thing, prompt=f"What color is the {thing}?", answer=f" {color}")
    for thing, color in {"cup": "red", "hat": "dark green", "door": "blue", "leaf": "wet"}.items()
]
SETTINGS: dict[str, Any] = {"max_steps": 8, "per_device_train_batch_size": 1}
SETTINGS |= {"train_sampling_strategy": "sequential", "learning_rate": 1e-3}
KL = KLSettings(cycle=4, learning_rate=0.01)


def writer(tokenizer: Any) -> PeftModel:
    """A posterior over a tiny Llama in float64, every parameter away from its start."""
    own = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    base = LLAMA.build(vocab_size=len(tokenizer), initializer_range=0.3, **own)
    return scatter(get_peft_model(base, LLAMA.config())).double().train()


def fields() -> Iterator[dict[str, str | None]]:
    return ({"prompt": str(row.prompt), "completion": row.answer} for row in ROWS)


def summed(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """The negative log-likelihood of the answer of the one row, its tokens added up."""
    return cross_entropy(outputs.logits[0, :-1], labels[0, 1:], reduction="sum")


@pytest.mark.filterwarnings("ignore")  # those of TRL and datasets
def test_with_tokens_added_up_both_trainers_make_the_same_updates(tmp_path: Path) -> None:
    """Eight updates of one row, whose answers have 5 to 12 tokens, in float64."""
    from trl import SFTConfig, SFTTrainer

    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    ours, theirs = writer(tokenizer), writer(tokenizer)
    before = trained(ours)
    spec = DatasetSpec(name="colors", folder="colors", row=PromptRow, classes=1)
    task = GenerationTask(spec, tokenizer, data=None, max_tokens=60)
    BayesTrainer(ours, task=task, args=arguments(tmp_path, **SETTINGS), train_rows=ROWS, kl=KL).train()

    own = {"processing_class": tokenizer, "compute_loss_func": summed}
    train_by_trl(SFTTrainer, SFTConfig, theirs, tmp_path, fields, SETTINGS, KL, **own)

    expected = trained(theirs)
    for name, value in trained(ours).items():
        assert (value - expected[name]).abs().max().item() <= 1e-12, name
        assert (value - before[name]).abs().max().item() > 1e-3, name
