"""Figures from Table 1 of the BLoB paper (NeurIPS 2024, arXiv 2406.11675), for comparison: published.csv.

They were noted from memory and have not been compared with the paper, so every table that prints them says so.
Accuracy and ECE are in %, the NLL is in nats. Lines without a number of draws stand beside any number.
"""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bayestune.tables.fields import Cell


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of a table in a paper.

    Attributes:
        table: our table that they belong to.
        source: the name printed with them.
        caution: a warning printed with them.
        models: names of the measured model (last part of a path or Hub id, in lower case).
        rows: by data set, the number of training rows and evaluated rows.
        values: by score, then by (method, draws or None), then by data set.
    """

    table: str
    source: str
    caution: str
    models: tuple[str, ...]
    rows: Mapping[str, tuple[int, int]]
    values: Mapping[str, Mapping[tuple[str, int | None], Mapping[str, float]]]

    def fits(self, cell: Cell) -> bool:
        """Return whether the cell has the same model and numbers of rows, so that the figures can stand beside it."""
        model = str(cell["experiment"]["model"]).replace("\\", "/").rstrip("/").rpartition("/")[-1].lower()
        rows = (cell["train_rows"], cell["rows"])
        same_data = cell["task"] == cell["eval_task"] and self.rows.get(cell["task"]) == rows
        return self.table == cell["table"] and model in self.models and same_data


def _read(path: Path) -> dict[str, dict[tuple[str, int | None], dict[str, float]]]:
    values: dict[str, dict[tuple[str, int | None], dict[str, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for line in csv.DictReader(file):
            measure, method, draws = line.pop("measure"), line.pop("method"), line.pop("draws")
            figures = {data_set: float(text) for data_set, text in line.items()}
            values.setdefault(measure, {})[method, int(draws) if draws else None] = figures
    return values


PUBLISHED = (
    Published(
        table="table1",
        source="BLoB paper, table 1",
        caution="to be checked",
        models=("llama-2-7b-hf", "llama-2-7b"),
        rows={
            "winogrande_s": (640, 1267),
            "arc_challenge": (1119, 299),
            "arc_easy": (2251, 570),
            "winogrande_m": (2558, 1267),
            "openbookqa": (4957, 500),
            "boolq": (9427, 3270),
        },
        values=_read(Path(__file__).with_name("published.csv")),
    ),
)
"""All published figures."""
