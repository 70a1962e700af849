"""Values that are not finite: where they are, and the error that stops training before the update."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils import get_total_norm

from bayestune.errors import TrainingError
from bayestune.training.checkpoint_files import last_complete
from bayestune.training.sharding import local, total

Quantity = Literal["nll", "gradient", "kl", "weights"]


def stopped(
    quantity: Quantity, problem: str, *, step: int, learning_rate: float, output: str | None, advice: str
) -> TrainingError:
    """Return the error that ends training at update `step`; `output` is the folder of the checkpoints."""
    last = None if output is None else last_complete(Path(output))
    return TrainingError(
        f"step {step}, {quantity}: {problem}, expected finite numbers. Nothing of this update is kept; the "
        f"learning rate was {learning_rate:g}, the last good checkpoint is {last or 'none'}: {advice}."
    )


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor], *, squared: bool = False) -> bool:
    """Return whether every entry (with `squared`, its square in its dtype) is finite, in few kernels."""
    tensors, by_dtype = list(tensors), {}
    for part in map(local, tensors):  # a maximum over processes could lose a NaN
        if part.numel():
            by_dtype.setdefault(part.dtype, []).append(part)
    largest = [get_total_norm(group, math.inf) for group in by_dtype.values()]
    bad = sum(not (value.square() if squared else value).isfinite() for value in largest)
    return not total(bad, tensors)


def first_nonfinite(tensors: Mapping[str, Tensor], *, squared: bool = False) -> tuple[str, int] | None:
    """Return the name of the first tensor that is not finite and the number of such tensors, or None."""
    if all_finite(tensors.values(), squared=squared):
        return None
    bad = [name for name, tensor in tensors.items() if not all_finite([tensor], squared=squared)]
    return bad[0], len(bad)


def nonfinite_rows(nll: Float[Tensor, "draws rows"], index: Int[Tensor, " rows"], ids: Sequence[str]) -> str | None:
    """Return what is wrong with the NLLs of the rows `index`, by their `ids`; None if all are finite."""
    bad = ~nll.detach().isfinite()
    if not bad.any():
        return None
    draw, row = (int(i) for i in bad.nonzero()[0])
    others = [ids[int(i)] for i in index[bad.any(0)] if i != index[row]]
    also = f" (and that of {listed(others)} is not finite)" if others else ""
    return f"the NLL of row {ids[int(index[row])]!r} is {nll[draw, row].item()}{also}"


def listed(ids: Sequence[str], at_most: int = 5) -> str:
    """Return a list of the first ids, and how many more there are."""
    more = len(ids) - at_most
    names = ", ".join(repr(name) for name in ids[:at_most]) + (f" and {more} more" if more > 0 else "")
    return f"row {names}" if len(ids) == 1 else f"rows {names}"
