"""A task's rows as a torch data set, and batches that record which rows they hold."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from bayestune.tasks import AnyRow, Task

ROW = "bayestune_row"
"""Key in a batch for the indices of its rows in the data set, so that errors can name the rows."""


class Examples(Dataset[tuple[int, dict[str, Any]]]):
    """Tokenized rows of a task, each with its index. `sha256` is the hash of their ids, tokens and labels.

    Raises:
        DataError: a row has no label, or the task cannot score it with `model`.
        TaskError: as `Task.examples`.
    """

    def __init__(self, task: Task, rows: Sequence[AnyRow], model: nn.Module) -> None:
        for row in rows:
            if row.target is None:
                raise row.fault(row.target_field, "nothing", "a label to train or evaluate on")
        self.ids = [row.id for row in rows]
        self._examples = task.examples(rows, model)
        content = json.dumps(self._examples, sort_keys=True)
        self.sha256 = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        self.lengths = [task.tokens(example) for example in self._examples]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self._examples[index]


class Collator:
    """`task.collate`, plus the row indices under the key `ROW`."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, items: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Tensor]:
        batch = self._task.collate([example for _, example in items])
        return {**batch, ROW: torch.tensor([index for index, _ in items])}
