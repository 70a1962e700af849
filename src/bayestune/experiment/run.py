"""`run`: preflight, train, save, evaluate, record; and `load_run`, its way back from disk."""

import contextlib
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.experiment.backbone import (
    Backbone,
    build_task,
    default_targets,
    find_backbone,
    is_generative,
    load_base,
)
from bayestune.experiment.disk import writing
from bayestune.experiment.fitting import autocast, fitting
from bayestune.experiment.folder import (
    CHECKPOINTS,
    EXPERIMENT,
    POSTERIOR,
    RESULT,
    check_output,
    earlier_run,
    run_folder,
)
from bayestune.experiment.overlap import count_repeated
from bayestune.experiment.processes import is_main
from bayestune.experiment.provenance import provenance, warn_if_other
from bayestune.experiment.record import file_sha256, read_json, write_json
from bayestune.experiment.settings import Experiment
from bayestune.experiment.start import Start
from bayestune.experiment.train import Training
from bayestune.functional import std
from bayestune.inference import Prediction, Scores, evaluate, predict
from bayestune.methods import Posterior, Updates, fit_temperature, load, save_posterior
from bayestune.storage.state import adapter_tensors
from bayestune.tasks import AnyRow, Task


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run gave; `scores` and `predictions` by "mle", or "blob_n0" (the mean) and "blob_n10" (10 draws).

    A point, an ensemble and a closed-form predictive have one entry, called as the method.
    """

    experiment: Experiment
    output: Path
    scores: dict[str, Scores]
    predictions: dict[str, Prediction]
    seconds: float
    temperature: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained run, loaded: its settings, its task and its posterior."""

    experiment: Experiment
    task: Task
    posterior: Posterior

    @property
    def model(self) -> PeftModel:
        """The model with the posterior's mean, mode or first member."""
        return self.posterior.model

    @property
    def default_draws(self) -> int:
        """The draws that the run was evaluated with: 0 for a point, K for an ensemble."""
        return self.experiment.method.draw_counts(self.experiment.draws)[-1]

    def evaluations(self) -> dict[str, int]:
        """Number of draws of each evaluation, by its key: the method's name, with the draws if there are several."""
        counts, name = self.experiment.method.draw_counts(self.experiment.draws), self.experiment.method.name
        return {name: counts[0]} if len(counts) == 1 else {f"{name}_n{draws}": draws for draws in counts}

    def predict(
        self, rows: Sequence[AnyRow], *, draws: int, seed: int = 0, task: Task | None = None, progress: bool = False
    ) -> Prediction:
        """`bayestune.predict` in the run's own precision; `task` asks another task of the same model."""
        with autocast(self.experiment):
            return predict(self.posterior, task or self.task, rows, draws=draws, seed=seed, progress=progress)


