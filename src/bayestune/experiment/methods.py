"""How each method of an experiment comes to its posterior: trained, or fitted to a finished adapter."""

import contextlib
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from bayestune.errors import BayestuneError, BayestuneWarning, ConfigError
from bayestune.experiment.backbone import add_adapter, new_head
from bayestune.experiment.folder import ADAPTER, POSTERIOR
from bayestune.experiment.processes import is_main
from bayestune.experiment.settings import Experiment
from bayestune.experiment.train import Training
from bayestune.files import MANIFEST, strict_json
from bayestune.functional import derive_seed
from bayestune.inference import predict
from bayestune.methods import (
    Ensemble,
    Point,
    Posterior,
    Swag,
    Variational,
    anchor_loss,
    fit_laplace,
    fit_temperature,
    load_posterior,
    refuse_if_too_large,
    save_posterior,
    tfb,
)
from bayestune.methods.swag_callback import SwagCallback
from bayestune.storage.manifest import CONFIG_FILE, TENSOR_FILE, read_manifest
from bayestune.storage.state import active_adapter, adapter_tensors, owned_heads, settings_fault, value_fault
from bayestune.tasks import AnyRow, Task

_SNAPSHOTS = 20
_CONFIG_LIMIT = 1 << 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
    """The base model, the names of its new layers, and the adapter's PEFT task type."""

    base: PreTrainedModel
    new: list[str]
    task_type: str | None


def begin(start: Start, experiment: Experiment) -> tuple[PeftModel, Experiment]:
    """The model that the method starts from, before anything is trained or written: a new adapter, or `adapter`.

    With `adapter` the experiment's rank, alpha and target modules become those of the adapter.

    Raises:
        ConfigError, PosteriorError: the adapter cannot be used, does not fit the base, or its curvature not in memory.
    """
    if experiment.adapter is None:
        model = add_adapter(start.base, experiment, new=start.new, task_type=start.task_type)
    else:
        model = _finished(start, Path(experiment.adapter))
        experiment = _sized(experiment, model)
    if experiment.method == "laplace":
        refuse_if_too_large(model, layers=experiment.laplace_layers, memory_limit=None)
    return model, experiment


def _sized(experiment: Experiment, model: PeftModel) -> Experiment:
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    targets = experiment.target_modules
    # A regular expression of layer names is no list of them: that of the experiment then stays.
    if isinstance(config.target_modules, set | list) and set(config.target_modules) != set(targets or ()):
        targets = tuple(sorted(config.target_modules))
    return dataclasses.replace(experiment, rank=config.r, lora_alpha=config.lora_alpha, target_modules=targets)


def obtain(model: PeftModel, start: Start, training: Training, fit_rows: Sequence[AnyRow]) -> Posterior:
    """The posterior of the experiment's method, in evaluation mode, from the `model` that `begin` gave.

    Args:
        fit_rows: of `fit_split`, for "laplace".

    The adapter that was trained as the start of a fit is saved beside the checkpoints first.

    Raises:
        PosteriorError: nothing could be fitted to the adapter.
        TrainingError: training was stopped because the loss or a gradient was no longer finite.
    """
    experiment = training.experiment
    if experiment.method == "ensemble":
        return _ensemble(model, start, training)
    if experiment.adapter is None:
        training.train(model, label=experiment.method)
    model.eval()
    if experiment.method not in ("laplace", "tfb", "swag"):
        return Point(model) if experiment.method in ("mle", "map", "temperature") else Variational(model)
    if experiment.adapter is not None:
        return _fitted(model, training, fit_rows)
    kept = training.checkpoints.with_name(ADAPTER)
    if is_main():
        save_posterior(model, kept, overwrite=True)
    try:
        return _fitted(model, training, fit_rows)
    except BayestuneError as error:
        raise type(error)(f"{error} The adapter trained for it is in {kept}: go on with --adapter.") from error


