"""`bayestune demo`. Heavy packages are imported when it runs."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option(help="Folder for result.json, reliability.png and .svg, and the two runs.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of both runs.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in --output.")] = False,
) -> None:
    """Plain LoRA and BLoB on the same rows, side by side: a built-in model and data, offline, minutes on two cores."""
    from bayestune.demo import run_demo

    run_demo(output, seed=seed, overwrite=overwrite)
