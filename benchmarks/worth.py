"""The table of docs/results.md that says how much lower BLoB's NLL is than that of its rivals, from the records."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import decoder_page
import widths_page
from over_seeds import difference
from widths import TRAINED

from bayestune.tables import read_cells

ROOT = Path(__file__).parent.parent
COLUMNS = (
    "plain LoRA",
    "plain LoRA, temperature",
    "plain LoRA, temperature for both",
    "ensemble of three",
    "ensemble of three, temperature for both",
)

Nlls = Mapping[int, float]
"""NLL by seed."""


def table() -> str:
    """Return a line per data set: BLoB's NLL minus that of each rival, over the seeds of both."""
    lines = [f"| model, data set, training rows | seeds | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for name, (blob, warm, mle, warm_mle, ensemble, warm_ensemble) in {**_widths(), **_cells(), **_decoder()}.items():
        pairs = ((blob, mle), (blob, warm_mle), (warm, warm_mle), (blob, ensemble), (warm, warm_ensemble))
        lines.append(f"| {name} | {len(blob)} | {' | '.join(difference(*pair)[0] for pair in pairs)} |")
    return "\n".join(lines) + "\n"


def _widths() -> dict[str, Sequence[Nlls]]:
    """Return the NLLs of BLoB by default, without and with a temperature, and of its rivals, on little data."""
    sides = (
        widths_page.DEFAULT,
        ("default", "scaled_temperature"),
        ("point", "mle"),
        ("point", "mle_temperature"),
        ("point", "ensemble"),
        ("point", "ensemble_temperature"),  # not recorded
    )
    return {
        f"MiniLM, {task}, {TRAINED}": [
            {seed: one["nll"] for seed, one in scored.get(side, {}).items()} for side in sides
        ]
        for task, scored in widths_page.complete(widths_page.read_records()).items()
    }


def _cells() -> dict[str, Sequence[Nlls]]:
    """Return the same from the cells of table 1, in which BLoB has the default's std, without a chosen scale."""
    cells = [cell for cell in read_cells(ROOT / "results" / "table1") if cell["task"] == "openbookqa"]
    found = {
        method: {cell["seed"]: cell["nll"] for cell in cells if (cell["method"], cell["draws"]) == (method, draws)}
        for method, draws in {"blob_wide": 10, "mle": 0, "temperature": 0, "ensemble": 3}.items()
    }
    sides = (found["blob_wide"], {}, found["mle"], found["temperature"], found["ensemble"], {})
    return {f"MiniLM, openbookqa, {cells[0]['train_rows']}": sides}


def _decoder() -> dict[str, Sequence[Nlls]]:
    """Return the same on a language model."""
    records = decoder_page.read_records()
    sides = (
        ("blob", "blob_n10"),
        ("blob_tempered", "blob_n10_temperature"),  # as --temperature-split does
        ("mle", "mle"),
        ("mle", "mle_temperature"),
        ("ensemble", "ensemble"),
        ("ensemble", "ensemble_temperature"),
    )
    name = f"SmolLM2, arc_easy, {records[0]['rows']['train']}"
    return {name: [decoder_page.nlls(records, *side) for side in sides]}
