"""`Run`, a trained run, and `load_run`, which loads one from disk."""

import dataclasses
import functools
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel

from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.experiment.backbone import Backbone, build_task, default_targets, find_backbone, load_base
from bayestune.experiment.fitting import autocast
from bayestune.experiment.folder import EXPERIMENT, POSTERIOR, RESULT, SHOTS, TRAINED, earlier_run
from bayestune.experiment.processes import process_count, rank, together
from bayestune.experiment.record import rows_sha256
from bayestune.experiment.rows import HELD_OUT, own_splits
from bayestune.experiment.settings import OF_TASKS, PROMPT, Experiment
from bayestune.files import MANIFEST, file_sha256, read_json
from bayestune.functional import derive_seed
from bayestune.inference import predict
from bayestune.inference.predict import draw_outputs
from bayestune.methods import Posterior, load
from bayestune.storage.manifest import TENSOR_FILE
from bayestune.tasks import AnyRow, Row, Task, TokenizedTask, read_rows
from bayestune.tasks.causal import CausalChoice


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained run, loaded: its settings, its task and its posterior.

    Attributes:
        shared: whether the processes of a launcher divide the rows of `predict` among them; each must then call it.
    """

    experiment: Experiment
    task: TokenizedTask
    posterior: Posterior
    shared: bool = False

    @property
    def model(self) -> PeftModel:
        """The model with the posterior's mean, mode or first member."""
        return self.posterior.model

    @property
    def default_draws(self) -> int:
        """The number of draws that the run was evaluated with: 0 for a point estimate, K for an ensemble."""
        return self.experiment.method.draw_counts(self.experiment.draws)[-1]

    def evaluations(self) -> dict[str, int]:
        """Return the number of draws of each evaluation, keyed as in `Result.scores`."""
        method, draws = self.experiment.method, self.experiment.draws
        counts, several = method.draw_counts(draws), len(method.draw_counts(draws or 1)) > 1
        return {f"{method.name}_n{count}" if several else method.name: count for count in counts}

    def predict(
        self, rows: Sequence[AnyRow], *, draws: int, seed: int = 0, task: Task | None = None, progress: bool = False
    ) -> Any:
        """Call `bayestune.predict` in the run's own precision; `task` asks another task of the same model."""
        predicting = _predict_share if self.shared and rows and process_count() > 1 else predict
        with autocast(self.experiment):
            return predicting(self.posterior, task or self.task, rows, draws=draws, seed=seed, progress=progress)


def _predict_share(
    posterior: Posterior, task: Task, rows: Sequence[AnyRow], *, draws: int, seed: int, progress: bool
) -> Any:
    """Like `predict`, but each process runs the model on some of the rows and receives the outputs for all."""
    asked, count = {"draws": draws, "seed": seed}, process_count()
    mine = rows[rank() :: count]
    found = draw_outputs(posterior, task, mine, **asked, batch_size=8, progress=progress)[0] if mine else None
    parts = [part for part in together(found) if part is not None]  # the last processes may have no rows
    slices, _, columns = parts[0].shape
    outputs = parts[0].new_empty(slices, len(rows), columns)
    for first, part in enumerate(parts):
        outputs[:, first::count] = part
    return task.prediction(outputs, rows, **asked, temperature=posterior.temperature)


