"""A task's rows as a torch data set, batches that record which rows they hold, and the order by length."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler

from bayestune.functional import derive_seed
from bayestune.tasks import AnyRow, Task

ROW = "bayestune_row"
"""Key in a batch for the indices of its rows in the data set, so that errors can name the rows."""

POOL = 50
"""Batches per pool that is sorted by length: fewer would need more padding, more would mix rows less."""


class Examples(Dataset[tuple[int, dict[str, Any]]]):
    """Tokenized rows of a task, each with its index. `sha256` is the hash of their ids, tokens and labels.

    Raises:
        DataError: a row has no label, or the task cannot score it with `model`.
        TaskError: as `Task.examples`.
    """

    def __init__(self, task: Task, rows: Sequence[AnyRow], model: nn.Module) -> None:
        for row in rows:
            if task.target(row) is None:
                raise row.fault(row.target_field, "nothing", "a label to train or evaluate on")
        self._task, self.ids = task, [row.id for row in rows]
        self._examples = task.examples(rows, model)
        content = json.dumps([task.identity(example) for example in self._examples], sort_keys=True)
        self.sha256 = hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()
        self.lengths = [task.tokens(example) for example in self._examples]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self._examples[index]

    def collate(self, items: Sequence[tuple[int, dict[str, Any]]]) -> dict[str, Tensor]:
        """Like `Task.collate`, plus the row indices under the key `ROW`."""
        batch = self._task.collate([example for _, example in items])
        return {**batch, ROW: torch.tensor([index for index, _ in items])}

    def batch(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """Return the batch of these rows."""
        return self.collate([self[row] for row in rows])


class LengthGrouped(Sampler[int]):
    """Samples rows in random order, in batches of similar length.

    Each epoch the rows are permuted, sorted by length within pools of `POOL` batches, cut into batches, and the full
    batches are shuffled; a last batch that is not full stays last. The order is a pure function of (`seed`, epoch,
    `lengths`), so a resumed run sees the same one.

    Args:
        lengths: tokens of each row.
        batch_size: rows per update, over all processes.
        seed: seed of the order.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = list(lengths), batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch (from 0) of the next iteration."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(derive_seed("order", self._seed, self._epoch))
        order = torch.randperm(len(self._lengths), generator=generator).tolist()
        size, full = self._batch_size, len(order) - len(order) % self._batch_size
        batches = []
        for start in range(0, full, POOL * size):
            pool = sorted(order[start : min(start + POOL * size, full)], key=self._lengths.__getitem__)
            batches += [pool[i : i + size] for i in range(0, len(pool), size)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from order[full:]
