"""A tiny task for tiny models, and trainers that record what they do."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import BitsAndBytesConfig, LlamaForCausalLM, TrainingArguments

from bayestune.tasks import AnyRow, ClassTask, Row
from bayestune.tasks.tensors import labels_of, pad, widen
from bayestune.training import BayesTrainer
from models import GPT2, LLAMA, scatter


class ToyTask(ClassTask):
    """The characters of a question are its tokens; the answer is one of four tokens."""

    name = "toy"
    columns = 4

    def __init__(self) -> None:
        self.max_tokens = 32

    def example(self, row: AnyRow) -> dict[str, Any]:
        assert isinstance(row, Row)
        return {"id": row.id, "ids": [8 + ord(letter) % 50 for letter in row.question], "label": row.target}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        sequences = [example["ids"] for example in examples]
        mask = pad([[1] * len(ids) for ids in sequences], 0, left=True)
        return {
            "input_ids": pad(sequences, 0, left=True),
            "attention_mask": mask,
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
            **labels_of(examples),
        }

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        return widen(model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, 4:8])

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["ids"])


TASK = ToyTask()
_WORDS = "why is the sky blue and what do the fish eat when rain falls on old stone walls".split()


def rows(count: int) -> list[Row]:
    """Questions of three to twelve letters with answers that follow from them."""
    return [
        Row(
            id=f"toy-{i}",
            question=_WORDS[i % 17] + " " + _WORDS[(i * i + 3) % 17],
            choices=("a", "b", "c", "d"),
            answer=(len(_WORDS[i % 17]) + i // 17) % 4,
        )
        for i in range(count)
    ]


def arguments(output: Path, **settings: Any) -> TrainingArguments:
    default = {
        "output_dir": str(output),
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-3,
        "max_steps": 1,
        "optim": "adamw_torch",
        "seed": 5,
    }
    return TrainingArguments(**{**default, **settings})


def double_blob(seed: int = 0, *, layers: int = 2, **settings: Any) -> PeftModel:
    """A posterior over a tiny GPT-2, every parameter away from its start.

    In float64 throughout, which Llama is not: its norms compute in float32 whatever the model's dtype.
    """
    return _adapted(GPT2.config(**settings), seed, layers)


def lora(seed: int = 0, **settings: Any) -> PeftModel:
    """Plain LoRA over the same tiny GPT-2, in float64, with B away from 0."""
    targets = list(GPT2.targets)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=True, **settings
    )
    return _adapted(config, seed, 2)


def blob_on_4_bits() -> PeftModel:
    """A posterior in float32 over a tiny Llama whose linear layers are nf4 blocks of bitsandbytes."""
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        LLAMA.build(hidden_size=64, intermediate_size=128).save_pretrained(folder)  # a block holds 64 weights
        base = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    return scatter(get_peft_model(base, LLAMA.config())).train()


def _adapted(config: LoraConfig, seed: int, layers: int) -> PeftModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # PEFT starts A from the global generator
        model = get_peft_model(GPT2.build(n_layer=layers), config)
    scatter(model, seed=seed)
    return model.double().train()


def trained(model: PeftModel) -> dict[str, Tensor]:
    """A copy of every trainable parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Micro:
    """One micro-batch as the trainer saw it."""

    inputs: dict[str, Tensor]
    rows: int
    random_state: Tensor
    step: int
    micro: int


class Recorder(BayesTrainer):
    """Keeps every micro-batch, and after the last one of each update the gradients and the parameters."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.micros: list[Micro] = []
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.before: list[dict[str, Tensor]] = []

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        clock = self._noise
        step, micro = (clock.step, clock.micro) if clock is not None else (0, 0)
        self.micros.append(Micro(dict(inputs), num_items_in_batch, torch.get_rng_state(), step, micro))
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.losses.append(loss.item())
        if self.accelerator.sync_gradients:
            named = [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]
            self.gradients.append({name: p.grad.clone() for name, p in named})
            self.before.append(trained(self.model))
        return loss
