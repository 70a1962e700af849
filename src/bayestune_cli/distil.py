"""`bayestune distil`."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bayestune_cli.arguments import Data, Overwrite, RunFolder, check_run
from bayestune_cli.errors import FlagError
from bayestune_cli.train import show


def distil(
    run: RunFolder,
    output: Annotated[Path, typer.Option(help="Folder of the new run: posterior/, experiment.json, result.json.")],
    rows: Annotated[
        Path | None, typer.Option(help="Further rows for the run to answer, .jsonl or .jsonl.gz, without labels.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates; default: as many as the run's own.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Number of draws of the run to average.")] = 50,
    data: Data = None,
    overwrite: Overwrite = False,
) -> None:
    """Train one plain LoRA adapter to answer in one forward pass like the average over the draws of a run."""
    check_run(run)
    if rows is not None and not rows.is_file():
        raise FlagError(f"--rows {rows}: found no file, expected rows to answer.")
    if output.resolve() == run.resolve():
        raise FlagError(f"--output {output}: found the run itself, expected another folder.")
    if output.exists() and not overwrite:
        raise FlagError(f"--output {output}: it exists; choose another, or pass --overwrite.")

    from bayestune.experiment import Experiment
    from bayestune.experiment import run as train
    from bayestune.files import read_json
    from bayestune.methods import Distilled

    taught = Experiment.from_dict(read_json(run / "experiment.json", "the settings of a run"), where=str(run))
    method = Distilled(teacher=str(run), teacher_draws=draws, distil_rows=None if rows is None else str(rows))
    own: dict[str, Any] = {"method": method, "adapter": None, "temperature_split": None}
    own |= {"steps": steps or taught.steps, "data": data or taught.data}
    if "learning_rate" in taught.method.run_defaults("causal"):  # the rate of its own optimizer
        own["learning_rate"] = None
    command = ["bayestune", *sys.argv[1:]]
    show(train(taught.replace(**own), output, overwrite=overwrite, command=command, progress=True))
