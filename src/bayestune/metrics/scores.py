"""Scores of predicted class probabilities, each averaged over rows and never over batches.

Every function takes `log_probs`, the natural logarithms of the predicted probabilities [rows, classes], and `labels`
[rows]. Numbers are first converted to float64 on the CPU. -inf is a probability of zero, such as that of a choice that
the row does not have. The answer of a row is its most probable class (the first one on a tie), and its confidence is
that probability.

Every function raises DataError, a ValueError, if there are no rows. It names the first bad row if a value is NaN or
+inf, if the probabilities do not sum to 1 within 1e-3, or if a label is not a class.

>>> log_probs = torch.tensor([[0.8, 0.2], [0.6, 0.4]]).log()
>>> round(nll(log_probs, torch.tensor([0, 1])), 4)
0.5697
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayestune.errors import DataError

SUM_TOLERANCE = 1e-3


def accuracy(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Return the share of rows whose most probable class is the label, from 0 to 1."""
    return row_accuracy(log_probs, labels).mean().item()


def nll(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Return the mean over rows of -log p(label), in nats.

    Nothing is clipped, so it is `inf` if a label has probability zero. `impossible_labels` counts those rows.
    """
    return row_nll(log_probs, labels).mean().item()


def brier(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Return the mean over rows of sum_c (p_c - 1[c = label])^2, from 0 to 2 (Brier 1950)."""
    return row_brier(log_probs, labels).mean().item()


def row_accuracy(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return, per row, 1 if the most probable class is the label and 0 otherwise. `accuracy` is the mean."""
    log_probs, labels = checked(log_probs, labels)
    return (log_probs.argmax(1) == labels).double()


def row_nll(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return, per row, -log p(label) in nats; `inf` if that probability is zero. `nll` is the mean."""
    log_probs, labels = checked(log_probs, labels)
    return -log_probs.gather(1, labels[:, None])[:, 0]


def row_brier(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Return, per row, sum_c (p_c - 1[c = label])^2, from 0 to 2. `brier` is the mean."""
    log_probs, labels = checked(log_probs, labels)
    truth = torch.nn.functional.one_hot(labels, log_probs.shape[1])
    return (log_probs.exp() - truth).square().sum(1)


def impossible_labels(log_probs: Float[Tensor, "rows classes"], labels: Int[Tensor, " rows"]) -> int:
    """Return the number of rows whose label has probability zero; they make `nll` infinite."""
    return int(row_nll(log_probs, labels).isposinf().sum())


def checked(log_probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return both on the CPU in float64 and int64, or raise DataError."""
    if log_probs.ndim != 2 or 0 in log_probs.shape or labels.shape != log_probs.shape[:1]:
        found = f"log_probs {tuple(log_probs.shape)} and labels {tuple(labels.shape)}"
        raise DataError(f"metrics: {found}, expected [rows, classes] and [rows] with at least one row and one class")
    if not log_probs.is_floating_point() or labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"metrics: log_probs {log_probs.dtype} and labels {labels.dtype}, expected float and integer")
    log_probs, labels = log_probs.detach().to("cpu", torch.float64), labels.detach().to("cpu", torch.int64)
    sums = log_probs.exp().sum(1)
    # NaN and +inf fail this comparison too.
    improper = ~((sums - 1).abs() <= SUM_TOLERANCE)
    foreign = (labels < 0) | (labels >= log_probs.shape[1])
    if (improper | foreign).any():
        row = _first(improper | foreign)
        if improper[row]:
            found = f"the probabilities of row {row} sum to {sums[row].item():.6g}, expected 1 within {SUM_TOLERANCE}"
            raise DataError(f"metrics: {found}; pass log-probabilities, such as log_softmax of the logits")
        last = log_probs.shape[1] - 1
        raise DataError(f"metrics: the label of row {row} is {labels[row].item()}, expected 0 to {last}")
    return log_probs, labels


def _first(bad: Tensor) -> int:
    return int(bad.nonzero()[0, 0])
