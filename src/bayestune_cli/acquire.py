"""`bayestune acquire`: which rows of a pool to label next."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

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
from bayestune_cli.batches import OnBadRow, batches, check_all, check_files
from bayestune_cli.errors import FlagError

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune.inference import Prediction


def acquire(
    run: RunFolder,
    pool: Annotated[Path, typer.Option(help="Rows to choose from, .jsonl or .jsonl.gz; labels are not needed.")],
    top: Annotated[int, typer.Option(min=1, help="Number of rows to choose.")] = 20,
    output: Annotated[
        Path | None, typer.Option(help="File for the rows, one JSON object each, best first; default: stdout.")
    ] = None,
    score: Annotated[
        Literal["mutual_information", "entropy", "random"],
        typer.Option(
            help="mutual_information: how much the draws disagree; entropy: how unsure the predictive is (both in "
            "nats); random: a number from the seed and the id."
        ),
    ] = "mutual_information",
    data: Data = None,
    draws: Draws = None,
    predictive: Predictive = None,
    seed: Seed = 0,
    on_bad_row: OnBadRow = "stop",
    overwrite: Overwrite = False,
) -> None:
    """Choose the rows of a pool that are most worth labeling; print ids and scores. Training rows are left out."""
    check_run(run)
    if score == "random" and (draws is not None or predictive is not None):
        raise FlagError("acquire: found --draws or --predictive, expected neither: --score random uses no draws.")
    if output is not None:
        check_output_file(output, overwrite=overwrite)
    check_files(pool, output, flag="--pool", whole=on_bad_row == "stop")

    from bayestune.files import check_writable, write_text
    from bayestune.inference import acquire as best
    from bayestune.inference.acquire import check_acquisition

    if output is not None:
        check_writable(output.parent, f"--output {output}")
    loaded = load(run, data, predictive)
    count = None if score == "random" else draw_count(loaded, draws, predictive)
    check_acquisition(score, count or 0, classes=loaded.task.has_classes)
    if on_bad_row == "stop":
        check_all(pool, loaded.task)
    seen = _Seen()
    chosen = best(_answered(loaded, pool, seen, draws=count, seed=seed), top, score=score, seed=seed)
    found = [{"id": row, "score": value} for row, value in chosen]
    text = "".join(json.dumps(one, ensure_ascii=output is None) + "\n" for one in found)
    if output is None:
        print(text, end="")
    else:
        write_text(output, text)
    counts = f"{len(chosen)} of {seen.ranked} rows by {score}, {seen.left_out()}"
    print(f"{output or pool}: {counts}", file=sys.stderr if output is None else sys.stdout)


@dataclass
class _Seen:
    """Counts of the rows of a pool: ranked, left out as training rows, and skipped, with the first error."""

    ranked: int = 0
    trained: int = 0
    skipped: int = 0
    first: str = ""

    def left_out(self) -> str:
        skipped = f", {self.skipped} skipped; the first: {self.first}" if self.skipped else ""
        return f"{self.trained} training rows left out{skipped}"


def _answered(
    loaded: "Run", pool: Path, seen: _Seen, *, draws: int | None, seed: int
) -> Iterator["Prediction | Sequence[str]"]:
    """Yield predictions of the rows whose texts are not in the training split, and count all rows in `seen`.

    If `draws` is None, yield the ids of these rows instead, without running the model.
    """
    from bayestune.experiment.overlap import folded

    task = loaded.task
    trained = {folded(row) for row in [*task.rows(loaded.experiment.train_split), *task.worked]}
    for rows, bad in batches(pool, task):
        new = [row for row in rows if folded(row) not in trained]
        seen.ranked, seen.trained = seen.ranked + len(new), seen.trained + len(rows) - len(new)
        seen.skipped, seen.first = seen.skipped + len(bad), seen.first or "".join(map(str, bad[:1]))
        if draws is None:
            yield [row.id for row in new]
        elif new:
            yield loaded.predict(new, draws=draws, seed=seed, progress=True)
