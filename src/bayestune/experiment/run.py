"""`run`: preflight, train, save, evaluate, record; and `load_run`, its way back from disk."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PrinterCallback, TrainingArguments

from bayestune.errors import ConfigError
from bayestune.experiment.backbone import (
    Backbone,
    add_adapter,
    build_task,
    default_targets,
    find_backbone,
    is_generative,
    load_base,
)
from bayestune.experiment.progress import ProgressBar
from bayestune.experiment.record import file_sha256, hardware, read_json, rows_sha256, versions, write_json
from bayestune.experiment.settings import Experiment
from bayestune.functional import cycle_steps, linear_kl_weight, paper_kl_weight, uniform_kl_weight
from bayestune.inference import Prediction, Scores, evaluate, predict
from bayestune.posteriors import load_posterior, save_posterior
from bayestune.tasks import AnyRow, Task
from bayestune.training import BayesTrainer, KLSettings, elbo_kl_weight, last_complete

POSTERIOR, CHECKPOINTS, RESULT, EXPERIMENT = "posterior", "checkpoints", "result.json", "experiment.json"


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave; `scores` and `predictions` by "mle", or "blob_n0" (the mean) and "blob_n10" (10 draws)."""

    experiment: Experiment
    output: Path
    scores: dict[str, Scores]
    predictions: dict[str, Prediction]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained run, loaded: its settings, its task and its model."""

    experiment: Experiment
    task: Task
    model: PeftModel

    def predict(
        self, rows: Sequence[AnyRow], *, draws: int, seed: int = 0, task: Task | None = None, progress: bool = False
    ) -> Prediction:
        """`bayestune.predict` in the run's own precision; `task` asks another task of the same model."""
        with _autocast(self.experiment):
            return predict(self.model, task or self.task, rows, draws=draws, seed=seed, progress=progress)


def run(
    experiment: Experiment,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    command: Sequence[str] = (),
    progress: bool = False,
) -> Result:
    """Train and evaluate `experiment`; leave posterior/, experiment.json and, last of all, result.json in `output`.

    Every row of both splits is read, checked and tokenised before any weights are loaded or any file is touched.

    Args:
        overwrite: replace a run that is in `output`. resume: go on from the last of its checkpoints.
        command: recorded in result.json. progress: show bars on stderr.

    Raises:
        ConfigError, DataError, TaskError: a setting or a row that cannot be used; nothing was trained or written.
        TrainingError: training was stopped because the loss or a gradient was no longer finite.
    """
    started, output = time.monotonic(), Path(output)
    backbone = find_backbone(experiment.model)
    experiment, task = _resolve(experiment, backbone)
    assert experiment.eval_split is not None
    train_rows, eval_rows = task.rows(experiment.train_split), task.rows(experiment.eval_split)
    task.check(train_rows)
    task.check(eval_rows)
    _check_output(output, experiment, overwrite=overwrite, resume=resume)
    base, new = load_base(backbone, task, experiment)
    task_type = "CAUSAL_LM" if is_generative(backbone, task) else None
    model = add_adapter(base, experiment, new=new, task_type=task_type)
    _prepare(output, experiment, resume=resume)
    _train(model, task, train_rows, experiment, output, resume=resume, progress=progress)
    save_posterior(model, output / POSTERIOR, overwrite=resume)
    finished = Run(experiment=experiment, task=task, model=model)
    predictions = {
        key: finished.predict(eval_rows, draws=draws, progress=progress)
        for key, draws in _evaluations(experiment).items()
    }
    scores = {key: evaluate(prediction) for key, prediction in predictions.items()}
    seconds = time.monotonic() - started
    record = {
        "seed": experiment.seed,
        "task": task.name,
        "split": experiment.eval_split,
        "method": experiment.method,
        "methods": {key: value.as_dict() for key, value in scores.items()},
        "experiment": experiment.as_dict(),
        "command": list(command),
        "steps": experiment.steps,
        "seconds": round(seconds, 1),
        "rows": {"train": len(train_rows), "eval": len(eval_rows)},
        "sha256": _hashes(backbone, train_rows, eval_rows, output),
        "versions": versions(),
        "hardware": hardware(),
    }
    write_json(output / RESULT, record)
    return Result(experiment=experiment, output=output, scores=scores, predictions=predictions, seconds=seconds)


def load_run(folder: str | Path, *, data: str | Path | None = None) -> Run:
    """The trained run in `folder`, in evaluation mode; `data` replaces the data folder it was trained with.

    Raises:
        ConfigError: not the folder of a finished run. PosteriorError: its posterior is incomplete or altered.
    """
    folder = Path(folder)
    what = "the folder of a finished run, as `bayestune train --output` makes it"
    if not (folder / RESULT).is_file():
        raise ConfigError(f"{folder}: found no {RESULT}, expected {what}.")
    experiment = Experiment.from_dict(read_json(folder / EXPERIMENT, what), where=str(folder / EXPERIMENT))
    if data is not None:
        experiment = dataclasses.replace(experiment, data=str(data))
    backbone = find_backbone(experiment.model)
    experiment, task = _resolve(experiment, backbone)
    base, _ = load_base(backbone, task, experiment)
    return Run(experiment=experiment, task=task, model=load_posterior(base, folder / POSTERIOR))


