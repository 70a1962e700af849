"""`bayestune predict`: rows in, answers out, some at a time."""

import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bayestune_cli.arguments import (
    Data,
    Draws,
    Overwrite,
    Predictive,
    RunFolder,
    Seed,
    check_output_file,
    check_run,
    draw_count,
    load,
)
from bayestune_cli.errors import FlagError
from bayestune_cli.rows import check_rows
from bayestune_cli.signals import Stopped

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune.tasks import AnyRow, TokenizedTask

_ROWS_AT_ONCE = 1000
_COMPARED = 16
"""Rows that --resume answers again, to see that the run, the draws and the seed are the same."""
_FIELDS = {"id", "probs", "answer"}
"""Fields of every answer, by which a file of answers is known from other files."""


def predict(
    run: RunFolder,
    input: Annotated[Path, typer.Option(help="Rows, .jsonl or .jsonl.gz; labels are not needed.")],
    output: Annotated[Path, typer.Option(help="File for the answers, one JSON object per row.")],
    data: Data = None,
    draws: Draws = None,
    predictive: Predictive = None,
    seed: Seed = 0,
    on_bad_row: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="stop: refuse the whole file before the first answer; skip: leave the row out."),
    ] = "stop",
    resume: Annotated[
        bool, typer.Option("--resume", help="Append to --output the rows that have no answer there yet.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Answer rows: probabilities, index and text of the answer; total, aleatoric and epistemic uncertainty in nats."""
    check_run(run)
    check_output_file(output, overwrite=overwrite or resume)
    _check_files(input, output, whole=on_bad_row == "stop")
    if overwrite and resume:
        raise FlagError("predict: found --overwrite with --resume, expected one of the two.")
    done, length = _answered(output) if resume and output.exists() else ({}, None)

    from bayestune.files import appending, check_writable, replacing

    check_writable(output.parent, f"--output {output}")
    loaded = load(run, data, predictive)
    if on_bad_row == "stop":
        _check(input, loaded.task)
    count, keeps = draw_count(loaded, draws, predictive), not (overwrite and output.exists())
    _check_same(loaded, input, done, output, draws=count, seed=seed)
    written, skipped, first = 0, 0, ""
    if length is not None:
        os.truncate(output, length)  # an unfinished last line, now that all else has been checked
    with appending(output) if keeps else replacing(output) as write:
        try:
            for rows, bad in _batches(input, loaded.task):
                skipped, first = skipped + len(bad), first or "".join(map(str, bad[:1]))
                records = _records(loaded, rows, done, draws=count, seed=seed)
                write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
                written += len(records)
        except Stopped as stopped:
            if written and keeps:
                stopped.args = (f"{written} rows are answered in {output}; continue with --resume",)
            raise
    before = f", {len(done)} answered before" if resume else ""
    left_out = f", {skipped} skipped; the first: {first}" if skipped else ""
    print(f"{output}: {written} rows{before}{left_out}")


def _check_files(input: Path, output: Path, *, whole: bool) -> None:
    """Raise an error for files that cannot be used; with `whole`, also for a row that cannot."""
    if output.resolve() == input.resolve():
        raise FlagError(f"--output {output}: found the file of --input, expected another file.")
    if whole:
        check_rows(input)
    elif not input.is_file():
        raise FlagError(f"{input}: found no such file, expected the rows to answer; check the path")


def _check_same(loaded: "Run", input: Path, done: Mapping[str, Any], output: Path, *, draws: int, seed: int) -> None:
    """Raise an error unless some answered rows get their answers again, up to the last bits of another batch."""
    batches = ([row for row in batch if row.id in done] for batch, _ in _batches(input, loaded.task))
    rows = next((batch for batch in batches if batch), [])[:_COMPARED] if done else []
    answers = loaded.predict(rows, draws=draws, seed=seed).records(rows) if rows else []
    for row, answer in zip(rows, answers, strict=True):
        probs, before = answer["probs"], done[row.id]
        if len(probs) == len(before) and max(abs(a - b) for a, b in zip(probs, before, strict=True)) <= 1e-3:
            continue
        raise FlagError(
            f"--output {output}: found other probabilities for row {row.id!r} than this run gives with {draws} draws "
            f"of seed {seed}, expected the answers of the same command: pass its options, or another --output."
        )


def _records(
    loaded: "Run", rows: list["AnyRow"], done: Mapping[str, Any], *, draws: int, seed: int
) -> list[dict[str, Any]]:
    """Return the answers of the rows that are not in `done`; all rows are predicted together, for the same bits."""
    if all(row.id in done for row in rows):
        return []
    records = loaded.predict(rows, draws=draws, seed=seed, progress=True).records(rows)
    return [record for record in records if record["id"] not in done]


def _check(path: Path, task: "TokenizedTask") -> None:
    """Raise an error for the first row of `path` that cannot be used, before any row is answered."""
    from bayestune.errors import DataError

    for rows, bad in _batches(path, task):
        if bad:
            raise DataError(f"{bad[0]} ({len(bad)} of {len(rows) + len(bad)} rows cannot be used)") from bad[0]


def _batches(path: Path, task: "TokenizedTask") -> Iterator[tuple[list["AnyRow"], list[Exception]]]:
    """Yield the usable rows of each `_ROWS_AT_ONCE` lines, and what is wrong with the others.

    Batches depend on the file alone, so a resumed command forms the same ones.
    """
    from bayestune.tasks.data import scan_rows

    places: dict[str, str] = {}
    lines = scan_rows(path, labelled=False)
    while batch := list(itertools.islice(lines, _ROWS_AT_ONCE)):
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


def _answered(output: Path) -> tuple[dict[str, list[float]], int]:
    """Return the probabilities in `output` by id, and the bytes of its whole lines; only the last may be cut."""
    found: dict[str, list[float]] = {}
    whole = 0
    with output.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and found:
                break
            try:
                answer: Any = json.loads(line)
            except ValueError:
                answer = None
            known = isinstance(answer, dict) and answer.keys() >= _FIELDS
            if not known or not isinstance(answer["id"], str) or not isinstance(answer["probs"], list):
                expected = "an answer of `bayestune predict`, to --resume from"
                raise FlagError(f"--output {output}:{number}: found another line, expected {expected}.")
            found[answer["id"]] = answer["probs"]
            whole += len(line)
    return found, whole
