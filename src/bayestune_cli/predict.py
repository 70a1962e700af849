"""`bayestune predict`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from bayestune_cli.arguments import (
    Data,
    Draws,
    Overwrite,
    Predictive,
    RunFolder,
    Seed,
    check_output_file,
    draw_count,
    load,
)
from bayestune_cli.errors import FlagError


def predict(
    run: RunFolder,
    input: Annotated[Path, typer.Option(help="Rows, .jsonl or .jsonl.gz; labels are not needed.")],
    output: Annotated[Path, typer.Option(help="File for the answers, one JSON object per row.")],
    data: Data = None,
    draws: Draws = None,
    predictive: Predictive = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Answer rows: probabilities, index of the answer, and total, aleatoric and epistemic uncertainty in nats."""
    check_output_file(output, overwrite=overwrite)
    if output.resolve() == input.resolve():
        raise FlagError(f"--output {output}: found the file of --input, expected another file.")

    from bayestune.files import check_writable, write_text
    from bayestune.tasks import read_rows

    check_writable(output.parent, f"--output {output}")
    rows = read_rows(input, labelled=False)
    loaded = load(run, data, predictive)
    loaded.task.check(rows)
    prediction = loaded.predict(rows, draws=draw_count(loaded, draws, predictive), seed=seed, progress=True)
    answers = [json.dumps(record, ensure_ascii=False) + "\n" for record in prediction.records(rows)]
    write_text(output, "".join(answers))
    print(f"{output}: {len(answers)} rows")