def other_task(trained: Run, name: str) -> Task:
    """Another data set, asked of a trained run in the same way and from the same data folder.

    Raises:
        ConfigError: it is scored in another way than the run's own task.
    """
    experiment, own = trained.experiment, trained.task
    assert experiment.max_tokens is not None
    task = build_task(find_backbone(experiment.model), name, experiment.data, experiment.max_tokens)
    if task.kind != own.kind or (task.kind == "text" and task.classes != own.classes):
        raise ConfigError(
            f"data set {name}: found kind {task.kind!r} with {task.classes} classes, expected {own.kind!r} with "
            f"{own.classes} as in {own.name}, which the run was trained on."
        )
    return task


def _resolve(experiment: Experiment, backbone: Backbone) -> tuple[Experiment, Task]:
    """The experiment with its defaults filled in, and its task."""
    experiment = experiment.resolved(backbone.family)
    assert experiment.max_tokens is not None
    task = build_task(backbone, experiment.task, experiment.data, experiment.max_tokens)
    targets = experiment.target_modules or default_targets(backbone)
    split = experiment.eval_split or task.spec.evaluation
    return dataclasses.replace(experiment, target_modules=targets, eval_split=split), task


def _check_output(output: Path, experiment: Experiment, *, overwrite: bool, resume: bool) -> None:
    """Refuse to touch a folder that is not ours to touch."""
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output {output}: found a file, expected a folder or nothing.")
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    if resume:
        if (output / RESULT).exists():
            raise ConfigError(f"output {output}: this run is finished, there is nothing to resume.")
        saved = read_json(output / EXPERIMENT, "the settings of the run to resume")
        changed = [name for name, value in experiment.as_dict().items() if saved.get(name) != value]
        if changed:
            name = changed[0]
            raise ConfigError(
                f"output {output}: cannot resume with {name}={experiment.as_dict()[name]!r}, the run has "
                f"{saved.get(name)!r}; use its settings, or another --output."
            )
    elif found and not overwrite:
        raise ConfigError(f"output {output}: the folder is not empty; choose another, or pass --overwrite.")
    elif found and EXPERIMENT not in found:
        raise ConfigError(f"output {output}: found files but no {EXPERIMENT}: this is no run, and is not overwritten.")


def _prepare(output: Path, experiment: Experiment, *, resume: bool) -> None:
    """Make the folder, empty of any earlier run, and record the settings that a resumed run is compared with."""
    output.mkdir(parents=True, exist_ok=True)
    if resume:
        return
    (output / RESULT).unlink(missing_ok=True)
    for name in (POSTERIOR, CHECKPOINTS):
        if (output / name).exists():
            shutil.rmtree(output / name)
    write_json(output / EXPERIMENT, experiment.as_dict())


def _train(
    model: PeftModel,
    task: Task,
    rows: Sequence[AnyRow],
    experiment: Experiment,
    output: Path,
    *,
    resume: bool,
    progress: bool,
) -> None:
    assert experiment.batch_size is not None and experiment.learning_rate is not None
    checkpoints = output / CHECKPOINTS
    arguments = TrainingArguments(
        output_dir=str(checkpoints),
        seed=experiment.seed,
        max_steps=experiment.steps,
        per_device_train_batch_size=experiment.batch_size,
        train_sampling_strategy="group_by_length",
        learning_rate=experiment.learning_rate,
        warmup_steps=0.06,
        adam_epsilon=1e-6,
        max_grad_norm=0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=experiment.precision == "bf16",
        save_strategy="steps" if experiment.checkpoint_steps else "no",
        save_steps=max(1, experiment.checkpoint_steps),
        save_total_limit=2,
        logging_steps=max(1, experiment.steps // 50),
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    kl = _kl_settings(experiment, len(rows))
    with ProgressBar(f"train {experiment.method}", disable=not progress) as bar:
        trainer = BayesTrainer(model, task=task, args=arguments, train_rows=rows, kl=kl, callbacks=[bar])
        trainer.remove_callback(PrinterCallback)
        last = last_complete(checkpoints) if resume else None
        trainer.train(resume_from_checkpoint=None if last is None else str(last))
    if not experiment.checkpoint_steps:
        checkpoints.rmdir()


def _kl_settings(experiment: Experiment, rows: int) -> KLSettings | None:
    if experiment.method == "mle":
        return None
    assert experiment.batch_size is not None and experiment.kl_learning_rate is not None
    match experiment.kl_schedule:
        case "paper":
            schedule = paper_kl_weight
        case "uniform":
            schedule = uniform_kl_weight
        case "linear":
            schedule = linear_kl_weight
        case "elbo":
            schedule = elbo_kl_weight(rows)
    return KLSettings(
        cycle=cycle_steps(rows, experiment.batch_size), schedule=schedule, learning_rate=experiment.kl_learning_rate
    )


def _evaluations(experiment: Experiment) -> dict[str, int]:
    """Number of draws of each evaluation, by its key."""
    if experiment.method == "mle":
        return {"mle": 0}
    return {f"{experiment.method}_n{draws}": draws for draws in (0, experiment.draws)}


def _hashes(
    backbone: Backbone, train_rows: Sequence[AnyRow], eval_rows: Sequence[AnyRow], output: Path
) -> dict[str, Any]:
    weights = sorted(Path(backbone.source).glob("*.safetensors")) if Path(backbone.source).is_dir() else []
    return {
        "base": {path.name: file_sha256(path) for path in weights},
        "adapter": file_sha256(output / POSTERIOR / "adapter_model.safetensors"),
        "train_rows": rows_sha256(train_rows),
        "eval_rows": rows_sha256(eval_rows),
    }


def _autocast(experiment: Experiment) -> contextlib.AbstractContextManager[Any]:
    if experiment.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)
