"""`bayestune demo`."""

from pathlib import Path
from typing import Annotated

import typer

from bayestune_cli.arguments import Overwrite


def demo(
    output: Annotated[Path, typer.Option(help="Folder for result.json, reliability.png and .svg, and the two runs.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of both runs.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare plain LoRA and BLoB on a built-in model and data set; offline, takes minutes on two cores."""
    from bayestune.demo import run_demo

    run_demo(output, seed=seed, overwrite=overwrite)
