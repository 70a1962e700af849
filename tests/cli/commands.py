"""A tiny model with its data, and command lines about it; and a process that runs one and waits at a place of it."""

import importlib
import multiprocessing
import os
import resource
import signal
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bayestune_cli.app import invoke
from toys import pretrained_llama, questions, write_data, write_rows

STEPS = 6
PLACES = {
    "tokenising": "bayestune.tasks.multiple_choice.CausalMultipleChoice.encoded",
    "loading": "bayestune.experiment.run.load_base",
    "step": "bayestune.training.BayesTrainer.training_step",
    "update": "torch.optim.AdamW.step",
    "checkpoint": "bayestune.training.checkpoint.SafeTrainer._save_rng_state",
    "posterior": "bayestune.storage.saving.write_manifest",
    "evaluation": "bayestune.experiment.trained.predict",
    "record": "bayestune.experiment.run.write_json",
    "answers": "bayestune.files.replacing",
}
"""Functions that a command calls where it can be made to wait."""


def make_world(folder: Path, **settings: Any) -> Path:
    """`folder` with llama/ (model and tokenizer), data/, rows.jsonl, and whole/, a run with checkpoints."""
    pretrained_llama(folder / "llama", **settings)
    write_data(folder / "data")
    write_rows(folder / "rows.jsonl", questions(50, 4))
    assert invoke(training(folder, folder / "whole", "--checkpoint-steps", "2")) == 0
    return folder


def training(world: Path, output: Path, *flags: str) -> list[str]:
    """`bayestune train` for `STEPS` updates of BLoB."""
    given = {"model": world / "llama", "task": "colours", "data": world / "data", "steps": STEPS, "batch-size": 4}
    given |= {"learning-rate": 0.01, "rho-init": 0.5, "draws": 3, "max-tokens": 200, "output": output}
    return ["train", *(part for name, value in given.items() for part in (f"--{name}", str(value))), *flags]


def predicting(world: Path, output: Path, *flags: str) -> list[str]:
    """`bayestune predict` with that run."""
    return ["predict", str(world / "whole"), "--input", str(world / "rows.jsonl"), "--output", str(output), *flags]


def adapter(run: Path) -> bytes:
    return (run / "posterior" / "adapter_model.safetensors").read_bytes()


def processes() -> Any:
    """Where processes are started that have the packages imported already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["bayestune_cli.app", "bayestune.experiment", "transformers.models.llama.modeling_llama"]
    )
    return context


def run(place: str, call: int, arguments: list[str], talk: Connection, log: str) -> None:
    """Run the command line in this process; before the `call`-th call of a place, say so and wait for an answer.

    Output goes to `log`.out and `log`.err.
    """
    _begin(f"{log}.out", f"{log}.err")
    _wait_at(PLACES[place], call, talk)
    sys.exit(invoke(arguments))


def run_short_of_space(arguments: list[str], out: str, err: str, largest: int) -> None:
    """Run the command line in this process, with output to two files; no other may be larger than `largest` bytes."""
    _begin(out, err)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    sys.exit(invoke(arguments))


def _begin(out: str, err: str) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    torch.set_num_threads(1)
    for stream, name in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())


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
