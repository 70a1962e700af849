"""`bayestune train`. Its options are those of `options.json`, which is made from the declarations of settings."""

import inspect
import json
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayestune_cli.config import read_run_file
from bayestune_cli.errors import FlagError

if TYPE_CHECKING:
    from bayestune.experiment import Result

_TYPES = {"bool": bool, "int": int, "float": float, "str": str, "names": str}
_EITHER = ("kl_learning_rate", "posterior_std")
"""Alternative settings: a flag for one replaces either in a config file."""
_OF_RECIPE = ("estimator", "kl_schedule", "posterior_scale", *_EITHER)
"""Settings that a recipe fills: --recipe replaces them in a config file, such as the record of a run."""


@cache
def _options() -> tuple[dict[str, Any], ...]:
    """The settings of a run and of its method, as `bayestune.experiment.declared` writes them."""
    return tuple(json.loads((Path(__file__).parent / "options.json").read_text(encoding="utf-8")))


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` with an option for each setting in place of its ``**given``."""
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in inspect.signature(command).parameters.values()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    made = [
        inspect.Parameter(
            option["name"],
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_TYPES[option["type"]] | None, typer.Option(help=option["help"])],
        )
        for option in _options()
    ]
    ordered = [*own[:2], *made, *own[2:]]
    command.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in ordered}
    return command


def _check_flags(given: Mapping[str, Any], method: str) -> None:
    """Raise an error for an unknown value, and for a flag of other methods, which a config file may hold."""
    for option in _options():
        name, methods, choices = option["name"], option["methods"], option["choices"]
        if choices and name in given and given[name] not in choices:
            raise FlagError(f"{name}: found {given[name]!r}, expected one of {', '.join(choices)}.")
        if methods is not None and name in given and method not in methods:
            flag = "--" + name.replace("_", "-")
            raise FlagError(f"{flag}: found it with method {method!r}, expected method {' or '.join(methods)}.")


def _check_folders(data: str | None, output: Path, *, keeps: bool) -> None:
    """Raise an error for a missing data folder, and for an output folder that holds something but no begun run."""
    if data is not None and not Path(data).is_dir():
        raise FlagError(f"--data {data}: no such folder, expected the one with the data sets.")
    found = {path.name for path in output.iterdir()} if output.is_dir() and keeps else set()
    if found and ("result.json" in found or "experiment.json" not in found):
        raise FlagError(f"output {output}: the folder is not empty; choose another, or pass --overwrite.")


@_with_settings
def train(
    output: Annotated[Path, typer.Option(help="Folder of the run: posterior/, experiment.json, result.json.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of the settings below, model and task too; flags win. Or the result.json of a "
            "run, to make it again: a warning names data, weights, versions that differ from the record."
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --output, with its settings.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
    **given: Any,
) -> None:
    """Train a posterior (or plain LoRA), evaluate it, and leave both in a run folder."""
    given = {name: value for name, value in given.items() if value is not None}
    for option in _options():
        if option["type"] == "names" and option["name"] in given:
            given[option["name"]] = [name.strip() for name in given[option["name"]].split(",")]
    if resume and config is None and not {"model", "task"} & given.keys():
        config = output / "experiment.json"
    settings, record = ({}, None) if config is None else read_run_file(config)
    replaced = _OF_RECIPE if "recipe" in given else _EITHER if set(_EITHER) & given.keys() else ()
    settings = {name: value for name, value in settings.items() if name not in replaced}
    settings.update(given)
    default = next(option["default"] for option in _options() if option["name"] == "method")
    _check_flags(given, settings.get("method", default))
    _check_folders(settings.get("data"), output, keeps=not (resume or overwrite))

    from bayestune.experiment import Experiment, run
    from bayestune.experiment.processes import is_main

    experiment = Experiment.from_dict(settings, where="train" if config is None else f"--config {config}")
    command = ["bayestune", *sys.argv[1:]]
    result = run(experiment, output, overwrite=overwrite, resume=resume, command=command, record=record, progress=True)
    if is_main():
        _show(result)


def _show(result: "Result") -> None:
    from bayestune.experiment import score_table

    if result.scores:
        print(score_table(result.scores))
    if result.posterior_std is not None:
        print(f"posterior std {result.posterior_std:.4g}, mean over weights{_scale(result.fitted)}")
    experiment = result.experiment
    if experiment.temperature_split is not None:
        print(f"temperature {result.temperature:.4g}, fitted on {experiment.temperature_split}")
    print(f"{result.output}: posterior/, experiment.json, result.json ({result.seconds:.0f} s)")


def _scale(fitted: Mapping[str, Any]) -> str:
    """How the std came of that of training, if it was scaled on held-out rows."""
    if "nll_by_scale" not in fitted:
        return ""
    return (
        f": {fitted['posterior_scale']:.3g} x that of training, {fitted['trained_std']:.4g}, chosen on "
        f"{fitted['rows']} held-out rows"
    )
