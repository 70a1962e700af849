"""`predict`: predict rows with the draws of a posterior, several draws in one forward."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayestune.errors import ConfigError, DataError, DrawError, PosteriorError
from bayestune.inference.draws import evaluation_mode
from bayestune.sampling.base import Posterior, Sampler
from bayestune.sampling.stacked import StackedDraws
from bayestune.tasks import AnyRow, Task
from bayestune.tasks.base import P


def predict(
    model: nn.Module | Posterior,
    task: Task[P],
    rows: Sequence[AnyRow],
    *,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> P:
    """Predict `rows` with `draws` draws of the posterior; ``draws=0`` predicts with its mean.

    For classes ``p(y|x) = 1/K sum_k softmax(outputs(x; theta_k) / T)``, with theta_k the draw (`seed`, k) and T the
    posterior's temperature (BLoB, section 3.4). A model with a BAYES_LORA adapter is its own posterior.

    Draws are stacked in the batch: on a GPU as many as fit in a quarter of the free memory, on a CPU as many as keep a
    forward within 2048 tokens. Draw k does not depend on `draws`, `batch_size` or the other rows. The model and the
    global random state are unchanged on return.

    Args:
        model: a posterior, or a model.
        task: the task of the rows.
        rows: at least one; labels are not needed.
        draws, seed: number and seed of the draws.
        batch_size: rows per forward, before draws are stacked.
        progress: show a bar on stderr.

    Returns:
        The prediction, of the type of the task; for classes a `Prediction`.

    Raises:
        ConfigError: `draws` or `batch_size` is out of range.
        DataError: there are no rows, or a row cannot be used or has a token without an embedding; names the row.
        TaskError, DrawError: the task does not fit the model, or the posterior has no such draws, as plain LoRA.
        PosteriorError: the model's outputs are not finite; names the row.
    """
    outputs, temperature = draw_outputs(
        model, task, rows, draws=draws, seed=seed, batch_size=batch_size, progress=progress
    )
    return task.prediction(outputs, rows, draws=draws, seed=seed, temperature=temperature)


def draw_outputs(
    model: nn.Module | Posterior,
    task: Task[Any],
    rows: Sequence[AnyRow],
    *,
    draws: int,
    seed: int,
    batch_size: int,
    progress: bool = False,
) -> tuple[Float[Tensor, "slices rows columns"], float]:
    """Return the task's outputs of every draw, float64 on the CPU, and the posterior's temperature; see `predict`."""
    if draws < 0 or batch_size < 1:
        raise ConfigError(f"predict: found draws={draws}, batch_size={batch_size}, expected at least 0 and 1.")
    if not rows:
        raise DataError("predict: found no rows, expected at least one.")
    module, temperature = (model.model, model.temperature) if isinstance(model, Posterior) else (model, 1.0)
    with evaluation_mode(module):
        sampler = (
            model.sampler(draws=draws, seed=seed)
            if isinstance(model, Posterior)
            else StackedDraws.of(module, draws=draws, seed=seed)
        )
        with torch.inference_mode(not sampler.gradients):
            return _outputs(sampler, module, task, rows, batch_size, progress), temperature


def _outputs(
    sampler: Sampler, module: nn.Module, task: Task[Any], rows: Sequence[AnyRow], batch_size: int, progress: bool
) -> Tensor:
    """Return the outputs of every draw, [slices, rows, columns], in float64; the longest rows are computed first."""
    examples = task.examples(rows, module)
    longest_first = sorted(range(len(rows)), key=lambda i: -task.tokens(examples[i]))
    todo = [longest_first[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    device = next(module.parameters()).device
    outputs = torch.empty(sampler.slices, len(rows), task.columns, dtype=torch.float64)
    with tqdm(total=len(rows), desc="predict", unit="row", disable=not progress) as bar:
        while todo:
            places = todo.pop(0)
            batch = {key: t.to(device) for key, t in task.collate([examples[i] for i in places]).items()}
            found = _outputs_or_split(sampler, task, batch)
            if found is None:
                half = len(places) // 2
                todo[:0] = [places[:half], places[half:]]
                continue
            outputs[:, places] = _finite(found.detach().double().cpu(), [rows[i].id for i in places])
            bar.update(len(places))
    return outputs


def _finite(outputs: Tensor, ids: Sequence[str]) -> Tensor:
    """Return the outputs [slices, rows, columns], or raise an error that names the first row without usable ones."""
    bad = (outputs.isnan() | outputs.isposinf()).any(-1) | outputs.isneginf().all(-1)
    if bad.any():
        row = ids[int(bad.any(0).nonzero()[0, 0])]
        raise PosteriorError(
            f"predict: the outputs of row {row!r} are not finite ({int(bad.any(0).sum())} such rows in its batch): "
            "the adapter's weights, or the precision, are too large or too small for this model."
        )
    return outputs


def _outputs_or_split(sampler: Sampler, task: Task, batch: dict[str, Tensor]) -> Tensor | None:
    """Return the outputs [slices, rows, columns] of a batch; None if one draw of it does not fit in memory."""
    at_once = min(sampler.slices, sampler.at_once(batch))
    while True:
        try:
            return torch.cat([sampler.outputs(task, batch, part) for part in _parts(sampler.slices, at_once)])
        except DrawError:
            if at_once == 1:
                raise
            at_once = 1  # stacked draws cannot be separated in a layer whose input is not ordered by rows
        except torch.OutOfMemoryError as error:
            if at_once > 1:
                at_once = at_once // 2
            elif len(batch["input_ids"]) > 1:
                return None
            else:
                raise torch.OutOfMemoryError(
                    f"predict: one row at one draw does not fit into the memory of {batch['input_ids'].device} "
                    f"({batch['input_ids'].numel()} tokens): use a larger device or shorter rows."
                ) from error


def _parts(draws: int, at_once: int) -> Iterator[range]:
    return (range(start, min(start + at_once, draws)) for start in range(0, draws, at_once))
