"""Scores as a text table."""

from collections.abc import Mapping

from bayestune.tasks import AnyScores


def score_table(scores: Mapping[str, AnyScores]) -> str:
    """Return a table with one line per method, in which each score has its 95 % bootstrap interval."""
    headings = next(iter(scores.values())).headings
    lines = [["", *headings.values()]]
    for name, found in scores.items():
        lines.append([name, *map(found.shown, headings)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rows = {found.rows for found in scores.values()}
    return "\n".join([*text, f"{'/'.join(map(str, sorted(rows)))} rows; 95 % bootstrap intervals over rows."])
