"""`evaluate`: the scores of a prediction, with bootstrap intervals."""

from typing import Any

from bayestune.tasks import AnyPrediction
from bayestune.tasks.base import S


def evaluate(prediction: AnyPrediction[S], **options: Any) -> S:
    """Return the scores that the task of `prediction` defines, from the labels of its rows.

    Args:
        prediction: what `predict` returned.
        **options: passed to `prediction.scores`; for classes `bins`, `resamples` and `seed`.

    Returns:
        The scores; for classes a `Scores` with accuracy, NLL, ECE and Brier score.

    Raises:
        DataError: a row has no label.
    """
    return prediction.scores(**options)