def _fitted(model: PeftModel, training: Training, fit_rows: Sequence[AnyRow]) -> Posterior:
    match training.experiment.method:
        case "tfb":
            return _tfb(model, training)
        case "laplace":
            return _laplace(model, training, fit_rows)
        case _:
            return _swag(model, training)


def evaluations(experiment: Experiment, posterior: Posterior) -> dict[str, int]:
    """Number of draws of each evaluation, by its key; a predictive in closed form has one."""
    if experiment.method == "laplace" and experiment.laplace_predictive == "probit":
        return {experiment.method: 1}
    if isinstance(posterior, Point | Ensemble):
        return {experiment.method: posterior.default_draws}
    return {f"{experiment.method}_n{draws}": draws for draws in (0, experiment.draws)}


def tempered(posterior: Posterior, task: Task, rows: Sequence[AnyRow], experiment: Experiment) -> float:
    """The temperature of `posterior` on validation rows, at the number of draws it is evaluated with."""
    draws = max(evaluations(experiment, posterior).values())
    with autocast(experiment):
        found = predict(posterior, task, rows, draws=draws, seed=0)
    return fit_temperature(found.draw_log_probs, found.labels)


def autocast(experiment: Experiment) -> contextlib.AbstractContextManager[Any]:
    """The precision of the experiment."""
    if experiment.precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)


def _tfb(point: PeftModel, training: Training) -> Posterior:
    """The widest posterior within the tolerance on the first `anchor_rows` rows of train."""
    experiment = training.experiment
    rows = training.rows[: experiment.anchor_rows]
    loss = anchor_loss(training.task, rows, draws=experiment.draws, seed=experiment.seed)
    with autocast(experiment):
        model, search = tfb(point, loss, tolerance=experiment.tolerance)
    if search.at_high:
        warnings.warn(
            f"tfb: sigma_q = {search.sigma:g}, the upper end of the search, is within the tolerance: the posterior "
            "could be wider.",
            BayestuneWarning,
            stacklevel=2,
        )
    return Variational(model)


def _ensemble(model: PeftModel, start: Start, training: Training) -> Ensemble:
    """The members, one after the other on the one base: they share nothing else, so the order does not matter.

    Member 0 has the experiment's seed, and so is what "mle" trains; the others have seeds, and with them starts and
    row orders, of their own. A member that is finished is kept beside the checkpoints, for a run that is resumed.
    """
    experiment, folder = training.experiment, training.checkpoints
    members = []
    for number in range(experiment.members):
        seed = experiment.seed if number == 0 else derive_seed("member", experiment.seed, number) % 2**31
        own = dataclasses.replace(experiment, seed=seed)
        finished = folder / f"member_{number}"
        if number:
            base = model.unload()
            new_head(base, start.new, seed)
            model = add_adapter(base, own, new=start.new, task_type=start.task_type)
        if training.resume and finished.is_dir():
            model = load_posterior(model.unload(), finished)
        else:
            steps = dataclasses.replace(training, experiment=own, checkpoints=folder / f"steps_{number}")
            steps.train(model, label=f"member {number + 1} of {experiment.members}")
            if experiment.checkpoint_steps and is_main():
                save_posterior(model, finished)
        members.append({key: t.detach().clone() for key, t in adapter_tensors(model, "default").items()})
    return _first_active(model, members)


def _first_active(model: PeftModel, members: list[dict[str, torch.Tensor]]) -> Ensemble:
    """The ensemble, with the weights of member 0 in the adapter of `model`."""
    with torch.no_grad():
        for key, tensor in adapter_tensors(model, "default").items():
            tensor.copy_(members[0][key])
    model.requires_grad_(False)
    return Ensemble(model.eval(), members)


def _laplace(point: PeftModel, training: Training, fit_rows: Sequence[AnyRow]) -> Posterior:
    experiment = training.experiment
    with autocast(experiment):
        return fit_laplace(
            point,
            training.task,
            training.rows,
            layers=experiment.laplace_layers,
            precision="validation" if fit_rows else "marglik",
            validation_rows=fit_rows or None,
            predictive=experiment.laplace_predictive,
            progress=training.progress,
        )


