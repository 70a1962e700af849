"""Describe a run to the method that is fitted in it."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bayestune.experiment.processes import is_main
from bayestune.experiment.settings import Experiment
from bayestune.experiment.start import Start, adapter_file
from bayestune.experiment.train import Training
from bayestune.methods import Fitting, load
from bayestune.storage import load_posterior, save_posterior
from bayestune.tasks import AnyRow


def autocast(experiment: Experiment) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the model computes in the experiment's precision."""
    if experiment.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)


def fitting(
    training: Training, start: Start, more_rows: Mapping[str, Sequence[AnyRow]], found: dict[str, Any]
) -> Fitting:
    """Return what the method may use of the run of `training`."""
    experiment = training.experiment
    assert experiment.learning_rate is not None
    return Fitting(
        task=training.task,
        rows=training.rows,
        more_rows=more_rows,
        seed=experiment.seed,
        learning_rate=experiment.learning_rate,
        draws=experiment.draws,
        tempered=experiment.temperature_split is not None,
        started=experiment.adapter is not None,
        folder=training.checkpoints,
        checkpoints=experiment.checkpoint_steps > 0,
        resume=training.resume,
        progress=training.progress,
        found=found,
        train=training.train,
        renew=lambda model, seed: start.renew(model, experiment, seed),
        keep=_keep,
        restore=lambda model, folder: load_posterior(model.unload(), folder),
        load=lambda model, folder: load(model.unload(), adapter_file(folder).parent),
        precision=lambda: autocast(experiment),
    )


def _keep(model: PeftModel, folder: Path) -> None:
    if is_main():
        save_posterior(model, folder, overwrite=True)
