"""`bayestune export`."""

from pathlib import Path
from typing import Annotated

import typer

from bayestune_cli.arguments import Data, Draws, Overwrite, RunFolder, Seed, check_run, draw_count, load
from bayestune_cli.errors import FlagError


def _check_format(name: str) -> str:
    if name not in ("peft", "gguf"):
        raise FlagError(f"--format: found {name!r}, expected peft or gguf.")
    return name


def export(
    run: RunFolder,
    output: Annotated[Path, typer.Option(help="Folder to write: mean, draw_0, draw_1, ...")],
    draws: Draws = None,
    seed: Seed = 0,
    data: Data = None,
    overwrite: Overwrite = False,
    format: Annotated[
        str,
        typer.Option(
            callback=_check_format,
            help="peft, one folder per adapter (default); gguf, one file per adapter for llama.cpp: "
            "mean.gguf, draw_0.gguf, ...",
        ),
    ] = "peft",
) -> None:
    """Write the mean and draws of a run as ordinary LoRA adapters for PEFT and inference servers."""
    check_run(run)
    if output.exists() and not overwrite:
        raise FlagError(f"--output {output}: it exists; choose another, or pass --overwrite.")

    from bayestune.files import check_writable, writing
    from bayestune.serving.gguf import check_gguf_package
    from bayestune.serving.lora import export_lora

    if format == "gguf":
        check_gguf_package()  # before the model is loaded
    check_writable(output.parent, f"--output {output}")
    loaded = load(run, data, None)
    count = draw_count(loaded, draws)
    with writing(output):
        written = export_lora(loaded.posterior, output, draws=count, seed=seed, overwrite=overwrite, format=format)
    for path in written:
        print(path)
