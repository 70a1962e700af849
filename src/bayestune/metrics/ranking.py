"""How well a score separates positive rows from negative ones. Only the order of the scores matters, not their scale.

`scores` [rows] may be infinite; `positives` [rows] is bool or 0/1. Every function raises DataError if a score is NaN,
if a label is neither 0 nor 1, or if either class has no rows.

>>> auroc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0, 0, 1, 1]))
0.75
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bayestune.errors import ConfigError, DataError


def auroc(scores: Float[Tensor, " rows"], positives: Bool[Tensor, " rows"] | Int[Tensor, " rows"]) -> float:
    """Return the area under the ROC curve, P(positive above negative) + P(equal) / 2, from mid-ranks."""
    values, marks = _checked("auroc", scores, positives)
    from scipy.stats import rankdata  # takes half a second to import

    positive_rows = int(marks.sum())
    negative_rows = len(marks) - positive_rows
    rank_sum = rankdata(values.numpy(), method="average")[marks.numpy()].sum().item()
    return (rank_sum - positive_rows * (positive_rows + 1) / 2) / (positive_rows * negative_rows)


def matched_auroc(
    scores: Float[Tensor, " rows"],
    positives: Bool[Tensor, " rows"] | Int[Tensor, " rows"],
    sizes: Float[Tensor, " rows"] | Int[Tensor, " rows"],
    *,
    within: float = 0.1,
) -> float | None:
    """Return the AUROC over the pairs of a positive and a negative row of about the same size.

    It measures what a score separates beyond the sizes of the rows, such as the lengths of questions.

    Args:
        scores, positives: as in `auroc`.
        sizes: size of each row, finite and above 0.
        within: a pair counts if the larger size is at most ``1 + within`` times the smaller.

    Returns:
        The share of these pairs in which the positive row scores higher, with ties counted half; None without pairs.

    Raises:
        DataError: as `auroc`, or the numbers of sizes and rows differ, or a size is not finite and above 0.
        ConfigError: `within` is negative or NaN.
    """
    values, marks = _checked("matched_auroc", scores, positives)
    if sizes.shape != scores.shape:
        found = f"scores {tuple(scores.shape)} and sizes {tuple(sizes.shape)}"
        raise DataError(f"matched_auroc: {found}, expected both [rows]")
    lengths = sizes.detach().to("cpu", torch.float64)
    strange = ~((lengths > 0) & lengths.isfinite())
    if strange.any():
        row = int(strange.nonzero()[0, 0])
        raise DataError(f"matched_auroc: the size of row {row} is {lengths[row].item()}, expected above 0 and finite")
    if not within >= 0:
        raise ConfigError(f"matched_auroc: within is {within}, expected 0 or more")
    logs = lengths.log()
    alike = (logs[marks].unsqueeze(1) - logs[~marks]).abs() <= math.log1p(within) + 1e-12
    high, low = values[marks].unsqueeze(1), values[~marks]
    won = (high > low).double() + 0.5 * (high == low).double()
    return won[alike].mean().item() if alike.any() else None


def aupr(scores: Float[Tensor, " rows"], positives: Bool[Tensor, " rows"] | Int[Tensor, " rows"]) -> float:
    """Return the average precision, the area sum_t (recall_t - recall_{t-1}) precision_t under precision and recall.

    t runs over the distinct scores from high to low, so rows with equal scores enter together and their order does not
    matter. Nothing is interpolated. An uninformative score gives the share of positives, not one half.
    """
    values, marks = _checked("aupr", scores, positives)
    distinct, where = values.unique(return_inverse=True)
    rows = torch.bincount(where, minlength=len(distinct)).flip(0).cumsum(0).double()
    new = torch.bincount(where, marks.double(), minlength=len(distinct)).flip(0)
    return (new * (new.cumsum(0) / rows)).sum().item() / int(marks.sum())


def _checked(name: str, scores: Tensor, positives: Tensor) -> tuple[Tensor, Tensor]:
    """Return both on the CPU in float64 and bool, or raise DataError."""
    if scores.shape != positives.shape or scores.ndim != 1:
        found = f"scores {tuple(scores.shape)} and positives {tuple(positives.shape)}"
        raise DataError(f"{name}: {found}, expected both [rows]")
    values, marks = scores.detach().to("cpu", torch.float64), positives.detach().cpu()
    if values.isnan().any():
        row = int(values.isnan().nonzero()[0, 0])
        raise DataError(f"{name}: the score of row {row} is NaN")
    strange = (marks != 0) & (marks != 1)
    if strange.any():
        row = int(strange.nonzero()[0, 0])
        raise DataError(f"{name}: positives of row {row} is {marks[row].item()}, expected 0 or 1")
    positive_rows = int(marks.sum())
    if positive_rows in (0, len(marks)):
        found = f"{positive_rows} positive and {len(marks) - positive_rows} negative rows"
        raise DataError(f"{name}: {found}, expected at least one of each")
    return values, marks.bool()
