"""Plain LoRA adapters to approximate, rows for them, and their Jacobians by automatic differentiation."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import jacrev

from bayestune.methods.laplace.linears import covered_linears
from bayestune.sampling.base import Substituted
from bayestune.tasks import Row, Task
from inference.cases import Letters, rows
from models import BERT, LLAMA, Architecture, scatter


def plain(architecture: Architecture = LLAMA, *, dtype: torch.dtype = torch.float64, **settings: Any) -> PeftModel:
    """A finished plain LoRA adapter with random A and B; in evaluation mode."""
    config = architecture.config(**settings)
    names = ("r", "lora_alpha", "target_modules", "task_type", "fan_in_fan_out", "modules_to_save")
    model = get_peft_model(architecture.build(), LoraConfig(**{name: getattr(config, name) for name in names}))
    return scatter(model.to(dtype)).eval()


def bert_with_head(dtype: torch.dtype = torch.float64) -> PeftModel:
    return plain(BERT, dtype=dtype, r=2, modules_to_save=["classifier"])


class Labels(Letters):
    """The letters of a question are its tokens; the answer is one of the three labels of a BERT with a head."""

    name = "labels"
    columns = 3

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Padded on the right."""
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(example["ids"]) for example in examples], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        self.forwards.append(len(batch["input_ids"]))
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def alike(count: int, letters: int) -> list[Row]:
    """Rows of `letters` letters and four choices each: no padding, no absent choices."""
    found = [row for row in rows(100) if len(row.question) >= letters][:count]
    choices = ("a", "b", "c", "d")
    return [
        Row(id=row.id, question=row.question[i % 2 :][:letters], choices=choices, answer=i % 3)
        for i, row in enumerate(found)
    ]


def one_batch(task: Task, questions: list[Row]) -> dict[str, Tensor]:
    return task.collate([task.example(row) for row in questions])


def jacobians(
    model: PeftModel, linears: Mapping[str, nn.Linear], task: Task, batch: dict[str, Tensor]
) -> dict[str, Tensor]:
    """d logits / d weight of each layer, [rows, classes, m, n], by `torch.func.jacrev`."""
    keys = {id(parameter): key for key, parameter in model.named_parameters()}
    names = {name: keys[id(linear.weight)] for name, linear in linears.items()}

    def logits(weights: dict[str, Tensor]) -> Tensor:
        return task.outputs(Substituted(model, {names[name]: weight for name, weight in weights.items()}), batch)

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # attention has no vmap rule
        found = jacrev(logits)({name: linear.weight.detach() for name, linear in linears.items()})
    assert isinstance(found, dict)
    return found


def curvature_of(jacobian: Tensor, probs: Tensor) -> Tensor:
    """The generalised Gauss-Newton block ``sum_rows J^T (diag p - p p^T) J``, dense, [m n, m n]."""
    flat = jacobian.flatten(2)
    middle = torch.diag_embed(probs) - probs.unsqueeze(2) * probs.unsqueeze(1)
    return torch.einsum("rcp,rcd,rdq->pq", flat, middle, flat)


def covered(model: PeftModel, layers: str = "all") -> dict[str, nn.Linear]:
    return covered_linears(model, layers=layers)
