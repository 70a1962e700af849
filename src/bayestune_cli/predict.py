"""`bayestune predict`, which answers the rows of a file, in batches."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Union

import typer

from bayestune_cli.arguments import (
    ApiKey,
    Data,
    Draws,
    OptionalRunFolder,
    Overwrite,
    Predictive,
    Seed,
    check_output_file,
    check_run,
    draw_count,
    load,
    writing_lines,
)
from bayestune_cli.batches import OnBadRow, batches, check_all, check_files
from bayestune_cli.errors import FlagError
from bayestune_cli.launched import process_count
from bayestune_cli.signals import Stopped

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune.tasks import AnyRow
    from bayestune_cli.serve import ServedRun

Answering = Union["Run", "ServedRun"]

_COMPARED = 16
"""The number of rows that --resume answers again, to check that the run, the draws and the seed are the same."""
_SIGNS = ("total", "log_likelihood")
"""Every answer has one of these fields; they distinguish a file of answers from other files."""


Input = Annotated[Path, typer.Option(help="Rows, .jsonl or .jsonl.gz; labels are not needed.")]
Output = Annotated[Path, typer.Option(help="File for the answers, one JSON object per row.")]
ServedFile = Annotated[
    Path | None,
    typer.Option(help="served.json of a running `bayestune serve`, which answers instead of RUN."),
]


def predict(
    input: Input,
    output: Output,
    run: OptionalRunFolder = None,
    served: ServedFile = None,
    api_key: ApiKey = None,
    data: Data = None,
    draws: Draws = None,
    predictive: Predictive = None,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "stop",
    resume: Annotated[
        bool, typer.Option("--resume", help="Append answers for the rows that have none in --output.")
    ] = False,
    overwrite: Overwrite = False,
) -> None:
    """Answer rows with probabilities and the answer, or a number and its interval, and with three uncertainties."""
    _check_answering(run, served)
    check_output_file(output, overwrite=overwrite or resume)
    check_files(input, output, flag="--input", whole=on_bad_row == "stop")
    if overwrite and resume:
        raise FlagError("predict: found --overwrite with --resume, expected one of the two.")
    done, length = _answered(output) if resume and output.exists() else ({}, None)

    from bayestune.experiment.processes import together
    from bayestune.files import check_writable

    check_writable(output.parent, f"--output {output}")
    loaded = _answering(run, served, data=data, predictive=predictive, api_key=api_key, draws=draws, seed=seed)
    if on_bad_row == "stop":
        check_all(input, loaded.task)
    count, keeps = draw_count(loaded, draws, predictive), not (overwrite and output.exists())
    at_once = None if served is None else 16  # a server answers more slowly
    done, length = together((done, length))[0]  # from here on the main process may write
    _check_same(loaded, input, done, output, draws=count, seed=seed)
    written, skipped, first = 0, 0, ""
    with writing_lines(output, keeps=keeps, length=length) as write:
        try:
            for rows, bad in batches(input, loaded.task, at_once=at_once):
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


def _check_answering(run: Path | None, served: Path | None) -> None:
    if (run is None) == (served is None):
        found = "neither" if run is None else "both"
        raise FlagError(f"predict: found {found} of RUN and --served, expected one of them.")
    if run is not None:
        check_run(run)
    elif process_count() > 1:
        raise FlagError("--served: found several processes, expected one: the server answers; start it alone.")


def _answering(
    run: Path | None,
    served: Path | None,
    *,
    data: str | None,
    predictive: str | None,
    api_key: str | None,
    **asked: Any,
) -> Answering:
    """Return the run or the server that answers."""
    if run is not None:
        return load(run, data, predictive)
    assert served is not None
    if data is not None or predictive is not None:
        raise FlagError("predict: found --data or --predictive with --served, expected neither: the server decides.")

    from bayestune_cli.serve import ServedRun

    return ServedRun.of(served, api_key, **asked)


def _check_same(
    loaded: Answering, input: Path, done: Mapping[str, Any], output: Path, *, draws: int, seed: int
) -> None:
    """Raise an error unless some answered rows get the same answers again, up to rounding in different batches."""
    answered = ([row for row in batch if row.id in done] for batch, _ in batches(input, loaded.task))
    rows = next((batch for batch in answered if batch), [])[:_COMPARED] if done else []
    if not rows:
        return
    prediction = loaded.predict(rows, draws=draws, seed=seed)
    for row, answer in zip(rows, prediction.records(rows), strict=True):
        if not prediction.same_answer(answer, done[row.id]):
            raise FlagError(
                f"--output {output}: found another answer for row {row.id!r} than this run gives with {draws} draws "
                f"of seed {seed}, expected the answers of the same command: pass its options, or another --output."
            )


def _records(
    loaded: Answering, rows: list["AnyRow"], done: Mapping[str, Any], *, draws: int, seed: int
) -> list[dict[str, Any]]:
    """Return the answers of the rows not in `done`. All rows are predicted together, so the bits stay the same."""
    if all(row.id in done for row in rows):
        return []
    records = loaded.predict(rows, draws=draws, seed=seed, progress=True).records(rows)
    return [record for record in records if record["id"] not in done]


def _answered(output: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the answers in `output` by id, and the bytes of its whole lines; only the last may be cut."""
    found: dict[str, dict[str, Any]] = {}
    whole = 0
    with output.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and found:
                break
            try:
                answer: Any = json.loads(line)
            except ValueError:
                answer = None
            known = isinstance(answer, dict) and not answer.keys().isdisjoint(_SIGNS)
            if not known or not isinstance(answer.get("id"), str):
                expected = "an answer of `bayestune predict`, to --resume from"
                raise FlagError(f"--output {output}:{number}: found another line, expected {expected}.")
            found[answer["id"]] = answer
            whole += len(line)
    return found, whole
