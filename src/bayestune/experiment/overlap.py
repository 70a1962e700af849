"""Detect rows in the evaluation split that also occur in a split that the run learns from."""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence

from bayestune.errors import BayestuneWarning
from bayestune.tasks import AnyRow
from bayestune.tasks.rows import shown


def count_repeated(
    rows: Sequence[AnyRow], split: str, used: Mapping[str, Sequence[AnyRow]]
) -> dict[str, dict[str, int]]:
    """Count the rows of `split` that also occur in each split in `used`, and warn if there are any.

    Rows are compared by their texts; ids and answers do not count.

    Args:
        rows: the rows of `split`, which the run is scored on.
        split: its name.
        used: the rows that the run learns from, by split.

    Returns:
        For each split in `used`: "exact", the number of rows repeated letter for letter, and "rows", which also
        counts rows that differ only in letter case, spaces, Unicode compatibility forms (NFKC) or the order of their
        choices.
    """
    counts = {}
    for name, others in used.items():
        places = {folded(other): other for other in reversed(others)}
        repeated = [(row, places[key]) for row in rows if (key := folded(row)) in places]
        exactly = {tuple(other.texts) for other in others}
        counts[name] = {"rows": len(repeated), "exact": sum(tuple(row.texts) in exactly for row, _ in repeated)}
        if repeated:
            warnings.warn(_message(repeated, counts[name]["exact"], len(rows), split, name), BayestuneWarning, 2)
    return counts


def _message(repeated: Sequence[tuple[AnyRow, AnyRow]], exact: int, scored: int, split: str, name: str) -> str:
    pairs = ", ".join(f"{shown(row.id)} (there {shown(other.id)})" for row, other in repeated[:3])
    return (
        f"{len(repeated)} of the {scored} rows of split {split}, which the run is scored on, are also in split "
        f"{name}, which it learns from, {exact} of them letter for letter; such as {pairs}. Scores on them say "
        "nothing about new rows: remove them from one of the two."
    )


def folded(row: AnyRow) -> tuple[tuple[str, str], ...]:
    """Return a row's texts without the differences that `count_repeated` ignores.

    The texts are sorted by field. All choices share one field, so their order does not matter.
    """
    return tuple(
        sorted((name, " ".join(unicodedata.normalize("NFKC", text).casefold().split())) for name, text in row.texts)
    )
