"""`Task`: what a model is asked. A task defines its examples, outputs, loss, predictions and scores."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Generic, Self

from jaxtyping import Float
from torch import Tensor, nn
from typing_extensions import TypeVar

from bayestune.errors import TaskError
from bayestune.metrics import Spread
from bayestune.tasks.rows import AnyRow


class AnyScores(ABC):
    """Scores of a prediction. Subclasses are frozen dataclasses.

    Attributes:
        headings: heading of each score in a table, by the name of its field.
        rows: number of rows.
        draws: number of draws.
        intervals: 95 % bootstrap interval over rows of each score in `headings`.
        without_interval: scores that are shown without their interval.
    """

    headings: ClassVar[Mapping[str, str]]
    without_interval: ClassVar[tuple[str, ...]] = ()
    rows: int
    draws: int
    intervals: dict[str, tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return asdict(self)  # type: ignore[call-overload]

    def shown(self, name: str, *, digits: int = 3) -> str:
        """Return a score and its interval as text."""
        value = f"{getattr(self, name):.{digits}f}"
        if name in self.without_interval or name not in self.intervals:
            return value
        low, high = self.intervals[name]
        return f"{value} [{low:.{digits}f}, {high:.{digits}f}]"

    def __str__(self) -> str:
        parts = [f"{name} {self.shown(name, digits=4)}" for name in self.headings]
        return f"{', '.join(parts)} ({self.rows} rows, {self.draws} draws)"


S = TypeVar("S", bound=AnyScores, default=Any)


@dataclass(frozen=True, kw_only=True)
class AnyPrediction(ABC, Generic[S]):
    """Predictions of a posterior for some rows.

    Attributes:
        ids: the rows' ids, in the order given.
        draws: number of draws; 0 for the mean alone.
        seed: seed of the draws.
        task: name of the task.
        temperatures: the smallest and the largest temperature that a fit tries.
    """

    temperatures: ClassVar[tuple[float, float]] = (0.01, 100.0)
    ids: tuple[str, ...]
    draws: int
    seed: int
    task: str

    @abstractmethod
    def scores(self, **options: Any) -> S:
        """Score the prediction against the rows' labels.

        Raises:
            DataError: a row has no label.
        """

    @abstractmethod
    def row_nll(self) -> Float[Tensor, " rows"]:
        """Return -log of the predictive probability, or density, of each row's label, in nats.

        Raises:
            DataError: a row has no label.
        """

    @abstractmethod
    def records(self, rows: Sequence[AnyRow]) -> list[dict[str, Any]]:
        """Return one JSON object per row: its id, the prediction and its uncertainty."""

    @staticmethod
    def same_answer(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Return whether two `records` are the same answer, up to rounding that depends on the rows in a batch."""
        return record == other

    def tempered(self, temperature: float) -> Self:
        """Return the prediction at a temperature T, with every draw's likelihood raised to 1/T and normalized.

        Raises:
            TaskError: the task has no temperature.
        """
        raise TaskError(f"task {self.task}: its predictions have no temperature; leave temperature_split out")

    def spread(self) -> Spread | None:
        """Return how class probabilities vary over the draws; None without classes, or with fewer than two draws."""
        return None

    def uncertainties(self) -> dict[str, Float[Tensor, " rows"]]:
        """Return scores of each row that are higher for less certain predictions: "total", "epistemic", ..."""
        return {}


P = TypeVar("P", bound=AnyPrediction, default=Any)


class Task(ABC, Generic[P]):
    """Defines how rows become outputs, and how outputs become a loss, a prediction and scores.

    Rows become examples, examples become a batch and a batch becomes outputs. The first dimension of each tensor in a
    batch is rows, so draws can be stacked with `t.repeat(draws, 1, ...)`. Labels are under the key `labels`.

    Attributes:
        name: name of the data set.
        columns: number of outputs per row.
        labels: names of the classes, by index; None if labels are numbers.
        worked: rows whose answers the task shows to the model; `rows` leaves them out.
        has_classes: whether outputs are logits of classes, which a constant per row does not change.
    """

    has_classes: ClassVar[bool] = False
    name: str
    columns: int
    labels: tuple[str, ...] | None = None
    worked: tuple[AnyRow, ...] = ()

    def rows(self, split: str) -> list[AnyRow]:
        """Return the labeled rows of a split, such as "train" or "dev+test".

        Raises:
            TaskError: the task has no data set of its own.
        """
        raise TaskError(f"task {self.name}: found no data set, so there is no split {split!r}; pass the rows")

    def target(self, row: AnyRow) -> Any:
        """Return the row's label as the loss expects it: a named class becomes its index."""
        return row.target if self.labels is None or row.target is None else self.labels.index(row.target)

    @abstractmethod
    def example(self, row: AnyRow) -> dict[str, Any]:
        """Check a row and return what `collate` needs, as JSON values.

        Raises:
            DataError: the row cannot be used; the message names it.
        """

    @abstractmethod
    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return one batch: tensors with rows first, with `labels` [rows] if every example has one."""

    def identity(self, example: dict[str, Any]) -> dict[str, Any]:
        """Return the part of an example that must be the same if a run is resumed: all of it, unless overridden."""
        return example

    @abstractmethod
    def tokens(self, example: dict[str, Any]) -> int:
        """Return the number of tokens in the example's longest sequence, to sort by."""

    @abstractmethod
    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        """Return the model's outputs for each row, in float32 or wider. `batch["labels"]` is not used."""

    @abstractmethod
    def row_loss(self, outputs: Float[Tensor, "rows columns"], batch: dict[str, Tensor]) -> Float[Tensor, " rows"]:
        """Return the negative log-likelihood of each row's label, in nats.

        Raises:
            TaskError: the batch has no labels.
        """

    def loss_roots(self, outputs: Float[Tensor, "rows columns"]) -> Iterator[Float[Tensor, "rows columns"]]:
        """Yield vectors v for Laplace: ``sum v v^T`` is the Fisher matrix of each row's label in the outputs.

        Raises:
            TaskError: the task does not define them.
        """
        raise TaskError(f"task {self.name}: found no curvature of its likelihood (loss_roots), which laplace needs")

    @abstractmethod
    def prediction(
        self,
        outputs: Float[Tensor, "slices rows columns"],
        rows: Sequence[AnyRow],
        *,
        draws: int,
        seed: int,
        temperature: float = 1.0,
    ) -> P:
        """Return the prediction from the float64 outputs of every draw (one slice, the mean's, if `draws` is 0)."""

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, " rows"]:
        """Return the negative log-likelihood of each row's label, in nats; see `row_loss`."""
        return self.row_loss(self.outputs(model, batch), batch)

    def metrics(self, outputs: Float[Tensor, "rows columns"], labels: Tensor) -> dict[str, float]:
        """Return the metrics of an evaluation during training, among them `nll`: means over rows."""
        return {"nll": self.row_loss(outputs.double(), {"labels": labels}).mean().item()}

    def check(self, rows: Sequence[AnyRow]) -> None:
        """Raise a DataError for the first row that cannot be used."""
        for row in rows:
            self.example(row)

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        """Return the `example` of each row, checked against `model`.

        Raises:
            DataError: as `example`.
            TaskError: the task does not fit the model.
        """
        return [self.example(row) for row in rows]
