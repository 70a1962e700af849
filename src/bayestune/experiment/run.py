"""`run` checks, trains, saves, evaluates and records an experiment."""

import contextlib
import random
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor

from bayestune.adapters import gaussian_layers, mean_std
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.experiment.backbone import find_backbone, load_base
from bayestune.experiment.fitting import autocast, fitting
from bayestune.experiment.folder import (
    CHECKPOINTS,
    EXPERIMENT,
    POSTERIOR,
    RESULT,
    SHOTS,
    TRAINED,
    check_output,
    is_trained,
    run_folder,
)
from bayestune.experiment.processes import is_main
from bayestune.experiment.provenance import differences, provenance, warn_if_other
from bayestune.experiment.record import row_json
from bayestune.experiment.rows import RunRows, own_files
from bayestune.experiment.settings import Experiment
from bayestune.experiment.start import Start
from bayestune.experiment.train import Training
from bayestune.experiment.trained import Run, asked_as, resolve
from bayestune.files import file_sha256, read_json, write_json, write_text, writing
from bayestune.functional import derive_seed
from bayestune.inference import evaluate, features, predict
from bayestune.methods import Posterior, load, save_posterior, temperature_of
from bayestune.storage.manifest import TENSOR_FILE
from bayestune.storage.state import adapter_tensors
from bayestune.tasks import AnyRow
from bayestune.training.sharding import asked_by_launcher

KNOWN_ROWS = 1000
"""The largest number of training rows whose features a run keeps."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The result of a run.

    `scores` and `predictions` are keyed by the method's name, followed by "_n0" (the mean) or "_n10" (10 draws) if
    the method can be evaluated at several numbers of draws. `posterior_std` is the mean over all Gaussian weights.
    `fitted` holds what the method fitted after training, such as the scale of that std. `seconds` is wall-clock time.
    """

    experiment: Experiment
    output: Path
    scores: dict[str, Any]  # the task's `AnyScores`
    predictions: dict[str, Any]  # its `AnyPrediction`
    seconds: float
    temperature: float = 1.0
    posterior_std: float | None = None
    fitted: Mapping[str, Any] = field(default_factory=dict)


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
    """Train and evaluate `experiment`; write posterior/, experiment.json and, last of all, result.json to `output`.

    Rows are checked before weights are loaded or files touched. Under `accelerate launch` the processes train
    together; only the main process writes, evaluates and returns scores.

    Args:
        experiment: the settings.
        output: the folder of the run.
        overwrite: replace the run in `output`. If the new run fails before its first checkpoint, the old one is
            restored.
        resume: continue from the last checkpoint, or only compute the scores if the posterior is complete.
        command: the command line to record in result.json.
        record: the result.json of an earlier run that this one repeats; a warning names what differs.
        progress: show progress bars on stderr.

    Raises:
        ConfigError, DataError, TaskError: a setting or a row cannot be used, or another process is writing a run to
            `output`; nothing was trained or written.
        TrainingError: training was stopped because the loss or a gradient was no longer finite.
        DiskError: a file cannot be written; the last checkpoint is complete.
    """
    started, output = time.monotonic(), Path(output)
    trained = resume and is_trained(output)
    ready = _prepared(experiment, output, overwrite, resume, progress, record)
    experiment = ready.training.experiment
    warn_if_other(record or {}, ready.origin)
    if not is_main():
        if not trained:
            _fit(ready, {})
        return Result(experiment=experiment, output=output, scores={}, predictions={}, seconds=0.0)
    with writing(output), run_folder(output, experiment, overwrite=overwrite, resume=resume):
        posterior, made = _restored(ready, output) if trained else _trained(ready, output, started)
        if trained:
            started -= made["seconds"]
        result = _scored(posterior, ready, output, started, made)
        hashes = {**made["sha256"], "adapter": file_sha256(output / POSTERIOR / TENSOR_FILE)}
        more = {"sha256": hashes, "repeated_rows": ready.repeated}
        write_json(output / RESULT, {**made, **_record(result, ready.rows, command), **more})
        (output / TRAINED).unlink()
    return result


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """A run with its model loaded and its settings and rows checked; nothing is trained or written yet."""

    training: Training
    start: Start
    model: PeftModel
    rows: RunRows
    origin: dict[str, Any]
    repeated: dict[str, dict[str, int]]


def _prepared(
    experiment: Experiment,
    output: Path,
    overwrite: bool,
    resume: bool,
    progress: bool,
    record: Mapping[str, Any] | None,
) -> _Prepared:
    backbone = find_backbone(experiment.model)
    settings = {} if record is None else record.get("experiment", {})
    if resume and (output / EXPERIMENT).is_file():
        settings = read_json(output / EXPERIMENT, "the settings of the run to resume")
    scores, shots = resume and is_trained(output), None
    if scores and "prompt" in settings:  # the run that it started from may have changed by now
        experiment, shots = asked_as(experiment, output, settings)
    older = bool(settings) and "prompt" not in settings
    experiment, task = resolve(experiment, backbone, shots=shots, older=older, finished=scores)
    rows = RunRows.of(experiment, task)
    if is_main():
        check_output(output, experiment, overwrite=overwrite, resume=resume)
    repeated = rows.repeated(experiment) if is_main() else {}
    # A base that is to be sharded may not fit on one GPU.
    base, new = load_base(backbone, task, experiment, device="cpu" if asked_by_launcher() and not scores else None)
    start = Start(base=base, new=new, task_type="CAUSAL_LM" if task.generates else None)
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
    used = {**rows.by_use(), "shots": list(task.worked)}
    origin = provenance(backbone, used, experiment) if is_main() else {}
    return _Prepared(training=training, start=start, model=model, rows=rows, origin=origin, repeated=repeated)


