"""Figures from Table 1 of the BLoB paper (NeurIPS 2024, arXiv 2406.11675), for comparison.

They were noted from memory and have not been compared with the paper, so every table that prints them says so. Columns
are WG-S, ARC-C, ARC-E, WG-M, OBQA and BoolQ; ACC and ECE are in %, NLL is in nats.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bayestune.methods import Bbb, Blob, Dropout, Ensemble, Laplace, Map, Mle
from bayestune.tables.fields import Cell


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of a table in a paper: accuracy and ECE in %, NLL in nats.

    Attributes:
        table: our table that they belong to.
        source: the name printed with them.
        caution: a warning printed with them.
        models: names of the measured model (last part of a path or Hub id, in lower case).
        rows: by data set, the number of training rows and evaluated rows.
        values: by score, then by (method, draws), then by data set. Draws are None if the line of the paper is shown
            beside any number of draws.
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


_COLUMNS = ("winogrande_s", "arc_challenge", "arc_easy", "winogrande_m", "openbookqa", "boolq")

# (method, draws; None: for any number of draws): ACC, ECE, NLL.
_TABLE_1: dict[tuple[str, int | None], tuple[str, str, str]] = {
    (Mle.name, None): (
        "68.99 69.10 85.65 74.53 81.52 86.53",
        "29.83 29.00 13.12 20.62 12.55 3.18",
        "3.17 2.85 1.17 0.95 0.73 0.32",
    ),
    (Map.name, None): (
        "68.62 67.59 86.55 75.61 81.38 86.50",
        "29.76 29.42 12.07 23.07 13.26 3.16",
        "2.46 2.66 0.90 1.62 0.75 0.33",
    ),
    (Dropout.name, None): (
        "69.46 68.69 86.21 76.45 81.72 87.29",
        "27.98 27.53 12.20 19.55 13.10 3.46",
        "2.79 2.67 1.00 1.02 0.77 0.31",
    ),
    (Ensemble.name, None): (
        "69.57 66.20 84.40 75.32 81.38 87.09",
        "28.52 29.16 12.57 20.86 15.34 9.61",
        "2.71 2.46 0.82 1.25 1.06 0.57",
    ),
    (Bbb.name, None): (
        "56.54 68.13 85.86 73.63 82.06 87.21",
        "21.81 26.23 12.28 15.76 11.38 3.74",
        "1.40 2.23 0.91 0.84 0.66 0.31",
    ),
    (Laplace.name, None): (
        "69.20 66.78 80.05 75.55 82.12 86.95",
        "4.15 16.25 33.29 7.40 8.70 1.30",
        "0.60 1.03 0.88 0.57 0.52 0.31",
    ),
    (Blob.name, 0): (
        "70.89 70.83 86.68 74.55 82.73 86.80",
        "20.62 20.61 9.43 11.23 8.36 2.46",
        "0.91 1.19 0.56 0.60 0.56 0.32",
    ),
    (Blob.name, 5): (
        "66.30 67.34 84.74 72.89 81.79 86.47",
        "10.89 11.22 6.16 4.51 3.40 1.63",
        "0.68 0.90 0.46 0.56 0.53 0.32",
    ),
    (Blob.name, 10): (
        "69.07 68.81 85.56 73.69 81.52 86.99",
        "9.35 9.59 3.64 3.01 3.77 1.41",
        "0.63 0.78 0.40 0.54 0.50 0.31",
    ),
}

LLAMA2_7B = Published(
    table="table1",
    source="BLoB paper, table 1",
    caution="to be checked",
    models=("llama-2-7b-hf", "llama-2-7b"),
    rows=MappingProxyType(
        {
            "winogrande_s": (640, 1267),
            "arc_challenge": (1119, 299),
            "arc_easy": (2251, 570),
            "winogrande_m": (2558, 1267),
            "openbookqa": (4957, 500),
            "boolq": (9427, 3270),
        }
    ),
    values=MappingProxyType(
        {
            measure: {
                line: dict(zip(_COLUMNS, map(float, texts[place].split()), strict=True))
                for line, texts in _TABLE_1.items()
            }
            for place, measure in enumerate(("accuracy", "ece", "nll"))
        }
    ),
)

PUBLISHED = (LLAMA2_7B,)
"""All published figures."""
