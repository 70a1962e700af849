"""Train an adapter for an experiment, with its training arguments, KL, progress bar and checkpoints."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations

from bayestune.errors import ConfigError
from bayestune.experiment.processes import is_main, process_count
from bayestune.experiment.progress import ProgressBar
from bayestune.experiment.settings import Experiment
from bayestune.experiment.stopping import StopAtStep
from bayestune.files import writing
from bayestune.methods import METHODS, Updates
from bayestune.tasks import AnyRow, Task, TokenizedTask
from bayestune.training import BayesTrainer, last_complete
from bayestune.training.checks import check_arguments
from bayestune.training.sharding import asked_by_launcher, to_device

_WARM_UP = 0.06


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What an experiment trains with, the same for every method.

    Attributes:
        experiment: the settings.
        task: the task to train on.
        rows: its training rows.
        checkpoints: the folder of checkpoints; removed unless `checkpoint_steps` is set.
        resume: continue from the last checkpoint.
        progress: show a bar on stderr.
    """

    experiment: Experiment
    task: TokenizedTask
    rows: Sequence[AnyRow]
    checkpoints: Path
    resume: bool
    progress: bool

    def check(self, model: PeftModel) -> None:
        """Check that the run can be trained here, and warn if model and task fit badly, before anything is written.

        Raises:
            ConfigError: the tracker is not installed, the task has no temperature to fit, or as `BayesTrainer` and
                the method's own checks.
        """
        tracker = self.experiment.report_to
        if tracker not in ("none", *get_available_reporting_integrations()):
            raise ConfigError(f"report_to {tracker!r} needs the package {tracker}: install it.")
        check_arguments(TrainingArguments(**_arguments(self.experiment, self.checkpoints)))
        if asked_by_launcher():
            _check_sharded(self.experiment)
        self.experiment.method.check_task(self.task)
        if self.experiment.temperature_split is not None and not self.task.has_temperature:
            raise ConfigError(f"temperature_split: found one for {self.task.name}, whose answers have no temperature.")
        self.experiment.method.check(model, self.updates)
        if is_main() and not self.resume and self.experiment.adapter is None and not asked_by_launcher():
            self.task.advise(model, self.rows)

    @property
    def updates(self) -> Updates:
        """The number, size and schedule of the training updates."""
        assert self.experiment.batch_size is not None
        return Updates(
            steps=self.experiment.steps,
            rows=len(self.rows),
            batch_size=self.experiment.batch_size,
            processes=process_count(),
            warmup=_WARM_UP,
        )

    def train(
        self,
        model: PeftModel,
        *,
        label: str,
        task: Task | None = None,
        rows: Sequence[AnyRow] | None = None,
        seed: int | None = None,
        folder: Path | None = None,
        resume: bool | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **arguments: Any,
    ) -> None:
        """Train the adapter of `model` in place; the progress bar shows `label`.

        `task`, `rows`, `seed`, `folder`, `resume` and `**arguments` (of `TrainingArguments`) replace those of the
        experiment, and `optimizer` replaces AdamW.
        """
        method, folder = self.experiment.method, folder or self.checkpoints
        seeded = {} if seed is None else {"seed": seed}
        given = TrainingArguments(**{**_arguments(self.experiment, folder), **seeded, **arguments})
        saves = given.save_strategy != "no"
        size = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
        with (
            contextlib.closing(ProgressBar(f"train {label}", disable=not (self.progress and is_main()))) as bar,
            # Several processes would stop at different updates and then wait for each other.
            StopAtStep(active=saves and process_count() == 1) as stop,
            writing(folder, needed=3 * size),  # the weights, and two states of the optimizer
        ):
            trainer = BayesTrainer(
                model,
                task=task or self.task,
                args=given,
                train_rows=rows or self.rows,
                kl=method.kl(self.updates),
                prior_std=method.weight_prior_std(),
                optimizer=optimizer,
                callbacks=[*callbacks, bar, stop],
            )
            trainer.remove_callback(PrinterCallback)
            last = _last_checkpoint(folder) if (self.resume if resume is None else resume) else None
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
            sharded = trainer.is_fsdp_enabled
            del trainer  # with its shards
            if sharded and is_main():  # the main process continues alone, with the whole model
                to_device(model, given.device)
        if not saves and is_main():
            with contextlib.suppress(OSError):  # the folder is not empty
                folder.rmdir()  # the Trainer creates it even if it saves nothing


def _check_sharded(experiment: Experiment) -> None:
    """Raise an error for a run that would use the whole base in every process before or after its training."""
    if experiment.adapter is None and experiment.method.one_training:
        return
    what = f"method {experiment.method.name!r}" if experiment.adapter is None else f"adapter {experiment.adapter!r}"
    known = ", ".join(sorted(name for name, method in METHODS.items() if method.one_training))
    raise ConfigError(
        f"FSDP: found {what}, expected a method that trains exactly one new adapter ({known}); run it without FSDP."
    )


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to continue from; None if the run ended before its first one."""
    last = last_complete(folder)
    if last is None and any(folder.glob("checkpoint-*")):
        raise ConfigError(f"{folder}: found no complete checkpoint; pass --overwrite to train from the start.")
    return last


def _arguments(experiment: Experiment, checkpoints: Path) -> dict[str, Any]:
    assert experiment.batch_size is not None and experiment.learning_rate is not None
    return {
        "output_dir": str(checkpoints),
        "seed": experiment.seed,
        "max_steps": experiment.steps,
        "per_device_train_batch_size": experiment.batch_size,
        "train_sampling_strategy": "group_by_length",
        "learning_rate": experiment.learning_rate,
        "warmup_steps": _WARM_UP,
        "weight_decay": 0.0,
        "adam_epsilon": 1e-6,
        "max_grad_norm": 0.0,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": experiment.precision == "bf16",
        "activation_checkpointing": experiment.activation_checkpointing,
        "save_strategy": "steps" if experiment.checkpoint_steps else "no",
        "save_steps": max(1, experiment.checkpoint_steps),
        "save_total_limit": 2,
        "logging_steps": max(1, experiment.steps // 50),
        "disable_tqdm": True,
        "report_to": experiment.report_to,
        "dataloader_pin_memory": torch.cuda.is_available(),
        **experiment.method.training_arguments(),
    }
