"""Listings of a report: confidence thresholds for a target error, and the provenance of each run."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bayestune.report.views import Listing, shown
from bayestune.tables.fields import TARGETS, Cell
from bayestune.tables.layouts import line_label

_LONG = 600


def threshold_listing(place: str, cells: Iterable[Cell]) -> Listing:
    """List, per cell, the confidence threshold for each target error."""
    advice = "chosen on these rows; confirm on others"
    return Listing(
        heading=f"Thresholds for a target error on {place}, with 95 % intervals ({advice})",
        columns=("method", "seed", *(f"error at most {100 * target:g} %" for target in TARGETS)),
        lines=tuple(
            (line_label(cell["method"], cell["draws"]), str(cell["seed"]), *map(_threshold, cell["selective"]))
            for cell in cells
        ),
    )


def _threshold(found: Mapping[str, Any]) -> str:
    if found["threshold"] is None:
        return "no threshold reaches it"
    low, high = (100 * end for end in found["interval"])
    return (
        f"answer from confidence {found['threshold']:.3f}: {100 * found['coverage']:.1f} % of rows, "
        f"error {100 * found['error']:.1f} % [{low:.1f}, {high:.1f}]"
    )


def run_listings(cells: Sequence[Cell]) -> tuple[Listing, ...]:
    """List the runs with their commands, settings, hashes of data and weights, versions and machines."""
    run = ("table", "method", "trained on", "seed")
    data = ("table", "trained on", "training rows sha256", "evaluated on", "evaluated rows sha256", "base weights")
    columns = {
        "Runs and commands": (*run, "updates", "seconds", "adapter sha256", "command"),
        "Settings": (*run, "settings"),
        "Data and weights": data,
        "Versions and machines": ("versions", "hardware"),
    }
    lines = zip(*map(_provenance, cells), strict=True)
    return tuple(
        Listing(name, columns[name], tuple(dict.fromkeys(own))) for name, own in zip(columns, lines, strict=True)
    )


def _provenance(cell: Cell) -> tuple[tuple[str, ...], ...]:
    """Return the line of a cell in each listing."""
    run, hashes = (cell["table"], cell["method"], cell["task"], str(cell["seed"])), cell["sha256"]
    adapter, command = _flat(hashes.get("adapter", "-")), shown(shlex.join(cell["command"]), _LONG)
    rows = map(shown, (hashes["train_rows"], cell["eval_task"], hashes["eval_rows"]))
    return (
        (*run, str(cell["steps"]), f"{cell['seconds']:.0f}", adapter, command),
        (*run, _flat(cell["experiment"])),
        (cell["table"], cell["task"], *rows, _flat(hashes.get("base", "-"))),
        (_flat(cell["versions"]), _flat(cell["hardware"])),
    )


def _flat(value: Any) -> str:
    """Return free content of a cell as one text: JSON, cut where it is long."""
    return shown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), _LONG)
