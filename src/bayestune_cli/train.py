"""`bayestune train`."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayestune_cli.arguments import check_data
from bayestune_cli.config import read_run_file
from bayestune_cli.errors import FlagError
from bayestune_cli.options import check_of_method, check_values, options, with_settings

if TYPE_CHECKING:
    from bayestune.experiment import Result

_EITHER = ("kl_learning_rate", "posterior_std")
"""Alternative settings: a flag for one of them replaces both in a config file."""
_OF_RECIPE = ("estimator", "kl_schedule", "posterior_scale", *_EITHER)
"""Settings that a recipe fills in: with --recipe, those in a config file (such as the record of a run) are ignored."""


def _names(text: str, option: Mapping[str, Any]) -> list[str]:
    return [name.strip() for name in text.split(",")]


def _numbers(text: str, option: Mapping[str, Any]) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError as error:
        flag = "--" + option["name"].replace("_", "-")
        raise FlagError(f"{flag}: found {text!r}, expected comma-separated numbers.") from error


_LISTS = {"names": _names, "numbers": _numbers}
"""How the text of a flag becomes a list, by the type of its option."""


def _check_folders(settings: Mapping[str, Any], output: Path, *, new: bool) -> None:
    """Raise an error if the data, the model or the output has a wrong path, or a `new` run would find files."""
    data, model = (settings.get(name) for name in ("data", "model"))
    check_data(data if isinstance(data, str) else None)
    if isinstance(model, str) and model.startswith((".", "/")) and not Path(model).exists():
        raise FlagError(f"--model {model}: no such folder or file, expected a model; check the path.")
    if output.is_file():
        raise FlagError(f"output {output}: found a file, expected a folder or nothing.")
    names = {path.name for path in output.iterdir()} if output.is_dir() else set[str]()
    # Other launched processes may find the folder that the main process has just made.
    if new and os.environ.get("RANK", "0") == "0" and not all(name.startswith(".") for name in names):
        begun = "experiment.json" in names and "result.json" not in names
        hint = " It holds an unfinished run: --resume continues it." if begun else ""
        raise FlagError(f"output {output}: the folder is not empty; choose another, or pass --overwrite.{hint}")


@with_settings
def train(
    output: Annotated[Path, typer.Option(help="Folder of the run: posterior/, experiment.json, result.json.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of the settings below, including model and task; flags take precedence. Or the "
            "result.json of a run to repeat: a warning names data, weights and versions that differ from the record."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output, with its settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
    **given: Any,
) -> None:
    """Train a posterior (or plain LoRA), evaluate it, and save the posterior and its scores in a run folder."""
    given = {name: value for name, value in given.items() if value is not None}
    for option in options():
        if option["type"] in _LISTS and option["name"] in given:
            given[option["name"]] = _LISTS[option["type"]](given[option["name"]], option)
    if resume and config is None and not {"model", "task"} & given.keys():
        config = output / "experiment.json"
    settings, record = ({}, None) if config is None else read_run_file(config)
    replaced = _OF_RECIPE if "recipe" in given else _EITHER if set(_EITHER) & given.keys() else ()
    settings = {name: value for name, value in settings.items() if name not in replaced}
    settings.update(given)
    where = "train" if config is None else f"--config {config}"
    check_values(settings, where)
    default = next(option["default"] for option in options() if option["name"] == "method")
    check_of_method(given, settings.get("method", default))
    _check_folders(settings, output, new=not (resume or overwrite))

    from bayestune.experiment import Experiment, run
    from bayestune.experiment.processes import is_main

    experiment = Experiment.from_dict(settings, where=where)
    command = ["bayestune", *sys.argv[1:]]
    result = run(experiment, output, overwrite=overwrite, resume=resume, command=command, record=record, progress=True)
    if is_main():
        show(result)


def show(result: "Result") -> None:
    """Print the scores of a finished run, and what was fitted."""
    from bayestune.experiment import score_table
    from bayestune.experiment.processes import process_count

    if result.scores:
        print(score_table(result.scores))
    if result.posterior_std is not None:
        print(f"posterior std {result.posterior_std:.4g}, mean over weights{_scale(result.fitted)}")
    experiment = result.experiment
    if experiment.temperature_split is not None:
        print(f"temperature {result.temperature:.4g}, fitted on {experiment.temperature_split}")
    count = process_count()
    by = f", {count} processes" if count > 1 else ""
    print(f"{result.output}: posterior/, experiment.json, result.json ({result.seconds:.0f} s{by})")


def _scale(fitted: Mapping[str, Any]) -> str:
    """Describe how the std was scaled on held-out rows after training, or why it was not."""
    if "trained_std" in fitted and "posterior_scale" not in fitted:
        return "; not scaled on held-out rows, as there are fewer than 100 training rows"
    if "nll_by_scale" not in fitted:
        return ""
    scale, nll = fitted["posterior_scale"], fitted["nll_by_scale"]
    same = scale and abs(nll["0"] - nll[f"{scale:.4g}"]) < 1e-3
    effect = "; the mean alone has the same NLL there: draws hardly change the answers, as in plain LoRA"
    return (
        f": {scale:.3g} times the {fitted['trained_std']:.4g} of training, chosen on {fitted['rows']} rows that were "
        f"not trained on{effect if same else ''}"
    )
