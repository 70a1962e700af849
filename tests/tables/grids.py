"""A world of tiny data sets and a tiny encoder, and grids of it."""

from pathlib import Path
from typing import Any

from bayestune.tables.grid import Grid
from toys import pretrained_bert, questions, write_rows

METHODS = ("mle", "blob", "ensemble", "laplace", "temperature")
OTHERS = ("arc_challenge", "arc_easy", "mmlu_college_chemistry", "mmlu_college_physics")


def four(start: int, count: int) -> list[dict[str, Any]]:
    """Questions as in `questions`, all of four choices."""
    rows = questions(start, count)
    for row in rows:
        row["choices"] = [*row["choices"], "white", "pink"][:4]
    return rows


def make_world(folder: Path, *, others: tuple[str, ...] = OTHERS) -> Path:
    """Fill `folder` with bert/ and data/, whose sets are called as those of table 2."""
    pretrained_bert(folder / "bert")
    for place, split in enumerate(("train", "dev", "test")):
        write_rows(folder / "data" / "openbookqa" / f"{split}.jsonl", four(20 * place, 12))
    for place, name in enumerate(others):
        write_rows(folder / "data" / name / "test.jsonl", four(100 + 20 * place, 6))
    return folder


def make_like(grid: Grid, **changes: Any) -> Grid:
    return Grid(**{**vars(grid), **changes})


def with_settings(grid: Grid, **changes: Any) -> Grid:
    return make_like(grid, settings={**grid.settings, **changes})


def make(world: Path, place: Path, **changes: Any) -> Grid:
    settings = {"model": str(world / "bert"), "data": str(world / "data"), "steps": 2, "batch_size": 4, "draws": 3}
    settings |= {
        "max_tokens": 200,
        "members": 2,
        "rho_init": 0.5,
        "kl_learning_rate": 0.002,
        **changes.pop("settings", {}),
    }
    given: dict[str, Any] = {
        "table": "table2",
        "seeds": (1, 2),
        "methods": METHODS,
        "tasks": None,
        "settings": settings,
        "results": place / "results",
        "runs": place / "runs",
        "command": ("bayestune", "table", "table2"),
    }
    return Grid(**{**given, **changes})
