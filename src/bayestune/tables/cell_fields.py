"""The fields of a cell's JSON, and their check."""

import math
from typing import Any

from bayestune.errors import ConfigError
from bayestune.tables.schema import Fields, Items, Number, Text, Whole, check

Cell = dict[str, Any]

KEY = ("table", "task", "eval_task", "method", "draws", "seed")
"""The fields that name a cell, in the order cells are sorted by."""

BINS = 15
COVERAGES = 100
TARGETS = (0.05, 0.1, 0.2)
HISTOGRAM_BINS = 20
HISTOGRAM_ENDS = {"total": 2.0, "epistemic": 0.5, "max_prob": 1.0}
"""Upper ends of the histograms, entropies in nats; the last bin also holds what is above."""

_NAME = Text(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHARE = Number(0.0, 1.0)
_ENDS = {"accuracy": 1.0, "nll": math.inf, "ece": 1.0, "brier": 2.0}
_BY_SCORE = Fields({name: Fields({"auroc": _SHARE, "aupr": _SHARE}) for name in HISTOGRAM_ENDS})
_COUNTS = Items(Whole(), HISTOGRAM_BINS, HISTOGRAM_BINS)
_HISTOGRAMS = Fields(
    {name: Fields({"end": Number(end, end), "counts": _COUNTS}) for name, end in HISTOGRAM_ENDS.items()}
)
_SELECTIVE = Fields(
    {
        "target": _SHARE,
        "threshold": Number(0.0, 1.0, optional=True),
        "coverage": _SHARE,
        "rows": Whole(),
        "error": Number(0.0, 1.0, optional=True),
        "interval": Items(_SHARE, 2, 2),
    }
)
CELL = Fields(
    {
        "table": _NAME,
        "method": _NAME,
        "task": _NAME,
        "eval_task": _NAME,
        "seed": Whole(),
        "draws": Whole(),
        **{name: Number(0.0, end) for name, end in _ENDS.items()},
        "intervals": Fields({name: Items(Number(0.0, end), 2, 2) for name, end in _ENDS.items()}),
        "rows": Whole(1),
        "train_rows": Whole(1),
        "reliability": Fields(
            {
                "counts": Items(Whole(), BINS, BINS),
                "confidence": Items(Number(0.0, 1.0, optional=True), BINS, BINS),
                "accuracy": Items(Number(0.0, 1.0, optional=True), BINS, BINS),
            }
        ),
        "aurc": _SHARE,
        "risk_coverage": Fields(
            {"coverage": Items(_SHARE, 1, COVERAGES + 1), "risk": Items(_SHARE, 1, COVERAGES + 1)}
        ),
        "selective": Items(_SELECTIVE, len(TARGETS), len(TARGETS)),
        "uncertainty": _HISTOGRAMS,
        "steps": Whole(1),
        "seconds": Number(),
        "command": Items(Text(r"(?s).*"), 0, 10_000),
        "experiment": Fields({"model": Text()}, more=True),
        "sha256": Fields({"train_rows": Text(), "eval_rows": Text()}, more=True),
        "versions": Fields({}, more=True),
        "hardware": Fields({}, more=True),
    }
)
"""Fields of every cell: scores over `rows` rows (accuracy, ECE 0 to 1; NLL in nats; Brier summed over classes), their
95 % bootstrap intervals; `reliability` in 15 bins (null where empty); `risk_coverage` where coverage first reaches
1 %, 2 %, ..., 100 %, with its area `aurc`; `selective`, the thresholds on the confidence for errors of 5, 10 and 20 %;
`uncertainty`, histograms of 20 bins from 0 to `end`; and how the run was made, `experiment` being its settings."""

OTHER_DATA = Fields(
    {"detection": _BY_SCORE, "in_distribution": Fields({"rows": Whole(1), "uncertainty": _HISTOGRAMS})}
)
"""Further fields of a cell with eval_task != task: how well each uncertainty tells its rows (positive) from the rows
of `task`, and the histograms of the latter."""


def check_cell(record: Cell, *, where: str) -> None:
    """Refuse what is no cell.

    Raises:
        ConfigError: `where`, and the first field that is missing, unknown, or not what `CELL` says.
    """
    moved = isinstance(record.get("task"), str) and record.get("eval_task") != record["task"]
    check(record, Fields({**CELL.fields, **(OTHER_DATA.fields if moved else {})}), where=where)
    counted = {
        "reliability.counts": record["reliability"]["counts"],
        **{f"uncertainty.{name}.counts": record["uncertainty"][name]["counts"] for name in HISTOGRAM_ENDS},
    }
    for field, counts in counted.items():
        if sum(counts) != record["rows"]:
            raise ConfigError(f"{where}: field {field}: found {sum(counts)} rows in all, expected {record['rows']}.")
    curve = record["risk_coverage"]
    if len(curve["risk"]) != len(curve["coverage"]):
        found = f"{len(curve['risk'])} values"
        raise ConfigError(f"{where}: field risk_coverage.risk: found {found}, expected {len(curve['coverage'])}.")