def _fit(ready: _Prepared, found: dict[str, Any]) -> Posterior:
    files = own_files(ready.training.experiment)  # which every process trains on
    more = {name: rows for name, rows in ready.rows.more.items() if is_main() or name in files}
    job = fitting(ready.training, ready.start, more, found)
    return ready.training.experiment.method.fit(ready.model, job)


def _trained(ready: _Prepared, output: Path, started: float) -> tuple[Posterior, dict[str, Any]]:
    """Train and save the posterior; return it and the part of result.json about the training."""
    fitted: dict[str, Any] = {}
    if ready.training.task.worked:
        write_text(output / SHOTS, "".join(f"{row_json(row)}\n" for row in ready.training.task.worked))
    known = _known(ready)  # features of the frozen base, computed first so that an error shows before training
    posterior = _fit(ready, fitted)
    posterior.known = known
    layers = gaussian_layers(posterior.model).values()
    std = mean_std(layers) if layers else None
    seconds, kl = time.monotonic() - started, _kl(ready.training, fitted.get("trained_std", std))
    made = {**ready.origin, "kl": kl, "posterior_std": std, "fitted": fitted, "seconds": seconds}
    write_json(output / TRAINED, made)
    _save(posterior, ready.training, output / POSTERIOR)
    return posterior, made


def _known(ready: _Prepared) -> Tensor | None:
    """Return the features of the training rows, or of a sample, for `novelty`; None if the model has none."""
    training, rows = ready.training, ready.rows.train
    experiment = training.experiment
    if asked_by_launcher():  # a base that needs FSDP is on the CPU now, where its features would take hours
        return None
    if len(rows) > KNOWN_ROWS:
        rows = random.Random(derive_seed("known", experiment.seed)).sample(rows, KNOWN_ROWS)
    try:
        with autocast(experiment):
            return features(ready.model, training.task, rows, progress=training.progress)
    except ConfigError as error:
        warnings.warn(f"{error} The run keeps no features for novelty.", BayestuneWarning, stacklevel=2)
        return None


def _restored(ready: _Prepared, output: Path) -> tuple[Posterior, dict[str, Any]]:
    """Load what `_trained` returned before the run was interrupted.

    Raises:
        ConfigError: the rows or files that it was trained with have changed.
    """
    made = read_json(output / TRAINED, "the record of a training")
    now = ready.origin["sha256"]
    changed = set(differences(made["sha256"], now)) - {"eval_rows", "source_run"}
    if changed:
        raise ConfigError(
            f"output {output}: its posterior was trained with different {', '.join(sorted(changed))}; restore them, "
            "or train again with --overwrite."
        )
    made["sha256"] = {**made["sha256"], **{name: now[name] for name in now if name != "source_run"}}
    return load(ready.model.unload(), output / POSTERIOR), made


def _scored(posterior: Posterior, ready: _Prepared, output: Path, started: float, made: Mapping[str, Any]) -> Result:
    """Fit the temperature if the run has one, and score the posterior at each number of draws."""
    training, rows = ready.training, ready.rows
    if rows.temperature and posterior.temperature == 1:
        posterior.temperature = _temperature(posterior, training, rows.temperature)
        save_posterior(posterior, output / POSTERIOR, overwrite=True)
    finished = Run(experiment=training.experiment, task=training.task, posterior=posterior)
    predictions = {
        key: finished.predict(rows.evaluation, draws=draws, progress=training.progress)
        for key, draws in finished.evaluations().items()
        if rows.evaluation
    }
    return Result(
        experiment=finished.experiment,
        output=output,
        scores={key: evaluate(prediction) for key, prediction in predictions.items()},
        predictions=predictions,
        seconds=time.monotonic() - started,
        temperature=finished.posterior.temperature,
        posterior_std=made["posterior_std"],
        fitted=made["fitted"],
    )


def _save(posterior: Posterior, training: Training, folder: Path) -> None:
    """Save the posterior, and remove an empty folder of checkpoints."""
    if not training.experiment.checkpoint_steps and training.checkpoints.is_dir():
        with contextlib.suppress(OSError):
            training.checkpoints.rmdir()
    copies = 1 + len(posterior.more_members())
    size = copies * sum(tensor.nbytes for tensor in adapter_tensors(posterior.model, "default").values())
    known = 0 if posterior.known is None else posterior.known.nbytes
    with writing(folder, needed=size + known + sum(tensor.nbytes for tensor in posterior.tensors().values())):
        save_posterior(posterior, folder, overwrite=training.resume)


def _temperature(posterior: Posterior, training: Training, rows: Sequence[AnyRow]) -> float:
    """Fit the temperature on held-out rows, with as many draws as are scored, but from another seed."""
    experiment = training.experiment
    draws, seed = experiment.method.draw_counts(experiment.draws)[-1], derive_seed("temperature", experiment.seed)
    with autocast(experiment):
        found = predict(posterior, training.task, rows, draws=draws, seed=seed)
    return temperature_of(found)


def _record(result: Result, rows: RunRows, command: Sequence[str]) -> dict[str, Any]:
    """Return the part of result.json about the settings and scores; `_trained` made the rest."""
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
        "posterior_std": result.posterior_std,
        "steps": experiment.steps,
        "seconds": round(result.seconds, 1),
        "rows": {"train": len(rows.train), "eval": len(rows.evaluation)},
    }


def _kl(training: Training, std: float | None) -> dict[str, Any] | None:
    """Return the KL's cycle (updates), its learning rate and the std after training; None without a KL."""
    kl = training.experiment.method.kl(training.updates)
    return kl and {"cycle": kl.cycle, "learning_rate": kl.learning_rate, "std": std}
