"""`predict`: probabilities averaged over draws, several draws in one forward."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayestune.errors import ConfigError, DataError, DrawError, PosteriorError
from bayestune.inference.draws import evaluation_mode
from bayestune.sampling.base import Posterior, Sampler
from bayestune.sampling.stacked import StackedDraws
from bayestune.tasks import AnyRow, Task


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Answers of a posterior to some rows. Probabilities sum to 1 over the classes; entropies are in nats.

    Attributes:
        ids: the rows' ids, in the order given.
        draw_log_probs: log p(class | row, draw k), float64 on the CPU; one slice, the mean's, when `draws` is 0.
        labels: the right classes, or None if some row has none.
        draws, seed, task: how the answers were made.
    """

    ids: tuple[str, ...]
    draw_log_probs: Float[Tensor, "slices rows classes"]
    labels: Int[Tensor, " rows"] | None
    draws: int
    seed: int
    task: str

    def first(self, draws: int) -> "Prediction":
        """The prediction with the first `draws` draws of this one.

        Raises:
            ConfigError: there are not so many.
        """
        if not 1 <= draws <= self.draws:
            raise ConfigError(f"first: found {draws} draws, expected 1 to {self.draws}, those of the prediction.")
        return dataclasses.replace(self, draw_log_probs=self.draw_log_probs[:draws], draws=draws)

    @property
    def log_probs(self) -> Float[Tensor, "rows classes"]:
        """The predictive ``log p(y|x) = logsumexp_k log p(y|x, theta_k) - log K`` (BLoB, arXiv 2406.11675)."""
        return self.draw_log_probs.logsumexp(0) - math.log(self.draw_log_probs.shape[0])

    @property
    def probs(self) -> Float[Tensor, "rows classes"]:
        """The predictive probabilities."""
        return self.log_probs.exp()

    @property
    def answer(self) -> Int[Tensor, " rows"]:
        """The most probable class of each row."""
        return self.log_probs.argmax(-1)

    @property
    def total(self) -> Float[Tensor, " rows"]:
        """Entropy of the predictive, ``H[p(y|x)]``."""
        return torch.special.entr(self.probs).sum(-1)

    @property
    def aleatoric(self) -> Float[Tensor, " rows"]:
        """Mean entropy of the draws, ``1/K sum_k H[p(y|x, theta_k)]``."""
        return torch.special.entr(self.draw_log_probs.exp()).sum(-1).mean(0)

    @property
    def epistemic(self) -> Float[Tensor, " rows"]:
        """Mutual information of answer and weights, ``total - aleatoric``, at least 0."""
        return (self.total - self.aleatoric).clamp(min=0)


def predict(
    model: nn.Module | Posterior,
    task: Task,
    rows: Sequence[AnyRow],
    *,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> Prediction:
    """Answer `rows` with `draws` draws of the posterior; ``draws=0`` answers with its mean.

    ``p(y|x) = 1/K sum_k softmax(logits(x; theta_k) / T)`` with theta_k the draw (`seed`, k) and T the posterior's
    temperature. A model with a BAYES_LORA adapter is its own posterior (antithetic draws and linearised answers:
    ``posteriors.Variational(model, predictive=...)``): its draws are stacked in the batch and share the
    base model's matrix products, on a GPU as many at once as fit a quarter of the free memory, on a CPU as many as
    keep a forward within 2048 tokens; halved when a GPU's memory runs out. Draw k is the same function whatever
    `draws`, `batch_size` and the other rows are. The model's modes, weights and the global random state are left as
    they were. Put ``torch.autocast`` around the call for half precision.

    Raises:
        ConfigError: `draws` or `batch_size` out of range.
        DataError: no rows, or a row that cannot be scored or has a token without an embedding; names the row.
        TaskError: as `Task.examples` and `task.outputs`.
        DrawError: the posterior has no such draws, as a model without an (unmerged) Gaussian adapter has none.
        PosteriorError: the model's logits are not finite; names the row.
    """
    if draws < 0 or batch_size < 1:
        raise ConfigError(f"predict: found draws={draws}, batch_size={batch_size}, expected at least 0 and 1.")
    if not rows:
        raise DataError("predict: found no rows, expected at least one.")
    module, temperature = (model.model, model.temperature) if isinstance(model, Posterior) else (model, 1.0)
    examples = task.examples(rows, module)
    longest_first = sorted(range(len(rows)), key=lambda i: -task.tokens(examples[i]))
    todo = [longest_first[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    device = next(module.parameters()).device
    with evaluation_mode(module):
        sampler = (
            model.sampler(draws=draws, seed=seed)
            if isinstance(model, Posterior)
            else StackedDraws.of(module, draws=draws, seed=seed)
        )
        with (
            torch.inference_mode(not sampler.gradients),
            tqdm(total=len(rows), desc="predict", unit="row", disable=not progress) as bar,
        ):
            logits = torch.empty(sampler.slices, len(rows), task.columns, dtype=torch.float64)
            while todo:
                places = todo.pop(0)
                batch = {key: t.to(device) for key, t in task.collate([examples[i] for i in places]).items()}
                answer = _answer_or_split(sampler, task, batch)
                if answer is None:
                    half = len(places) // 2
                    todo[:0] = [places[:half], places[half:]]
                    continue
                logits[:, places] = _finite(answer.detach().double().cpu(), [rows[i].id for i in places])
                bar.update(len(places))
    labels = [row.target for row in rows]
    return Prediction(
        ids=tuple(row.id for row in rows),
        draw_log_probs=(logits / temperature).log_softmax(-1),
        labels=None if None in labels else torch.tensor(labels),
        draws=draws,
        seed=seed,
        task=task.name,
    )


def _finite(logits: Tensor, ids: Sequence[str]) -> Tensor:
    """The logits [slices, rows, classes], or an error that names the first row without a usable answer."""
    bad = (logits.isnan() | logits.isposinf()).any(-1) | logits.isneginf().all(-1)
    if bad.any():
        row = ids[int(bad.any(0).nonzero()[0, 0])]
        raise PosteriorError(
            f"predict: the logits of row {row!r} are not finite ({int(bad.any(0).sum())} such rows in its batch): "
            "the adapter's weights, or the precision, are too large or too small for this model."
        )
    return logits


def _answer_or_split(sampler: Sampler, task: Task, batch: dict[str, Tensor]) -> Tensor | None:
    """Logits [slices, rows, classes] of one batch; None if it has to be split because memory ran out at one draw."""
    at_once = min(sampler.slices, sampler.at_once(batch))
    while True:
        try:
            return torch.cat([sampler.outputs(task, batch, part) for part in _parts(sampler.slices, at_once)])
        except DrawError:
            if at_once == 1:
                raise
            at_once = 1  # a layer that sees tokens first or relative positions cannot tell stacked draws apart
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
