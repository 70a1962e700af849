"""The order of training rows: rows of similar length together, so that little of a batch is padding."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from bayestune.functional import derive_seed

POOL = 50
"""Batches that are drawn at random before being sorted by length: fewer would pad more, more would mix less."""


class LengthGrouped(Sampler[int]):
    """A random order of the rows, in batches of similar length.

    Each epoch the rows are permuted, sorted by length within pools of `POOL` batches, cut into batches, and the whole
    batches shuffled; a last batch that is not full stays last. A pure function of (`seed`, epoch, `lengths`), so that
    a resumed run sees the same order; it is over places, so a shuffled file gives another one.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = list(lengths), batch_size, seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (from 0) that the next iteration is of."""
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
            part = sorted(order[start : start + pool], key=self._lengths.__getitem__)
            batches += [part[i : i + self._batch_size] for i in range(0, len(part), self._batch_size)]
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[number]
        yield from rest
