"""Numbers that are not finite stop training before the update, and the error says where and what is left."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from bayestune.errors import TrainingError
from bayestune.training.checkpoint_files import last_complete

Part = Literal["nll", "gradient", "kl", "weights"]


def stopped(
    part: Part, found: str, *, step: int, learning_rate: float, output: str | Path | None, advice: str
) -> TrainingError:
    """The error that ends training at update `step` because of `part`; `output` is the folder of the checkpoints."""
    last = None if output is None else last_complete(Path(output))
    return TrainingError(
        f"step {step}, {part}: {found}, expected finite numbers. Nothing of this update is kept; the "
        f"learning rate was {learning_rate:g}, the last good checkpoint is {last or 'none'}: {advice}."
    )


@torch.no_grad()
def largest(tensors: Sequence[Tensor], *, squared: bool = False) -> Float[Tensor, " tensors"]:
    """The largest magnitude in each tensor, or its square in the tensor's dtype; NaN where an entry is NaN."""
    if not tensors:
        return torch.empty(0)
    found = torch._foreach_norm(tensors, math.inf)
    found = torch._foreach_mul(found, found) if squared else found
    return torch.stack([value.to(found[0].device) for value in found])


def first_nonfinite(names: Sequence[str], values: Float[Tensor, " names"]) -> tuple[str, int] | None:
    """The name of the first value that is not finite, and how many such values there are."""
    bad = ~values.isfinite()
    if not bad.any():
        return None
    places = bad.nonzero()[:, 0]
    return names[int(places[0])], len(places)


def nonfinite_rows(nll: Float[Tensor, "draws rows"], ids: Sequence[str]) -> str | None:
    """What is wrong with the NLLs, naming the rows whose `ids` these are; None if all are finite."""
    bad = ~nll.detach().isfinite()
    if not bad.any():
        return None
    draw, place = (int(i) for i in bad.nonzero()[0])
    others = [ids[int(i)] for i in bad.any(0).nonzero()[:, 0] if int(i) != place]
    also = f" (and that of {listed(others)} is not finite)" if others else ""
    return f"the NLL of row {ids[place]!r} is {nll[draw, place].item()}{also}"


def listed(ids: Sequence[str], at_most: int = 5) -> str:
    """The rows by their first ids, and how many more there are."""
    more = len(ids) - at_most
    names = ", ".join(repr(name) for name in ids[:at_most]) + (f" and {more} more" if more > 0 else "")
    return f"row {names}" if len(ids) == 1 else f"rows {names}"
