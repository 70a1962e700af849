"""`evaluate`: the scores of a prediction, with bootstrap intervals."""

from dataclasses import asdict, dataclass
from typing import Any

from bayestune import metrics
from bayestune.errors import DataError
from bayestune.inference.predict import Prediction


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Scores over `rows` rows; `intervals` holds the 95 % percentile bootstrap interval of each.

    accuracy in [0, 1]; nll in nats a row; ece in [0, 1]; brier summed over classes, in [0, 2].
    """

    accuracy: float
    nll: float
    ece: float
    brier: float
    rows: int
    draws: int
    intervals: dict[str, tuple[float, float]]

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [
            f"{name} {getattr(self, name):.4f} [{low:.4f}, {high:.4f}]" for name, (low, high) in self.intervals.items()
        ]
        return f"{', '.join(parts)} ({self.rows} rows, {self.draws} draws)"


def evaluate(prediction: Prediction, *, bins: int = 15, resamples: int = 1000, seed: int = 0) -> Scores:
    """Accuracy, NLL, ECE (`bins` equal-width bins) and Brier score of `prediction`, averaged over rows.

    Raises:
        DataError: some row has no label.
    """
    if prediction.labels is None:
        raise DataError("evaluate: some rows have no label; found None, expected one of the classes for every row.")
    log_probs, labels = prediction.log_probs, prediction.labels
    return Scores(
        accuracy=metrics.accuracy(log_probs, labels),
        nll=metrics.nll(log_probs, labels),
        ece=metrics.ece(log_probs, labels, bins=bins),
        brier=metrics.brier(log_probs, labels),
        rows=len(labels),
        draws=prediction.draws,
        intervals=metrics.intervals(log_probs, labels, bins=bins, resamples=resamples, seed=seed),
    )
