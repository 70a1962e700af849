"""`bayestune demo`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from bayestune_cli.arguments import Overwrite


def demo(
    output: Annotated[Path, typer.Option(help="Folder for result.json, reliability.png and .svg, and the two runs.")],
    model: Annotated[
        Literal["minilm", "smollm2"], typer.Option(help="minilm, an encoder, or smollm2, a language model.")
    ] = "minilm",
    seed: Annotated[int, typer.Option(min=0, help="Seed of both runs.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Compare plain LoRA and BLoB on a built-in model and data set; offline, takes minutes on two cores."""
    from bayestune.demo import run_demo

    run_demo(output, model=model, seed=seed, overwrite=overwrite)
