"""`anchor_loss`: the figure that the search of a posterior's width watches."""

from collections.abc import Callable, Sequence
from typing import Literal

from peft import PeftModel

from bayestune import metrics
from bayestune.errors import ConfigError, DataError
from bayestune.inference.predict import predict
from bayestune.tasks import AnyRow, Task

Criterion = Literal["nll", "accuracy"]

_METRICS = {"nll": metrics.nll, "accuracy": metrics.accuracy}


def anchor_loss(
    task: Task,
    rows: Sequence[AnyRow],
    *,
    draws: int = 10,
    seed: int = 0,
    criterion: Criterion = "nll",
    batch_size: int = 8,
) -> Callable[[PeftModel], float]:
    """A function of a model: mean NLL (nats a row) or accuracy of its predictive over `rows`, for `posteriors.tfb`.

    Every call uses the same `draws` draws of `seed`, so that two widths differ by their widths alone.

    Raises:
        ConfigError: `draws` or `batch_size` below 1, or another criterion.
        DataError: no rows, or one without a label.
    """
    if draws < 1 or batch_size < 1:
        raise ConfigError(f"anchor_loss: found draws={draws}, batch_size={batch_size}, expected at least 1.")
    if criterion not in _METRICS:
        raise ConfigError(f"anchor_loss criterion: found {criterion!r}, expected one of {sorted(_METRICS)}.")
    if not rows:
        raise DataError("anchor_loss: found no anchor rows, expected at least one.")
    for row in rows:
        if row.target is None:
            raise DataError(f"anchor_loss: row {row.id!r} has no label, expected labelled anchor rows.")

    def loss(model: PeftModel) -> float:
        prediction = predict(model, task, rows, draws=draws, seed=seed, batch_size=batch_size)
        assert prediction.labels is not None
        return _METRICS[criterion](prediction.log_probs, prediction.labels)

    return loss
