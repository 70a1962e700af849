"""`bayestune export`."""

from pathlib import Path
from typing import Annotated

import typer

from bayestune_cli.arguments import Data, Draws, Overwrite, RunFolder, Seed, check_run, draw_count, load
from bayestune_cli.errors import FlagError


def export(
    run: RunFolder,
    output: Annotated[Path, typer.Option(help="Folder to write: mean, draw_0, draw_1, ...")],
    draws: Draws = None,
    seed: Seed = 0,
    data: Data = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the mean and draws of a run as ordinary LoRA adapters for PEFT and inference servers."""
    check_run(run)
    if output.exists() and not overwrite:
        raise FlagError(f"--output {output}: it exists; choose another, or pass --overwrite.")

    from bayestune.files import check_writable, writing
    from bayestune.serving.lora import export_lora

    check_writable(output.parent, f"--output {output}")
    loaded = load(run, data, None)
    count = draw_count(loaded, draws)
    with writing(output):
        folders = export_lora(loaded.posterior, output, draws=count, seed=seed, overwrite=overwrite)
    for folder in folders:
        print(folder)