def _swag(point: PeftModel, training: Training) -> Posterior:
    """`swag_steps` updates more, at a constant rate, and the Gaussian of the weights that they pass through."""
    experiment = training.experiment
    every = max(1, experiment.swag_steps // _SNAPSHOTS)
    callback = SwagCallback(start=every, every=every, rank=_SNAPSHOTS)
    for name, parameter in point.named_parameters():
        parameter.requires_grad_(".default" in name)
    tail = dataclasses.replace(training, checkpoints=training.checkpoints / "tail", resume=False)
    tail.train(
        point,
        label="swag",
        callbacks=[callback],
        max_steps=experiment.swag_steps,
        learning_rate=experiment.swag_learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        save_strategy="no",
    )
    point.requires_grad_(False)
    return Swag.from_moments(point.eval(), callback.moments)


def adapter_file(folder: Path) -> Path:
    """The tensors of the adapter in `folder`: that of a run, of a posterior, or of another program."""
    inner = folder / POSTERIOR
    return (inner if inner.is_dir() else folder) / TENSOR_FILE


def _finished(start: Start, folder: Path) -> PeftModel:
    """The plain LoRA adapter of a run, a saved posterior, or a folder that any other program wrote, on the base.

    Raises:
        ConfigError: there is none, or it is not plain LoRA. PosteriorError: it does not fit the base.
    """
    folder = adapter_file(folder).parent
    if not (folder / CONFIG_FILE).is_file() or not (folder / TENSOR_FILE).is_file():
        raise ConfigError(f"adapter {folder}: found no {CONFIG_FILE} and {TENSOR_FILE}, expected a LoRA adapter.")
    if (folder / MANIFEST).is_file():
        settings = read_manifest(folder)["settings"]
        if settings.get("temperature", 1.0) != 1.0:
            raise ConfigError(f"adapter {folder}: found one with a temperature, expected plain LoRA without.")
        model = load_posterior(start.base, folder)
        if active_adapter(model)[2] != "point":
            raise ConfigError(f"adapter {folder}: found a posterior, expected plain LoRA, as method mle trains it.")
        return model
    try:
        values = strict_json((folder / CONFIG_FILE).read_bytes(), limit=_CONFIG_LIMIT)
    except ValueError as error:
        raise ConfigError(f"adapter {folder / CONFIG_FILE}: cannot be read: {error}.") from error
    fault = settings_fault(values, "point")
    if fault:
        raise ConfigError(f"adapter {folder / CONFIG_FILE}: {fault}.")
    try:
        found = load_file(folder / TENSOR_FILE)
        model = PeftModel.from_pretrained(start.base, folder)
        config = model.peft_config["default"]
        config.auto_mapping = config.revision = None  # the base is the one given, and so it is saved
    except Exception as error:  # whatever a damaged file makes safetensors, PEFT or re raise
        raise ConfigError(f"adapter {folder}: does not fit the base: {' '.join(str(error).split())[:300]}") from error
    shapes = {key: list(tensor.shape) for key, tensor in adapter_tensors(model, "default").items()}
    given = {key: list(tensor.shape) for key, tensor in found.items()}
    wrong = sorted(key for key in shapes.keys() | given.keys() if shapes.get(key) != given.get(key))
    if wrong:
        what = f"found {given.get(wrong[0])}, expected {shapes.get(wrong[0])}"
        raise ConfigError(f"adapter {folder / TENSOR_FILE}: tensor {wrong[0]!r}: {what}.")
    fault = value_fault(found)
    if fault:
        raise ConfigError(f"adapter {folder / TENSOR_FILE}: {fault}.")
    heads = set(start.new) - set(owned_heads(model, "default"))
    if heads:
        raise ConfigError(
            f"adapter {folder}: found no weights of {min(heads)}, which this task needs beside the base."
        )
    return model.eval()
