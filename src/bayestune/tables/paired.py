"""Differences to MLE on the same rows and with the same seed, with paired bootstrap intervals."""

from collections import Counter
from collections.abc import Iterator, Sequence

import torch

from bayestune.metrics import paired_interval
from bayestune.report.views import Block, Line, Value
from bayestune.tables.fields import Cell
from bayestune.tables.layouts import Column, line_keys, line_label
from bayestune.tables.summary import ACCURACY, NLL, Measure

REFERENCE = "mle"
"""The line that all other lines are compared with."""

SCORES = {"nll": NLL, "correct": ACCURACY}
"""By field of a cell's `row_scores`: the measure whose unit and digits a difference is printed in."""

_Pair = tuple[Cell, Cell]


def paired_blocks(cells: Sequence[Cell], columns: Sequence[Column]) -> Iterator[Block]:
    """Yield the differences to MLE in NLL and accuracy, one line per method; nothing if no cell can be compared.

    Each value is ``1/(S N) sum_s sum_i (score_si - score^MLE_si)`` over the S seeds that both have and the N rows,
    with its 95 % interval from `bayestune.metrics.paired_interval`.

    Args:
        cells: cells of one table.
        columns: its columns that have cells.
    """
    pairs = [_pairs(cells, column)[0] for column in columns]
    keys, seeds = line_keys(a for found in pairs for a, _ in found), len({cell["seed"] for cell in cells})
    if not keys:
        return
    for field, measure in SCORES.items():
        lines = []
        for key in keys:
            own = [[pair for pair in found if (pair[0]["method"], pair[0]["draws"]) == key] for found in pairs]
            values = (Value(text=_text(field, measure, found, seeds)) for found in own)
            lines.append(Line(label=line_label(*key), values=tuple(values)))
        heading = f"Difference to MLE in {measure.heading.replace('%', '% points')}"
        labels = tuple(column.label for column in columns)
        yield Block(heading=heading, corner="method", columns=labels, lines=tuple(lines))


def paired_notes(cells: Sequence[Cell], columns: Sequence[Column]) -> Iterator[str]:
    """Yield notes on how the differences are computed, and on how many cells are left out and why."""
    others = [cell for cell in cells if cell["method"] != REFERENCE]
    compared, left_out = 0, Counter[str]()
    for column in columns:
        pairs, reasons = _pairs(cells, column)
        compared, left_out = compared + len(pairs), left_out + reasons
    if compared:
        yield (
            "Differences to MLE: on the same rows with the same seed, averaged over seeds, with 95 % paired bootstrap "
            "intervals over rows. The intervals do not include the variation between seeds."
        )
    if left_out:
        reasons = ", ".join(f"{left_out[reason]} {reason}" for reason in sorted(left_out))
        yield f"Left out of the differences to MLE: {left_out.total()} of {len(others)} cells ({reasons})."


def _pairs(cells: Sequence[Cell], column: Column) -> tuple[list[_Pair], Counter[str]]:
    """Return each cell of another method with its MLE cell, and the number of unpaired cells by reason."""
    own = [cell for cell in cells if column.has(cell)]
    references = {cell["seed"]: cell for cell in own if cell["method"] == REFERENCE}
    rows = {_rows(cell) for cell in list(references.values())[:1]}
    pairs, left_out = [], Counter[str]()
    for cell in own:
        partner = references.get(cell["seed"])
        if cell["method"] == REFERENCE:
            continue
        if partner is None:
            left_out["without an MLE cell of the same seed"] += 1
        elif {_rows(cell), _rows(partner)} != rows:
            left_out["evaluated on other rows"] += 1
        elif not (cell.get("row_scores") and partner.get("row_scores")):
            left_out["without scores per row, in the cell or in its MLE cell"] += 1
        else:
            pairs.append((cell, partner))
    return pairs, left_out


def _rows(cell: Cell) -> tuple[str, int]:
    return cell["sha256"]["eval_rows"], cell["rows"]


def _text(field: str, measure: Measure, pairs: Sequence[_Pair], seeds: int) -> str:
    if not pairs:
        return "-"
    scores, reference = (
        torch.tensor([[cell["row_scores"][field] for cell in pair] for pair in pairs]).double().unbind(1)
    )
    found = paired_interval(scores, reference)
    mean, low, high = (f"{measure.scale * value:+.{measure.digits}f}" for value in (found.mean, found.low, found.high))
    fewer = f" (n = {len(pairs)})" if len(pairs) < seeds else ""
    return f"{mean} [{low}, {high}]{fewer}"
