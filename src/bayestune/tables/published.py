"""Figures from Table 1 of the BLoB paper (NeurIPS 2024, arXiv 2406.11675), for comparison: published.csv.

They were noted from memory and have not been compared with the paper, so every table that prints them says so.
Accuracy and ECE are in %, the NLL is in nats. Lines without a number of draws are compared with any number.
"""

import csv
import functools
from pathlib import Path

from bayestune.tables.fields import Cell

SOURCE, CAUTION = "BLoB paper, table 1", "to be checked"
_MODELS = ("llama-2-7b-hf", "llama-2-7b")
_ROWS = {  # training rows and evaluated rows
    "winogrande_s": (640, 1267),
    "arc_challenge": (1119, 299),
    "arc_easy": (2251, 570),
    "winogrande_m": (2558, 1267),
    "openbookqa": (4957, 500),
    "boolq": (9427, 3270),
}


def is_published(cell: Cell) -> bool:
    """Return whether the paper has figures for the cell's table, model and numbers of rows."""
    model = str(cell["experiment"]["model"]).replace("\\", "/").rstrip("/").rpartition("/")[-1].lower()
    same_data = cell["task"] == cell["eval_task"] and _ROWS.get(cell["task"]) == (cell["train_rows"], cell["rows"])
    return cell["table"] == "table1" and model in _MODELS and same_data


@functools.cache
def figures() -> dict[tuple[str, str, int | None], dict[str, float]]:
    """Return the figures by (score, method, draws or None), then by data set."""
    found: dict[tuple[str, str, int | None], dict[str, float]] = {}
    with Path(__file__).with_name("published.csv").open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            key = line.pop("measure"), line.pop("method"), line.pop("draws")
            found[key[0], key[1], int(key[2]) if key[2] else None] = {name: float(line[name]) for name in line}
    return found
