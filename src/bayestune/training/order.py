"""The order of training rows: rows of similar length together, for less padding."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from bayestune.functional import derive_seed

POOL = 50
"""Batches per pool that is sorted by length: fewer would need more padding, more would mix rows less."""


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
        rest = order[len(order) - len(order) % self._batch_size :]
        order = order[: len(order) - len(rest)]
        pool = POOL * self._batch_size
        batches = []
        for start in range(0, len(order), pool):
            by_length = sorted(order[start : start + pool], key=self._lengths.__getitem__)
            batches += [by_length[i : i + self._batch_size] for i in range(0, len(by_length), self._batch_size)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from rest