def load_run(folder: str | Path, *, data: str | Path | None = None) -> Run:
    """Load the trained run in `folder`, in evaluation mode; `data` replaces the data folder that it was trained with.

    A run that was interrupted while it was scored can be loaded too.

    Raises:
        ConfigError: `folder` is not a trained run, its shots were changed, or its temperature is not fitted yet.
        PosteriorError: its posterior is incomplete or altered.
    """
    folder = Path(folder)
    what = "the folder of a finished run, as `bayestune train --output` makes it"
    scored = (folder / RESULT).is_file()
    if not scored and not (folder / POSTERIOR / MANIFEST).is_file():
        waiting = earlier_run(folder)
        hint = f" The run that was being replaced is kept in {waiting}." if waiting.is_dir() else ""
        hint = hint or (" Continue it: train --resume." if (folder / EXPERIMENT).is_file() else "")
        raise ConfigError(f"{folder}: found no {RESULT}, expected {what}.{hint}")
    recorded = read_json(folder / EXPERIMENT, what)
    experiment, older = Experiment.from_dict(recorded, where=str(folder / EXPERIMENT)), "prompt" not in recorded
    if data is not None:
        experiment = experiment.replace(data=str(data))
    backbone = find_backbone(experiment.model)
    shots = _kept_shots(folder) if experiment.shots else None
    experiment, task = resolve(experiment, backbone, shots=shots, older=older, finished=True)
    base, _ = load_base(backbone, task, experiment)
    posterior = load(base, folder / POSTERIOR)
    if not scored and experiment.temperature_split is not None and posterior.temperature == 1:
        raise ConfigError(f"{folder}: the temperature of this run is not fitted yet; continue it: train --resume.")
    adapter = read_json(folder / RESULT, what).get("sha256", {}).get("adapter") if scored else None
    if scored and adapter != file_sha256(folder / POSTERIOR / TENSOR_FILE):
        message = f"{folder}: the posterior is not the one that {RESULT} was made with; its scores are not there."
        warnings.warn(message, BayestuneWarning, stacklevel=2)
    return Run(experiment=experiment, task=task, posterior=posterior)


def other_task(trained: Run, name: str) -> TokenizedTask:
    """Return the task of another data set, with the prompt and data folder of a trained run.

    Raises:
        ConfigError: its rows are not of the same kind, or its classes differ from those of the run's own task.
    """
    experiment, own = trained.experiment, trained.task
    assert experiment.max_tokens is not None
    backbone = find_backbone(experiment.model)
    prompt = own.prompt if isinstance(own, CausalChoice) else None
    task = build_task(backbone, name, experiment.data, experiment.max_tokens, own.labels, prompt, own.recorded)
    if (type(task), task.head, task.labels) != (type(own), own.head, own.labels):
        named = "named " if task.labels else ""
        raise ConfigError(
            f"data set {name}: found {task.row.noun} rows with {task.spec.classes} {named}{task.row.counted}, "
            f"expected {own.row.noun} rows with {own.spec.classes} as in {own.name}, which the run was trained on."
        )
    return task


def resolve(
    experiment: Experiment,
    backbone: Backbone,
    *,
    shots: tuple[Row, ...] | None = None,
    older: bool = False,
    finished: bool = False,
) -> tuple[Experiment, TokenizedTask]:
    """Fill in the defaults of an experiment; return it and its task.

    Args:
        shots: the shots of a finished run; by default they come from the run that it starts from, or are drawn.
        older: whether the settings come from a record made before there were prompts.
        finished: whether the run is trained; what it started from may have changed by now, and is not read.

    Raises:
        ConfigError: a setting cannot be used here, or differs from that of the run that it starts from.
    """
    source, record = (None, {}) if finished else _source(experiment)
    if source is not None and "prompt" in record:
        experiment, shots = asked_as(experiment, source, record)
    asked = any(dict(experiment)[name] for name in PROMPT)
    older = older or (bool(record) and "prompt" not in record)
    experiment = experiment.resolved(backbone.family, chat=backbone.chat and not older)
    assert experiment.max_tokens is not None
    prompt = experiment.asked_prompt() if backbone.family == "causal" else None
    build = functools.partial(
        build_task, backbone, experiment.task, experiment.data, experiment.max_tokens, experiment.labels
    )
    own = {name: dict(experiment)[name] for name in (*OF_TASKS, "train_split")}
    task = build(prompt, own)
    if prompt is not None and experiment.shots and task.scorings:
        prompt = dataclasses.replace(prompt, shots=shots or _drawn(task, experiment))
        task = build(prompt, own)
    if not task.scorings:
        if asked:
            raise ConfigError(
                "scoring, prompt, system, shots, label_words: found one, expected none: a head of the model answers "
                f"{experiment.task}, without a prompt."
            )
        experiment = experiment.replace(scoring=None, prompt=None)
    targets = experiment.target_modules or default_targets(backbone, task)
    if task.needs_temperature and experiment.temperature_split is None:
        experiment = experiment.replace(temperature_split=experiment.train_split)
    experiment = experiment.replace(target_modules=targets, eval_split=experiment.eval_split or task.spec.evaluation)
    _check_splits(experiment)
    return experiment.replace(labels=task.labels, **task.recorded), task


