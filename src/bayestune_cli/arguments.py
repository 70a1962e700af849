"""Arguments that several commands share."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayestune_cli.errors import FlagError

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune_cli.serve import ServedRun

LINEARISED_DRAWS = 1000
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run folder written by `bayestune train`.")]
OptionalRunFolder = Annotated[
    Path | None, typer.Argument(metavar="[RUN]", help="Run folder written by `bayestune train`.")
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="BAYESTUNE_API_KEY", help="Key that every request to the server must carry.")
]


def check_data(data: str | None) -> str | None:
    """Return `data`; raise an error if it is given and is not a folder."""
    if data is not None and not Path(data).is_dir():
        raise FlagError(f"--data {data}: no such folder, expected the one with the data sets.")
    return data


Data = Annotated[
    str | None,
    typer.Option(callback=check_data, help="Folder of data sets; default: the one used in training."),
]


def _check_draws(draws: int | None) -> int | None:
    if draws is not None and draws < 0:
        raise FlagError(f"--draws: found {draws}, expected 0 (the mean) or more.")
    return draws


Draws = Annotated[
    int | None,
    typer.Option(
        callback=_check_draws, help="Number of draws; 0 for the posterior mean. Default: as in the run's evaluation."
    ),
]
_PREDICTIVES = ("mc", "antithetic", "linearised")


def _check_predictive(name: str | None) -> str | None:
    if name is not None and name not in _PREDICTIVES:
        raise FlagError(f"--predictive: found {name!r}, expected one of {', '.join(_PREDICTIVES)}.")
    return name


Predictive = Annotated[
    str | None,
    typer.Option(
        callback=_check_predictive,
        help="How to average draws of a Gaussian or dropout adapter: mc, independent draws (default); antithetic, "
        "pairs of opposite draws; linearised (Gaussian only), 1000 cheap draws of logits linearized about the mean.",
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing --output.")]


def check_run(folder: Path) -> None:
    """Raise an error unless `folder` holds a trained run, or an old run that was being replaced is kept beside it."""
    waiting = folder.resolve().with_name(f".{folder.resolve().name}.before")
    signs = (folder / "result.json", folder / "posterior" / "bayestune_manifest.json", waiting)
    if not any(path.exists() for path in signs):
        hint = " Continue it: train --resume." if (folder / "experiment.json").is_file() else ""
        expected = "the folder of a finished run, as `bayestune train --output` makes it"
        raise FlagError(f"{folder}: found no result.json, expected {expected}.{hint}")


def load(folder: Path, data: str | None, predictive: str | None) -> "Run":
    """Load the run in `folder`, with draws averaged as `predictive` says; launched processes divide the rows."""
    from bayestune.errors import ConfigError
    from bayestune.experiment import load_run

    run = dataclasses.replace(load_run(folder, data=data), shared=True)
    if predictive is None:
        return run
    try:
        return dataclasses.replace(run, posterior=run.posterior.with_predictive(predictive))
    except ConfigError as error:
        raise FlagError(f"--{error} The run's method is {run.experiment.method.name!r}.") from error


def draw_count(run: "Run | ServedRun", draws: int | None, predictive: str | None = None) -> int:
    """Return `draws` or, by default, the run's own number, or many if draws are linearized, which is cheap."""
    if draws is not None:
        return draws
    return LINEARISED_DRAWS if predictive == "linearised" else run.default_draws


def check_output_file(output: Path, *, overwrite: bool) -> None:
    """Raise an error unless the file `output` can be created or replaced."""
    if output.is_dir():
        raise FlagError(f"--output {output}: found a folder, expected a file.")
    if output.exists() and not overwrite:
        raise FlagError(f"--output {output}: the file exists; choose another, or pass --overwrite.")
    if not output.parent.is_dir():
        raise FlagError(f"--output {output}: found no folder {output.parent}, expected one.")


@contextlib.contextmanager
def writing_lines(output: Path, *, keeps: bool, length: int | None = None) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes to `output`, in the main process only.

    Args:
        output: the file.
        keeps: append to the file; otherwise it is replaced at the end.
        length: first cut the file to this many bytes, to drop an unfinished last line.
    """
    from bayestune.experiment.processes import is_main
    from bayestune.files import appending, replacing

    if not is_main():
        yield lambda text: None
        return
    if length is not None:
        os.truncate(output, length)
    with appending(output) if keeps else replacing(output) as write:
        yield write
