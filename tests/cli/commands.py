"""A tiny model with its data, and command lines about it; and a process that runs one and waits at a place of it."""

import importlib
import os
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bayestune.cli.app import invoke
from toys import pretrained_llama, write_data

STEPS = 6
PLACES = {
    "tokenising": "bayestune.tasks.multiple_choice.CausalMultipleChoice.example",
    "loading": "bayestune.experiment.run.load_base",
    "step": "bayestune.training.BayesTrainer.training_step",
    "update": "torch.optim.AdamW.step",
    "checkpoint": "bayestune.training.checkpoint.SafeTrainer._save_rng_state",
    "posterior": "bayestune.posteriors.storage.write_manifest",
    "evaluation": "bayestune.experiment.run.predict",
    "record": "bayestune.experiment.run.write_json",
    "answers": "bayestune.experiment.write_text",
}
"""Functions that a command calls where it can be made to wait."""


def make_world(folder: Path) -> Path:
    """`folder` with llama/ (model and tokenizer) and data/."""
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    return folder


def training(world: Path, output: Path, *flags: str) -> list[str]:
    """`bayestune train` for `STEPS` updates of BLoB."""
    given = {"model": world / "llama", "task": "colours", "data": world / "data", "steps": STEPS, "batch-size": 4}
    given |= {"learning-rate": 0.01, "rho-init": 0.5, "draws": 3, "max-tokens": 200, "output": output}
    return ["train", *(part for name, value in given.items() for part in (f"--{name}", str(value))), *flags]


def run(place: str, call: int, arguments: list[str], talk: Connection, log: str) -> None:
    """Run the command line in this process; before the `call`-th call of a place, say so and wait for an answer.

    Output goes to `log`.out and `log`.err.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    torch.set_num_threads(1)
    for stream, name in ((sys.stdout, "out"), (sys.stderr, "err")):
        file = os.open(f"{log}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, stream.fileno())
    _wait_at(PLACES[place], call, talk)
    sys.exit(invoke(arguments))


def _wait_at(name: str, call: int, talk: Connection) -> None:
    owner, called = _owner(name), 0
    real = getattr(owner, name.rpartition(".")[2])

    def waiting(*args: Any, **kwargs: Any) -> Any:
        nonlocal called
        called += 1
        if called == call:
            talk.send("there")
            talk.recv()
        return real(*args, **kwargs)

    setattr(owner, name.rpartition(".")[2], waiting)


def _owner(name: str) -> Any:
    """The module or class that holds the function."""
    parent, _, last = name.rpartition(".")[0].rpartition(".")
    return (
        getattr(importlib.import_module(parent), last)
        if last[0].isupper()
        else importlib.import_module(f"{parent}.{last}")
    )
