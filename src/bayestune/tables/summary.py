"""Summary over seeds: mean and standard deviation of a score, and the ranking within a column."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayestune.tables.fields import ALPHA, TARGETS, Cell


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A score of a cell as tables print it: multiplied by `scale`, with `digits` decimals.

    `higher_is_better` is None for a value that is not ranked.
    """

    heading: str
    path: tuple[str, ...]
    scale: float = 100.0
    digits: int = 2
    higher_is_better: bool | None

    def of(self, cell: Cell) -> float:
        """Return the score of the cell, in the printed unit."""
        value: Any = cell
        for name in self.path:
            value = value[int(name)] if isinstance(value, list) else value[name]
        return self.scale * value

    def text(self, value: float) -> str:
        """Return the value with its decimals."""
        return f"{value:.{self.digits}f}"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and sample standard deviation (n - 1; None for one seed) of a score over seeds."""

    mean: float
    deviation: float | None
    seeds: int


ECE = Measure(heading="ECE, % (lower is better)", path=("ece",), higher_is_better=False)
AURC = Measure(heading="AURC, % (lower is better)", path=("aurc",), higher_is_better=False)
ACCURACY = Measure(heading="ACC, % (higher is better)", path=("accuracy",), higher_is_better=True)
NLL = Measure(heading="NLL, nats (lower is better)", path=("nll",), scale=1.0, digits=3, higher_is_better=False)
MEASURES = (ACCURACY, ECE, NLL)
ANSWERED = tuple(
    Measure(
        heading=f"Rows answered at an error of at most {100 * target:g} %, % (higher is better)",
        path=("selective", str(i), "coverage"),
        higher_is_better=True,
    )
    for i, target in enumerate(TARGETS[:2])
)
SETS = tuple(
    measure
    for score in ("lac", "aps")
    for measure in (
        Measure(
            heading=f"{score.upper()}: classes per set (lower is better)",
            path=("conformal", score, "size"),
            scale=1.0,
            higher_is_better=False,
        ),
        Measure(
            heading=f"{score.upper()}: sets that hold the label, % ({100 * (1 - ALPHA):g} % asked)",
            path=("conformal", score, "coverage"),
            higher_is_better=None,
        ),
    )
)

UNCERTAINTIES = {
    "max_prob": "1 - largest probability",
    "total": "total uncertainty",
    "epistemic": "epistemic uncertainty",
}
DETECTION = tuple(
    Measure(
        heading=f"{name} of epistemic uncertainty, % (not an out-of-distribution score)"
        if score == "epistemic"
        else f"Out-of-distribution {name} by {text}, % (higher is better)",
        path=("detection", score, name.lower()),
        higher_is_better=None if score == "epistemic" else True,
    )
    for score, text in UNCERTAINTIES.items()
    for name in ("AUROC", "AUPR")
)
AUROC = {measure.path[1]: measure for measure in DETECTION if measure.path[-1] == "auroc"}


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation, both correctly rounded and so the same on every machine."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.mean(values), deviation=deviation, seeds=len(values))


def ranks(measure: Measure, spreads: Mapping[Any, Spread]) -> tuple[set[Any], set[Any]]:
    """Return the keys of the best and of the second best values among those with the most seeds.

    Values that print the same are equal. A single value is not ranked.
    """
    most = max((value.seeds for value in spreads.values()), default=0)
    means = {key: float(measure.text(value.mean)) for key, value in spreads.items() if value.seeds == most}
    if len(means) < 2 or measure.higher_is_better is None:
        return set(), set()
    highest, *lower = sorted(set(means.values()), reverse=measure.higher_is_better)
    best = {key for key, mean in means.items() if mean == highest}
    return best, {key for key, mean in means.items() if lower and mean == lower[0]}
