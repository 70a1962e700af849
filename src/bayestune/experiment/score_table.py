"""Scores as a text table."""

from collections.abc import Mapping

from bayestune.inference import Scores

_COLUMNS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier"}


def score_table(scores: Mapping[str, Scores]) -> str:
    """One line a method: accuracy, NLL (nats), ECE and Brier, each with its 95 % bootstrap interval."""
    lines = [["", *_COLUMNS.values()]]
    for name, found in scores.items():
        cells = found.as_dict()
        lines.append([name, *(_cell(cells[key], found.intervals[key]) for key in _COLUMNS)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rows = {found.rows for found in scores.values()}
    return "\n".join([*text, f"{'/'.join(map(str, sorted(rows)))} rows; 95 % bootstrap intervals over rows."])


def _cell(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]"
