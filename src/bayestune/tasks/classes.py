"""Tasks whose outputs are logits of classes: their loss, `Prediction` and `Scores`."""

import dataclasses
import math
from abc import ABC
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bayestune import metrics
from bayestune.errors import ConfigError, DataError, TaskError
from bayestune.tasks.base import AnyPrediction, AnyScores, Task
from bayestune.tasks.rows import AnyRow, Row


@dataclass(frozen=True, kw_only=True)
class Scores(AnyScores):
    """Scores of class predictions.

    Attributes:
        accuracy: share of right answers, in [0, 1].
        nll: mean negative log-likelihood per row, in nats.
        ece: expected calibration error, in [0, 1]; sampling noise increases it.
        ece_corrected: the same without this bias (`metrics.ece_corrected`).
        brier: Brier score, summed over classes, in [0, 2].
        rows: number of rows.
        draws: number of draws.
        intervals: 95 % bootstrap interval of each score. The interval of the plain ECE is biased too, and can exclude
            the ECE.
    """

    headings: ClassVar[Mapping[str, str]] = {
        "accuracy": "accuracy",
        "nll": "NLL",
        "ece": "ECE",
        "ece_corrected": "ECE corrected",
        "brier": "Brier",
    }
    without_interval: ClassVar[tuple[str, ...]] = ("ece",)

    accuracy: float
    nll: float
    ece: float
    ece_corrected: float
    brier: float
    rows: int
    draws: int
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Prediction(AnyPrediction[Scores]):
    """Class predictions of a posterior. Probabilities sum to 1 over the classes; entropies are in nats.

    Attributes:
        ids: the rows' ids, in the order given.
        draw_log_probs: log p(class | row, draw k), float64 on the CPU; one slice, the mean's, when `draws` is 0.
        labels: the right classes, or None if some row has none.
        draws: number of draws; 0 for the mean alone.
        seed: seed of the draws.
        task: name of the task.
        names: names of the classes, by index, or None.
    """

    draw_log_probs: Float[Tensor, "slices rows classes"]
    labels: Int[Tensor, " rows"] | None
    names: tuple[str, ...] | None = None

    def first(self, draws: int) -> "Prediction":
        """Return the prediction of the first `draws` draws.

        Raises:
            ConfigError: there are fewer draws.
        """
        most = min(self.draws, len(self.draw_log_probs))  # a probit prediction has one average for all draws
        if not 1 <= draws <= most:
            raise ConfigError(f"first: found {draws} draws, expected 1 to {most}, those of the prediction.")
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

    def scores(self, *, bins: int = 15, resamples: int = 1000, seed: int = 0) -> Scores:
        """Return accuracy, NLL, ECE and Brier score, with bootstrap intervals.

        Args:
            bins: number of equal-width bins of the ECE.
            resamples: number of bootstrap resamples.
            seed: seed of the bootstrap.

        Raises:
            DataError: a row has no label.
        """
        log_probs, labels = self.log_probs, self._known_labels()
        resampling = {"bins": bins, "resamples": resamples, "seed": seed}
        corrected, interval = metrics.ece_corrected(log_probs, labels, **resampling)
        return Scores(
            accuracy=metrics.accuracy(log_probs, labels),
            nll=metrics.nll(log_probs, labels),
            ece=metrics.ece(log_probs, labels, bins=bins),
            ece_corrected=corrected,
            brier=metrics.brier(log_probs, labels),
            rows=len(labels),
            draws=self.draws,
            intervals={**metrics.intervals(log_probs, labels, **resampling), "ece_corrected": interval},
        )

    def row_nll(self) -> Float[Tensor, " rows"]:
        """Return -log p(label) of each row, in nats.

        Raises:
            DataError: a row has no label.
        """
        return metrics.row_nll(self.log_probs, self._known_labels())

    def _known_labels(self) -> Int[Tensor, " rows"]:
        if self.labels is None:
            raise DataError(
                "evaluate: some rows have no label; found None, expected one of the classes for every row."
            )
        return self.labels

    @staticmethod
    def same_answer(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Return whether two records have the same probabilities, up to 0.001."""
        probs, before = record["probs"], other.get("probs") or ()
        return len(probs) == len(before) and max(abs(a - b) for a, b in zip(probs, before, strict=True)) <= 1e-3

    def tempered(self, temperature: float) -> "Prediction":
        """Return the prediction whose draws are ``log softmax(draw_log_probs / temperature)``."""
        return dataclasses.replace(self, draw_log_probs=(self.draw_log_probs / temperature).log_softmax(-1))

    def spread(self) -> metrics.Spread | None:
        """Return `metrics.spread` of the draws; None if there are fewer than two."""
        return metrics.spread(self.draw_log_probs) if len(self.draw_log_probs) >= 2 else None

    def uncertainties(self) -> dict[str, Float[Tensor, " rows"]]:
        """Return total and epistemic uncertainty, in nats, and 1 minus the largest probability."""
        least = 1 - self.probs.amax(-1)
        return {"total": self.total, "largest_probability": least, "epistemic": self.epistemic}

    def records(self, rows: Sequence[AnyRow]) -> list[dict[str, Any]]:
        """Return one JSON object per row.

        Its keys are `id`, `probs` (of the choices that the row has), `answer` (index of the most probable class),
        `label` (text of that choice or name of that class; absent where classes have no names), `total`, `aleatoric`
        and `epistemic` (nats).
        """
        numbers = {name: getattr(self, name).tolist() for name in ("total", "aleatoric", "epistemic")}
        probs, answers, records = self.probs.tolist(), self.answer.tolist(), []
        for i, row in enumerate(rows):
            names = row.choices if isinstance(row, Row) else self.names
            records.append(
                {
                    "id": row.id,
                    "probs": probs[i][: len(row.choices)] if isinstance(row, Row) else probs[i],
                    "answer": answers[i],
                    **({} if names is None else {"label": names[answers[i]]}),
                    **{name: values[i] for name, values in numbers.items()},
                }
            )
        return records


class ClassTask(Task[Prediction], ABC):
    """A task whose outputs are unnormalized log-probabilities of classes; choices that a row lacks have -inf."""

    has_classes = True

    def row_loss(self, outputs: Float[Tensor, "rows columns"], batch: dict[str, Tensor]) -> Float[Tensor, " rows"]:
        """Return -log softmax(outputs)[label] of each row, in nats.

        It is computed in log space, so it is finite for any finite gap between logits.

        Raises:
            TaskError: the batch has no labels.
        """
        if "labels" not in batch:
            raise TaskError("loss: found a batch without labels, expected labeled rows")
        return F.cross_entropy(outputs, batch["labels"], reduction="none")

    def metrics(self, outputs: Float[Tensor, "rows columns"], labels: Int[Tensor, " rows"]) -> dict[str, float]:
        """Return `accuracy` and `nll` (nats), as means over rows."""
        log_probs = outputs.double().log_softmax(-1)
        return {"accuracy": metrics.accuracy(log_probs, labels), "nll": metrics.nll(log_probs, labels)}

    def loss_roots(self, outputs: Float[Tensor, "rows columns"]) -> Iterator[Float[Tensor, "rows columns"]]:
        """Yield the columns of the Cholesky factor of ``diag(p) - p p^T``, without the last one, which is 0."""
        return loss_roots(outputs)

    def prediction(
        self,
        outputs: Float[Tensor, "slices rows columns"],
        rows: Sequence[AnyRow],
        *,
        draws: int,
        seed: int,
        temperature: float = 1.0,
    ) -> Prediction:
        """Return ``log softmax(outputs / temperature)`` of every draw as a `Prediction`."""
        labels = [self.target(row) for row in rows]
        return Prediction(
            ids=tuple(row.id for row in rows),
            draw_log_probs=(outputs / temperature).log_softmax(-1),
            labels=None if None in labels else torch.tensor(labels),
            draws=draws,
            seed=seed,
            task=self.name,
            names=self.labels,
        )


def loss_roots(logits: Float[Tensor, "rows classes"]) -> Iterator[Float[Tensor, "rows classes"]]:
    """Yield the columns of the Cholesky factor of ``diag(p) - p p^T``, without the last one, which is 0.

    If q_c is the sum of p from class c on, column c is ``sqrt(p_c / q_c)`` times ``sqrt(q_(c+1))`` at c and
    ``-p_j / sqrt(q_(c+1))`` at j > c.
    """
    probs = logits.softmax(-1)
    rest = probs.flip(1).cumsum(1).flip(1)
    for c in range(probs.shape[1] - 1):
        scale = torch.where(rest[:, c] > 0, probs[:, c] / rest[:, c], 0.0).sqrt()
        after = rest[:, c + 1].sqrt()
        root = torch.zeros_like(probs)
        root[:, c] = scale * after
        below = torch.where(after[:, None] > 0, probs[:, c + 1 :] / after[:, None], 0.0)
        root[:, c + 1 :] = -scale[:, None] * below
        yield root
