"""Out-of-memory back-off: the update restarts with smaller forwards, as if it had not been tried.

The gradients of the failed attempt are discarded, and torch's generators and the training noise go back to the first
micro-batch of the update. The rows of the update, its normalization, the number of updates, the learning rate and the
KL do not change. For plain LoRA without dropout the result equals, up to rounding, that of a run with the smaller
micro-batches from the start; noise and masks are drawn per micro-batch.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import TrainingArguments

from bayestune.errors import BayestuneWarning, TrainingError
from bayestune.tasks import Task
from bayestune.training.batches import ROW


class BackOff:
    """Runs the micro-batches of an update on as many rows at once as memory allows.

    Attributes:
        rows_at_once: rows per forward: at first the size of a micro-batch, halved each time memory runs out.
    """

    def __init__(
        self, args: TrainingArguments, ids: Sequence[str], batch_of: Callable[[Sequence[int]], dict[str, Any]]
    ) -> None:
        self.rows_at_once = args.per_device_train_batch_size
        self._args, self._ids, self._batch_of = args, ids, batch_of
        self._gpus = [args.device] if args.device.type == "cuda" else []
        self.start_update()

    def start_update(self) -> None:
        """Start a new update."""
        self._batches: list[dict[str, Any]] = []
        self._loss: Tensor | float = 0.0  # of the batches that are done
        self._generators: list[Tensor] = []

    @property
    def rows(self) -> list[int]:
        """Return the indices of the rows that the update has run so far."""
        return [int(row) for batch in self._batches for row in batch[ROW]]

    def run(
        self,
        batch: dict[str, Any],
        forward: Callable[[dict[str, Any]], Tensor],
        undo: Callable[[], None],
        *,
        step: int,
        shared: bool,
    ) -> Tensor:
        """Run the next micro-batch of the update, and return its loss.

        Args:
            batch: the micro-batch.
            forward: runs forward and backward of some rows and returns their share of the loss.
            undo: discards the gradients of the update and rewinds its noise.
            step: index of the update, for messages.
            shared: whether other processes would have to do the same.

        Raises:
            TrainingError: memory ran out with one row, or in one of several processes.
        """
        if not self._batches:
            self._generators = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, self._gpus)]
        self._batches.append(batch)
        todo, before = [batch], 0.0
        while True:
            losses, rows = [], batch
            try:
                for rows in self._split(todo):
                    losses.append(forward(rows))
                break
            except torch.OutOfMemoryError as error:
                self._halve(rows[ROW], error, step, shared)
            # Here, not above: the error holds the tensors of the failed forward until its handler ends.
            undo()
            torch.set_rng_state(self._generators[0])
            for state, device in zip(self._generators[1:], self._gpus, strict=True):
                torch.cuda.set_rng_state(state, device)
            todo, before = self._batches, self._loss
        loss = torch.stack(losses).sum() - before
        self._loss = self._loss + loss
        return loss

    def _split(self, batches: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Yield batches of at most `rows_at_once` rows; batches that are split are padded anew."""
        for batch in batches:
            if len(batch[ROW]) <= self.rows_at_once:
                yield batch
            else:
                yield from (self._batch_of(rows.tolist()) for rows in batch[ROW].split(self.rows_at_once))

    def _halve(self, index: Tensor, error: torch.OutOfMemoryError, step: int, shared: bool) -> None:
        """Halve `rows_at_once` after a forward of the rows `index` failed, or raise an error if that cannot help."""
        where = f"step {step}: memory ran out on {self._args.device}"
        if shared:
            raise TrainingError(
                f"{where} in micro-batch {len(self._batches)} of the update, process {self._args.process_index} of "
                f"{self._args.world_size}: it cannot split its batch, as the others would wait for it. "
                "Nothing was updated; give a smaller batch size, and more processes or accumulation steps."
            ) from error
        if len(index) == 1:
            raise TrainingError(
                f"{where} with one row per forward, {self._ids[int(index[0])]!r}. Nothing was updated; use shorter "
                "rows, fewer train_draws, gradient checkpointing, bf16, or a larger device."
            ) from error
        before, self.rows_at_once = self.rows_at_once, self.rows_at_once // 2
        warnings.warn(
            f"{where} with {before} rows per forward: this and later updates use {self.rows_at_once}; the rows per "
            "update do not change.",
            BayestuneWarning,
            stacklevel=3,
        )


def outputs_in_parts(task: Task, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
    """Return `task.outputs`, computed in halves if memory runs out, since rows do not depend on each other.

    Raises:
        TrainingError: one row alone does not fit.
    """
    rows = len(batch["labels"])
    try:
        return task.outputs(model, batch)
    except torch.OutOfMemoryError as error:
        if rows == 1:
            raise TrainingError(
                f"evaluation: memory ran out on {batch['labels'].device} with one row. The training state is as the "
                "last update left it; use shorter evaluation rows, bf16, or a larger device."
            ) from error
    halves = [{name: tensor.tensor_split(2)[half] for name, tensor in batch.items()} for half in (0, 1)]
    return torch.cat([outputs_in_parts(task, model, half) for half in halves])
