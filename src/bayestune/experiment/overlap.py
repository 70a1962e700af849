"""Rows that a run is scored on and that it has also learnt from: scores on them say nothing about new rows."""

import unicodedata
import warnings
from collections.abc import Mapping, Sequence

from bayestune.errors import BayestuneWarning
from bayestune.tasks import AnyRow, Row
from bayestune.tasks.data import shown


def count_repeated(
    rows: Sequence[AnyRow], split: str, used: Mapping[str, Sequence[AnyRow]]
) -> dict[str, dict[str, int]]:
    """How many of `rows`, of `split`, are among the rows of each split in `used`; a BayestuneWarning where any are.

    Two rows are the same when their texts are, whatever their ids and answers: `exact`, letter for letter; `rows`,
    those included, up to letter case, blanks, Unicode's compatible forms (NFKC) and the order of the choices.
    """
    counts = {}
    for name, others in used.items():
        places = {_folded(other): other for other in reversed(others)}
        repeated = [(row, places[key]) for row in rows if (key := _folded(row)) in places]
        exactly = {_texts(other) for other in others}
        counts[name] = {"rows": len(repeated), "exact": sum(_texts(row) in exactly for row, _ in repeated)}
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


def _texts(row: AnyRow) -> tuple[str | None, ...]:
    return (row.question, row.passage, *row.choices) if isinstance(row, Row) else (row.text, row.text_pair)


def _folded(row: AnyRow) -> tuple[str, ...]:
    texts = [" ".join(unicodedata.normalize("NFKC", text or "").casefold().split()) for text in _texts(row)]
    return (*texts[:2], *sorted(texts[2:]))
