"""Tasks small enough to see through, and rows for them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.tasks import AnyRow, ClassTask, Row

CLASSES = 4


class Letters(ClassTask):
    """The letters of a question are its tokens; the answer is one of four tokens. A row may have fewer choices."""

    name = "letters"
    columns = CLASSES

    def __init__(self) -> None:
        self.forwards: list[int] = []

    def example(self, row: AnyRow) -> dict[str, Any]:
        assert isinstance(row, Row)
        return {"ids": [8 + ord(letter) % 50 for letter in row.question], "choices": len(row.choices)}

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["ids"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        width = max(len(example["ids"]) for example in examples)
        ids = torch.tensor([[0] * (width - len(example["ids"])) + example["ids"] for example in examples])
        mask = (ids > 0).long()
        present = torch.arange(CLASSES) < torch.tensor([[example["choices"]] for example in examples])
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
            "present": present,
        }

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        self.forwards.append(len(batch["input_ids"]))
        inputs = {name: tensor for name, tensor in batch.items() if name != "present"}
        logits = model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, 4 : 4 + CLASSES]
        return logits.masked_fill(~batch["present"], -torch.inf)


class Sequences(Letters):
    """The same with one sequence a choice, [rows, choices, tokens], flattened for the model."""

    name = "sequences"

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        flat = {key: value.unsqueeze(1).repeat(1, CLASSES, 1) for key, value in super().collate(examples).items()}
        flat["input_ids"][:, :, -1] = torch.tensor([4, 4, 6, 7])  # the first two choices are the same sequence
        return flat

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        self.forwards.append(len(batch["input_ids"]))
        inputs = {name: tensor.flatten(0, 1) for name, tensor in batch.items() if name != "present"}
        return model(**inputs, use_cache=False).logits[:, -1, 5].unflatten(0, (-1, CLASSES))


class Fixed(Letters):
    """Logits that are given, one row after the other, the same for every draw."""

    name = "fixed"

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table
        self.columns = table.shape[1]

    def example(self, row: AnyRow) -> dict[str, Any]:
        return {"ids": [int(row.id)]}

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        return {"input_ids": torch.tensor([example["ids"] for example in examples])}

    def outputs(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        self.forwards.append(len(batch["input_ids"]))
        return self.table[batch["input_ids"][:, 0]]


_WORDS = "why is the sky blue and what do fish eat when rain falls on old stone walls".split()


def rows(count: int) -> list[Row]:
    """Questions of 2 to 11 letters, with 2 to 4 choices."""
    return [
        Row(
            id=f"r{i}",
            question=_WORDS[i % 16] + _WORDS[(i * i + 3) % 16],
            choices=("a", "b", "c", "d")[: 2 + i % 3],
            answer=i % 2,
        )
        for i in range(count)
    ]