def run(
    experiment: Experiment,
    output: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    command: Sequence[str] = (),
    record: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> Result:
    """Train and evaluate `experiment`; leave posterior/, experiment.json and, last of all, result.json in `output`.

    Every row of both splits is read, checked and tokenised before any weights are loaded or any file is touched.
    Under `accelerate launch` the processes train together on batches of `batch_size` rows each; the main one alone
    writes, evaluates and has scores to return.

    Args:
        overwrite: replace a run that is in `output`; it comes back if the new one ends with nothing to show.
        resume: go on from the last of its checkpoints.
        command: recorded in result.json. progress: show bars on stderr.
        record: what result.json of an earlier run held, to make that again; a warning names what differs here.

    Raises:
        ConfigError, DataError, TaskError: a setting or a row that cannot be used, or another process makes a run in
            `output`; nothing was trained or written.
        TrainingError: training was stopped because the loss or a gradient was no longer finite.
        DiskError: a file cannot be written; the last checkpoint is whole.
    """
    started, output = time.monotonic(), Path(output)
    backbone = find_backbone(experiment.model)
    experiment, task = _resolve(experiment, backbone)
    rows = _Rows.of(experiment, task)
    if is_main():
        check_output(output, experiment, overwrite=overwrite, resume=resume)
    repeated = _repeated(experiment, rows) if is_main() else {}
    base, new = load_base(backbone, task, experiment)
    start = Start(base=base, new=new, task_type="CAUSAL_LM" if is_generative(backbone, task) else None)
    model, experiment = start.model(experiment)
    training = Training(
        experiment=experiment,
        task=task,
        rows=rows.train,
        checkpoints=output / CHECKPOINTS,
        resume=resume,
        progress=progress,
    )
    training.check(model)
    origin = provenance(backbone, rows.by_use(), experiment.adapter) if is_main() else {}
    warn_if_other(record or {}, origin)
    folder = run_folder(output, experiment, overwrite=overwrite, resume=resume)
    with writing(output), folder if is_main() else contextlib.nullcontext():
        posterior = experiment.method.fit(model, fitting(training, start, rows.more))
        if not is_main():
            return Result(experiment=experiment, output=output, scores={}, predictions={}, seconds=0.0)
        _save(posterior, training, rows.temperature, output / POSTERIOR)
        finished = Run(experiment=experiment, task=task, posterior=posterior)
        predictions = {
            key: finished.predict(rows.evaluation, draws=draws, progress=progress)
            for key, draws in finished.evaluations().items()
        }
        result = Result(
            experiment=experiment,
            output=output,
            scores={key: evaluate(prediction) for key, prediction in predictions.items()},
            predictions=predictions,
            seconds=time.monotonic() - started,
            temperature=posterior.temperature,
        )
        weights = {"adapter": file_sha256(output / POSTERIOR / "adapter_model.safetensors")}
        origin["sha256"] = {**weights, **origin["sha256"]}
        content = {**_record(result, rows, command), **origin, "repeated_rows": repeated}
        write_json(output / RESULT, {**content, "kl": _kl(finished, training.updates)})
    return result


def _save(posterior: Posterior, training: Training, temperature_rows: Sequence[AnyRow], folder: Path) -> None:
    """Save the posterior, before and after its temperature is fitted, and remove an empty folder of checkpoints."""
    if not training.experiment.checkpoint_steps and training.checkpoints.is_dir():
        with contextlib.suppress(OSError):
            training.checkpoints.rmdir()
    copies = 1 + len(posterior.more_members())
    size = copies * sum(tensor.nbytes for tensor in adapter_tensors(posterior.model, "default").values())
    with writing(folder, needed=size + sum(tensor.nbytes for tensor in posterior.tensors().values())):
        save_posterior(posterior, folder, overwrite=training.resume)
        if temperature_rows:
            posterior.temperature = _temperature(posterior, training, temperature_rows)
            save_posterior(posterior, folder, overwrite=True)


def _temperature(posterior: Posterior, training: Training, rows: Sequence[AnyRow]) -> float:
    """The temperature on held-out rows, at the number of draws that the posterior is evaluated with."""
    experiment = training.experiment
    with autocast(experiment):
        found = predict(
            posterior, training.task, rows, draws=experiment.method.draw_counts(experiment.draws)[-1], seed=0
        )
    return fit_temperature(found.draw_log_probs, found.labels)


def _own_splits(experiment: Experiment) -> dict[str, str]:
    """The splits that settings of the method name, by setting."""
    settings = dict(experiment.method)
    return {name: settings[name] for name in experiment.method.splits if settings[name] is not None}


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of a run, each of them usable; `temperature` is empty where no split is named.

    `more` has those of the splits that settings of the method name, by setting.
    """

    train: list[AnyRow]
    evaluation: list[AnyRow]
    more: dict[str, list[AnyRow]]
    temperature: list[AnyRow]

    @classmethod
    def of(cls, experiment: Experiment, task: Task) -> "_Rows":
        return cls(
            train=_checked(task, experiment.train_split),
            evaluation=_checked(task, experiment.eval_split),
            more={name: _checked(task, split) for name, split in _own_splits(experiment).items()},
            temperature=_checked(task, experiment.temperature_split),
        )

    def by_use(self) -> dict[str, list[AnyRow]]:
        """As `provenance` takes them."""
        more = {name.removesuffix("_split"): rows for name, rows in self.more.items()}
        return {"train": self.train, "eval": self.evaluation, **more, "temperature": self.temperature}


def _repeated(experiment: Experiment, rows: _Rows) -> dict[str, dict[str, int]]:
    """How many of the scored rows are also in each split that the run learns from; warns where any are."""
    assert experiment.eval_split is not None
    used = {
        experiment.train_split: rows.train,
        experiment.temperature_split: rows.temperature,
        **{split: rows.more[name] for name, split in _own_splits(experiment).items()},
    }
    named = {name: found for name, found in used.items() if name is not None}
    return count_repeated(rows.evaluation, experiment.eval_split, named)


def _record(result: Result, rows: _Rows, command: Sequence[str]) -> dict[str, Any]:
    """What result.json holds, beside its `provenance` and the KL."""
    experiment = result.experiment
    return {
        "seed": experiment.seed,
        "task": experiment.task,
        "split": experiment.eval_split,
        "method": experiment.method.name,
        "methods": {key: value.as_dict() for key, value in result.scores.items()},
        "experiment": experiment.as_dict(),
        "command": list(command),
        "temperature": result.temperature,
        "steps": experiment.steps,
        "seconds": round(result.seconds, 1),
        "rows": {"train": len(rows.train), "eval": len(rows.evaluation)},
    }


def _kl(trained: Run, updates: Updates) -> dict[str, Any] | None:
    """The KL's cycle (updates) and rate, and the mean standard deviation that came of them; None without a KL."""
    kl = trained.experiment.method.kl(updates)
    if kl is None:
        return None
    widths = torch.cat([std(layer.rho.detach()).flatten() for layer in gaussian_layers(trained.model).values()])
    return {"cycle": kl.cycle, "learning_rate": kl.learning_rate, "std": widths.mean().item()}


def load_run(folder: str | Path, *, data: str | Path | None = None) -> Run:
    """The trained run in `folder`, in evaluation mode; `data` replaces the data folder it was trained with.

    Raises:
        ConfigError: not the folder of a finished run. PosteriorError: its posterior is incomplete or altered.
    """
    folder = Path(folder)
    what = "the folder of a finished run, as `bayestune train --output` makes it"
    if not (folder / RESULT).is_file():
        waiting = earlier_run(folder)
        hint = f" The run that was to be replaced there waits in {waiting}." if waiting.is_dir() else ""
        hint = hint or (" Go on with it: train --resume." if (folder / EXPERIMENT).is_file() else "")
        raise ConfigError(f"{folder}: found no {RESULT}, expected {what}.{hint}")
    experiment = Experiment.from_dict(read_json(folder / EXPERIMENT, what), where=str(folder / EXPERIMENT))
    if data is not None:
        experiment = experiment.replace(data=str(data))
    backbone = find_backbone(experiment.model)
    experiment, task = _resolve(experiment, backbone)
    base, _ = load_base(backbone, task, experiment)
    posterior = load(base, folder / POSTERIOR)
    recorded = read_json(folder / RESULT, what).get("sha256", {}).get("adapter")
    if recorded != file_sha256(folder / POSTERIOR / "adapter_model.safetensors"):
        message = f"{folder}: the posterior is not the one that {RESULT} was made with; its scores are of another."
        warnings.warn(message, BayestuneWarning, stacklevel=2)
    return Run(experiment=experiment, task=task, posterior=posterior)


def other_task(trained: Run, name: str) -> Task:
    """Another data set, asked of a trained run in the same way and from the same data folder.

    Raises:
        ConfigError: it is scored in another way than the run's own task.
    """
    experiment, own = trained.experiment, trained.task
    assert experiment.max_tokens is not None
    task = build_task(find_backbone(experiment.model), name, experiment.data, experiment.max_tokens)
    if task.kind != own.kind or (task.kind == "text" and task.columns != own.columns):
        raise ConfigError(
            f"data set {name}: found kind {task.kind!r} with {task.columns} classes, expected {own.kind!r} with "
            f"{own.columns} as in {own.name}, which the run was trained on."
        )
    return task


def _resolve(experiment: Experiment, backbone: Backbone) -> tuple[Experiment, Task]:
    """The experiment with its defaults filled in, and its task."""
    experiment = experiment.resolved(backbone.family)
    assert experiment.max_tokens is not None
    task = build_task(backbone, experiment.task, experiment.data, experiment.max_tokens)
    targets = experiment.target_modules or default_targets(backbone, task)
    split = experiment.eval_split or task.spec.evaluation
    for name, used in {**_own_splits(experiment), "temperature_split": experiment.temperature_split or ""}.items():
        shared = set(used.split("+")) & set(split.split("+"))
        if shared:
            raise ConfigError(
                f"{name}: found {min(shared)!r}, which the run is scored on; choose other rows, or another "
                "--eval-split."
            )
    return experiment.replace(target_modules=targets, eval_split=split), task


def _checked(task: Task, split: str | None) -> list[AnyRow]:
    """The rows of a split, each of them usable; none for None."""
    rows = [] if split is None else task.rows(split)
    task.check(rows)
    return rows
