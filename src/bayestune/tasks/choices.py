"""Batches of rows with different numbers of choices: absent choices are filled in and then masked."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from bayestune.errors import BayestuneWarning, TaskError
from bayestune.tasks.datasets import DatasetSpec
from bayestune.tasks.rows import Row, shown


def choice_mask(counts: Sequence[int]) -> Bool[Tensor, "rows choices"]:
    """Return which choices each row has."""
    return torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)


def with_filler(choices: list[Any], count: int) -> list[Any]:
    """Pad choices to `count` with copies of the first, which keep absent choices free of NaN until they are masked."""
    return choices + choices[:1] * (count - len(choices))


def mask_absent(
    logits: Float[Tensor, "rows choices"], present: Bool[Tensor, "rows choices"], columns: int
) -> Float[Tensor, "rows columns"]:
    """Return the logits with -inf for absent choices, up to `columns`."""
    masked = logits.masked_fill(~present, float("-inf"))
    return F.pad(masked, (0, columns - logits.shape[1]), value=float("-inf"))


def warn_of_alike(name: str, ids: Sequence[str], rows: int) -> None:
    """Warn about rows of a data set, given by `ids`, that have different choices with the same tokens."""
    if ids:
        warnings.warn(
            f"{len(ids)} of {rows} rows of {name} have different choices with the same tokens, such as row "
            f"{shown(ids[0])}: these choices get the same probability.",
            BayestuneWarning,
            stacklevel=3,
        )


def refuse_others(spec: DatasetSpec) -> None:
    """Raise a TaskError for a data set without choices."""
    if spec.row is not Row:
        raise TaskError(f"data set {spec.name}: found {spec.row.noun} rows, expected questions with choices")
