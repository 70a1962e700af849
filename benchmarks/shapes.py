"""Models and batches of realistic shape with random weights, by names such as "llama-1x100" or "minilm-8x4x64".

    <model>-<rows>x<tokens>            one sequence per row
    <model>-<rows>x<choices>x<tokens>  one sequence per choice (encoders)

llama    4 layers of width 512, 8 heads, a vocabulary of 32,000, float32; q_proj, v_proj and lm_head are adapted
llama7b  the shape of Llama-2-7B, bfloat16; the same layers are adapted
minilm   the packaged MiniLM (6 layers of width 384); query and value are adapted, and the head is new
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForMultipleChoice,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from bayestune import BlobConfig
from bayestune.functional import derive_seed
from bayestune.packaged import model_source
from bayestune.tasks import AnyRow, ClassTask, TextRow
from bayestune.tasks.tensors import labels_of, widen

CLASSES = 4
RANK, ALPHA = 8, 16
_LLAMA = LlamaConfig(
    hidden_size=512, intermediate_size=1376, num_hidden_layers=4, num_attention_heads=8, vocab_size=32_000
)
_LLAMA7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32_000
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One of the shapes in the module docstring; `choices` is None for one sequence per row."""

    name: str
    model: str
    rows: int
    choices: int | None
    tokens: int

    @classmethod
    def of(cls, name: str) -> "Shape":
        model, _, sizes = name.partition("-")
        found = [int(size) if size.isdecimal() else 0 for size in sizes.split("x")]
        if model not in ("llama", "llama7b", "minilm") or len(found) not in (2, 3) or min(found) < 1:
            raise SystemExit(f"--shape: found {name!r}, expected such as llama-1x100, minilm-8x4x64 or llama7b-4x300")
        choices = found[1] if len(found) == 3 else None
        if choices is not None and model != "minilm":
            raise SystemExit(f"--shape: found choices in {name!r}, expected them for minilm only")
        return cls(name=name, model=model, rows=found[0], choices=choices, tokens=found[-1])

    @property
    def causal(self) -> bool:
        return self.model != "minilm"

    def base(self, device: str) -> PreTrainedModel:
        """Return a model with the same weights in every call."""
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            if self.model == "llama":
                return LlamaForCausalLM(_LLAMA)
            if self.model == "llama7b":
                return LlamaForCausalLM._from_config(_LLAMA7B, dtype=torch.bfloat16)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            if self.choices is not None:
                return AutoModelForMultipleChoice.from_pretrained(model_source("minilm")).to(device)
            auto = AutoModelForSequenceClassification
            return auto.from_pretrained(model_source("minilm"), num_labels=CLASSES).to(device)

    def adapted(self, device: str, *, bayesian: bool) -> PeftModel:
        """Return plain LoRA or BLoB, with B different from 0."""
        targets = ["q_proj", "v_proj", "lm_head"] if self.causal else ["query", "value"]
        config = (BlobConfig if bayesian else LoraConfig)(
            r=RANK,
            lora_alpha=ALPHA,
            target_modules=targets,
            modules_to_save=None if self.causal else ["classifier"],
            task_type="CAUSAL_LM" if self.causal else None,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(self.base(device), config)
            assert isinstance(model, PeftModel)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.normal_(std=0.02)
        return model

    def batch(self, device: str) -> dict[str, Tensor]:
        """Return random tokens without padding, and labels."""
        shape = (self.rows, self.tokens) if self.choices is None else (self.rows, self.choices, self.tokens)
        generator = torch.Generator().manual_seed(0)
        classes = self.choices or CLASSES
        batch = {
            "input_ids": torch.randint(5, 30_000, shape, generator=generator),
            "attention_mask": torch.ones(shape, dtype=torch.long),
            "labels": torch.randint(classes, (self.rows,), generator=generator),
        }
        return {name: tensor.to(device) for name, tensor in batch.items()}


class Answers(ClassTask):
    """Classification by the logits of `CLASSES` tokens at the last position (causal) or of the head."""

    name = "benchmark"

    def __init__(self, shape: Shape) -> None:
        self.shape, self.columns = shape, shape.choices or CLASSES

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        if not self.shape.causal:
            return widen(model(**inputs).logits)
        return widen(model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, 10 : 10 + CLASSES])

    def whole_logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        """Return the same as `outputs`, but compute all logits at every position, as a plain loop does."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs, **({"use_cache": False} if self.shape.causal else {})).logits
        return widen(logits[:, -1, 10 : 10 + CLASSES] if self.shape.causal else logits)

    def example(self, row: AnyRow) -> dict[str, Any]:
        """Return random tokens seeded by the row's id, and its label."""
        assert isinstance(row, TextRow) and self.shape.choices is None
        generator = torch.Generator().manual_seed(derive_seed(row.id))
        tokens = torch.randint(5, 30_000, (self.shape.tokens,), generator=generator)
        return {"id": row.id, "label": row.label, "input_ids": tokens.tolist()}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids = torch.tensor([example["input_ids"] for example in examples])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **labels_of(examples)}

    def tokens(self, example: dict[str, Any]) -> int:
        return self.shape.tokens

    def train_rows(self, rows: int) -> list[AnyRow]:
        return [TextRow(id=f"row-{i}", text="benchmark", label=i % CLASSES) for i in range(rows)]
