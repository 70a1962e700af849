"""Cells of the same method and data set put together: mean and standard deviation over seeds, and who is best."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bayestune.tables.cell_fields import Cell


@dataclass(frozen=True, kw_only=True)
class Measure:
    """A number of a cell as tables show it: times `scale`, with `digits` decimals."""

    heading: str
    path: tuple[str, ...]
    scale: float
    digits: int
    higher_is_better: bool

    def of(self, cell: Cell) -> float:
        """The number, in the unit shown."""
        value: Any = cell
        for name in self.path:
            value = value[name]
        return self.scale * value

    def text(self, value: float) -> str:
        """The number with its decimals."""
        return f"{value:.{self.digits}f}"


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Values of one number over seeds: mean, and sample standard deviation (n - 1; None for one seed)."""

    mean: float
    deviation: float | None
    seeds: int


MEASURES = (
    Measure(heading="ACC, % (higher is better)", path=("accuracy",), scale=100.0, digits=2, higher_is_better=True),
    Measure(heading="ECE, % (lower is better)", path=("ece",), scale=100.0, digits=2, higher_is_better=False),
    Measure(heading="NLL, nats (lower is better)", path=("nll",), scale=1.0, digits=3, higher_is_better=False),
)

AURC = Measure(heading="AURC, % (lower is better)", path=("aurc",), scale=100.0, digits=2, higher_is_better=False)

_SCORES = {"max_prob": "1 - largest probability", "total": "total uncertainty", "epistemic": "epistemic uncertainty"}

DETECTION = tuple(
    Measure(
        heading=f"{name} of other data by {text}, % (higher is better)",
        path=("detection", score, key),
        scale=100.0,
        digits=2,
        higher_is_better=True,
    )
    for score, text in _SCORES.items()
    for key, name in (("auroc", "AUROC"), ("aupr", "AUPR"))
)

EPISTEMIC = tuple(measure for measure in DETECTION if "epistemic" in measure.path)


def spread(values: Sequence[float]) -> Spread:
    """Mean and sample standard deviation, both correctly rounded, so the same on every machine."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Spread(mean=statistics.mean(values), deviation=deviation, seeds=len(values))


def ranks(measure: Measure, spreads: Mapping[Any, Spread]) -> tuple[set[Any], set[Any]]:
    """The keys of the best and of the second best of a column, equal ones together, among those with most seeds.

    What prints the same is equal. A single comparable value is not the best of anything.
    """
    most = max((found.seeds for found in spreads.values()), default=0)
    means = {key: float(measure.text(found.mean)) for key, found in spreads.items() if found.seeds == most}
    if len(means) < 2:
        return set(), set()
    order = sorted(set(means.values()), reverse=measure.higher_is_better)
    places: list[set[Any]] = [{key for key, mean in means.items() if mean == value} for value in order[:2]]
    return places[0], places[1] if len(places) > 1 else set()
