"""One training run of an experiment: transformers' arguments, the KL, a progress bar, checkpoints."""

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.experiment.disk import writing
from bayestune.experiment.processes import is_main, process_count
from bayestune.experiment.progress import ProgressBar
from bayestune.experiment.settings import KL_METHODS, Experiment
from bayestune.experiment.stopping import StopAtStep
from bayestune.functional import cycle_steps, linear_kl_weight, paper_kl_weight, uniform_kl_weight
from bayestune.tasks import AnyRow, Task
from bayestune.training import (
    BayesTrainer,
    KLSettings,
    elbo_kl_weight,
    initial_std,
    kl_only_std,
    kl_rate_for_std,
    last_complete,
)
from bayestune.training.checks import check_arguments
from bayestune.training.kl import Schedule

_WARM_UP = 0.06


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What an experiment trains with, whatever its method.

    Attributes:
        task, rows: what is trained on. checkpoints: folder, removed unless `checkpoint_steps` is set.
        resume: go on from the last checkpoint. progress: show a bar on stderr.
    """

    experiment: Experiment
    task: Task
    rows: Sequence[AnyRow]
    checkpoints: Path
    resume: bool
    progress: bool

    def check(self) -> None:
        """Refuse what cannot be trained on this machine, before anything is written.

        Raises:
            ConfigError: as `BayesTrainer`.
        """
        check_arguments(TrainingArguments(**_arguments(self.experiment, self.checkpoints)))
        kl = kl_settings(self.experiment, len(self.rows))
        if kl is not None and self.experiment.posterior_std is not None:
            _warn_if_too_short(self.experiment, kl)

    def train(
        self, model: PeftModel, *, label: str, callbacks: Sequence[TrainerCallback] = (), **arguments: Any
    ) -> None:
        """Train `model` in place; `arguments` replace those of `TrainingArguments` that the experiment gives."""
        experiment = self.experiment
        given = TrainingArguments(**{**_arguments(experiment, self.checkpoints), **arguments})
        saves = given.save_strategy != "no"
        size = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        with (
            ProgressBar(f"train {label}", disable=not (self.progress and is_main())) as bar,
            # Several processes would stop at different updates, and wait for each other.
            StopAtStep(active=saves and process_count() == 1) as stop,
            writing(self.checkpoints, needed=3 * size),  # the weights, and AdamW's two moments
        ):
            trainer = BayesTrainer(
                model,
                task=self.task,
                args=given,
                train_rows=self.rows,
                kl=kl_settings(experiment, len(self.rows)),
                prior_std=experiment.map_prior_std if experiment.method == "map" else None,
                callbacks=[*callbacks, bar, stop],
            )
            trainer.remove_callback(PrinterCallback)
            last = self._last_checkpoint() if self.resume else None
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        if not saves and is_main():
            with contextlib.suppress(OSError):  # something else put a file there
                self.checkpoints.rmdir()  # the Trainer makes it all the same

    def _last_checkpoint(self) -> Path | None:
        """Where to go on from; None if the run ended before its first checkpoint."""
        last = last_complete(self.checkpoints)
        if last is None and any(self.checkpoints.glob("checkpoint-*")):
            raise ConfigError(
                f"{self.checkpoints}: found no checkpoint that is whole; to train anew, pass --overwrite."
            )
        return last


def kl_settings(experiment: Experiment, rows: int) -> KLSettings | None:
    """The KL of "blob" and "bbb"; the other methods have none."""
    if experiment.method not in KL_METHODS:
        return None
    assert experiment.batch_size is not None
    match experiment.kl_schedule:
        case "paper":
            schedule = paper_kl_weight
        case "uniform":
            schedule = uniform_kl_weight
        case "linear":
            schedule = linear_kl_weight
        case "elbo":
            schedule = elbo_kl_weight(rows)
    cycle = cycle_steps(rows, experiment.batch_size, processes=process_count())
    rate = experiment.kl_learning_rate
    if rate is None:
        assert experiment.posterior_std is not None
        rate = kl_rate_for_std(experiment.posterior_std, **_course(experiment, cycle, schedule))
    return KLSettings(cycle=cycle, schedule=schedule, learning_rate=rate)


def _course(experiment: Experiment, cycle: int, schedule: Schedule) -> dict[str, Any]:
    """The arguments of `kl_only_std` and `kl_rate_for_std` beside the rate and the width."""
    return {
        "updates": experiment.steps,
        "cycle": cycle,
        "schedule": schedule,
        "start": initial_std(experiment.rho_init),
        "prior_std": experiment.prior_std,
        "warmup": _WARM_UP,
    }


def _warn_if_too_short(experiment: Experiment, kl: KLSettings) -> None:
    """Say so where the largest rate does not take the posterior to `posterior_std` in so few updates."""
    assert experiment.posterior_std is not None
    reached = kl_only_std(kl.learning_rate, **_course(experiment, kl.cycle, kl.schedule))
    if reached < 0.99 * experiment.posterior_std:
        warnings.warn(
            f"posterior_std: {experiment.steps} updates are too few for {experiment.posterior_std:g} at the largest "
            f"KL rate, prior_std^2 = {kl.learning_rate:g}: the standard deviation ends near {reached:.3g}. Give "
            "more steps, or a smaller posterior_std.",
            BayestuneWarning,
            stacklevel=2,
        )


def _arguments(experiment: Experiment, checkpoints: Path) -> dict[str, Any]:
    assert experiment.batch_size is not None and experiment.learning_rate is not None
    decays = experiment.method == "map" and experiment.map_prior_std is None
    return {
        "output_dir": str(checkpoints),
        "seed": experiment.seed,
        "max_steps": experiment.steps,
        "per_device_train_batch_size": experiment.batch_size,
        "train_sampling_strategy": "group_by_length",
        "learning_rate": experiment.learning_rate,
        "warmup_steps": _WARM_UP,
        "weight_decay": experiment.weight_decay if decays else 0.0,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.0,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": experiment.precision == "bf16",
        "save_strategy": "steps" if experiment.checkpoint_steps else "no",
        "save_steps": max(1, experiment.checkpoint_steps),
        "save_total_limit": 2,
        "logging_steps": max(1, experiment.steps // 50),
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