def _check_splits(experiment: Experiment) -> None:
    """Raise a ConfigError if a setting is fitted on scored rows or, other than a temperature, on training rows."""
    assert experiment.eval_split is not None
    scored, trained = set(experiment.eval_split.split("+")), set(experiment.train_split.split("+"))
    for name, splits in {**own_splits(experiment), HELD_OUT: experiment.temperature_split or ""}.items():
        used = set(splits.split("+"))
        if used & scored:
            raise ConfigError(
                f"{name}: found {min(used & scored)!r}, which the run is scored on; choose other rows, or another "
                "--eval-split."
            )
        if used & trained and name != HELD_OUT:
            raise ConfigError(
                f"{name}: found {min(used & trained)!r}, which the run is trained on; choose other rows."
            )


def _source(experiment: Experiment) -> tuple[Path | None, dict[str, Any]]:
    """Return the run that an experiment starts from and its settings; none for an adapter of another program.

    Raises:
        ConfigError: the run that the method asks is not finished.
    """
    asked = experiment.method.source_run
    if asked is not None and not (Path(asked) / RESULT).is_file():
        raise ConfigError(f"{asked}: found no {RESULT}, expected a finished run; continue it: train --resume.")
    named = experiment.adapter or asked
    file = Path(named or "") / EXPERIMENT
    if named is None or not file.is_file():
        return None, {}
    return Path(named), read_json(file, "the settings of the run to start from")


def asked_as(
    experiment: Experiment, folder: Path, record: Mapping[str, Any]
) -> tuple[Experiment, tuple[Row, ...] | None]:
    """Return the experiment with the prompt and number settings of the run in `folder`, and the shots of that run.

    Raises:
        ConfigError: the experiment sets one of them to a different value.
    """
    asked = (*PROMPT, *OF_TASKS)
    kept = {name: record[name] for name in ("model", "task", *asked) if name in record}
    own = Experiment.from_dict(kept, where=str(folder / EXPERIMENT))
    for name in asked:
        given, there = dict(experiment)[name], dict(own)[name]
        if given not in (None, 0, there):
            raise ConfigError(f"{name}: found {given!r}, expected {there!r}, as the run in {folder} has it.")
    shots = _kept_shots(folder) if own.shots else None
    return experiment.replace(**{name: dict(own)[name] for name in asked}), shots


def _kept_shots(folder: Path) -> tuple[Row, ...]:
    """Return the shots of the run in `folder`, checked against its record."""
    shots = tuple(read_rows(folder / SHOTS, formats=(Row,)))
    record = folder / (RESULT if (folder / RESULT).is_file() else TRAINED)
    found, recorded = rows_sha256(shots), read_json(record, "the record of a run").get("sha256", {}).get("shots_rows")
    if recorded not in (None, found):
        raise ConfigError(
            f"{folder / SHOTS}: found rows with sha256 {found}, expected {recorded}, as {record.name} has it; restore "
            "the file, or train again."
        )
    return shots


def _drawn(task: TokenizedTask, experiment: Experiment) -> tuple[Row, ...]:
    """Draw the training rows that the prompt shows with their answers."""
    rows: list[Any] = task.rows(experiment.train_split)
    if len(rows) <= experiment.shots:
        raise ConfigError(f"shots: found {experiment.shots}, expected fewer than the {len(rows)} training rows.")
    return tuple(random.Random(derive_seed("shots", experiment.seed)).sample(rows, experiment.shots))
