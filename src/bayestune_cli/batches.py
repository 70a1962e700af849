"""Read the rows of a file in batches, with the errors of those that cannot be used."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bayestune_cli.errors import FlagError
from bayestune_cli.rows import check_rows

if TYPE_CHECKING:
    from bayestune.tasks import AnyRow, TokenizedTask

ROWS_AT_ONCE = 1000
OnBadRow = Annotated[
    Literal["stop", "skip"],
    typer.Option(help="stop: refuse the whole file before the first answer; skip: leave the row out."),
]


def check_files(input: Path, output: Path | None, *, flag: str, whole: bool) -> None:
    """Raise an error if a file cannot be used or, with `whole`, a row of `input` cannot.

    Args:
        input: the file of rows.
        output: the file for the answers, if they go to one.
        flag: the flag that names the input.
        whole: check every row, with the standard library.
    """
    if output is not None and output.resolve() == input.resolve():
        raise FlagError(f"--output {output}: found the file of {flag}, expected another file.")
    if whole:
        check_rows(input)
    elif not input.is_file():
        raise FlagError(f"{input}: found no such file, expected a file of rows; check the path")


def check_all(path: Path, task: "TokenizedTask") -> None:
    """Raise an error for the first row of `path` that cannot be used, before any row is answered."""
    from bayestune.errors import DataError

    for rows, bad in batches(path, task):
        if bad:
            raise DataError(f"{bad[0]} ({len(bad)} of {len(rows) + len(bad)} rows cannot be used)") from bad[0]


def batches(
    path: Path, task: "TokenizedTask", *, at_once: int | None = None
) -> Iterator[tuple[list["AnyRow"], list[Exception]]]:
    """Yield the usable rows of each `at_once` lines, by default `ROWS_AT_ONCE`, and the errors of the other lines.

    Batches depend only on the file and `at_once`, so a resumed command forms the same ones.
    """
    from bayestune.tasks.data import formats_of, scan_rows

    places: dict[str, str] = {}
    lines = scan_rows(path, labelled=False, formats=formats_of(task.row))
    while batch := list(itertools.islice(lines, at_once or ROWS_AT_ONCE)):
        bad: list[Exception] = [line for line in batch if isinstance(line, Exception)]
        rows: list[AnyRow] = []
        parsed = [line for line in batch if not isinstance(line, Exception)]
        for row, fault in zip(parsed, task.faults(parsed), strict=True):
            if row.id in places:
                fault = row.fault("id", f"the id of {places[row.id]} again", "ids that differ")
            if fault is None:
                places[row.id] = row.where
                rows.append(row)
            else:
                bad.append(fault)
        yield rows, bad
