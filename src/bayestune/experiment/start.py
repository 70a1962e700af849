"""The model that a run starts from: a new adapter on the base, or a finished one from a folder."""

from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import PreTrainedModel

from bayestune.errors import ConfigError, one_line
from bayestune.experiment.backbone import add_adapter, new_head
from bayestune.experiment.folder import POSTERIOR
from bayestune.experiment.settings import Experiment
from bayestune.files import MANIFEST, strict_json
from bayestune.storage import load_posterior
from bayestune.storage.manifest import CONFIG_FILE, TENSOR_FILE, read_manifest
from bayestune.storage.state import active_adapter, adapter_tensors, owned_heads, settings_fault, value_fault

_CONFIG_LIMIT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Start:
    """The base model, the names of its new layers, and the adapter's PEFT task type."""

    base: PreTrainedModel
    new: list[str]
    task_type: str | None

    def model(self, experiment: Experiment) -> tuple[PeftModel, Experiment]:
        """Return the model that training or fitting starts from, and the experiment.

        If `experiment.adapter` is given, the experiment's rank, alpha and target modules become the adapter's.

        Raises:
            ConfigError, PosteriorError: the adapter cannot be used, or does not fit the base.
        """
        if experiment.adapter is None:
            return add_adapter(self.base, experiment, new=self.new, task_type=self.task_type), experiment
        model = _finished(self, Path(experiment.adapter))
        return model, _with_sizes_of(experiment, model)

    def renew(self, model: PeftModel, experiment: Experiment, seed: int) -> PeftModel:
        """Return the same base with a new adapter; the adapter and the new layers are initialized from `seed`."""
        base = model.unload()
        new_head(base, self.new, seed)
        return add_adapter(base, experiment.replace(seed=seed), new=self.new, task_type=self.task_type)


def adapter_file(folder: Path) -> Path:
    """Return the tensor file of the adapter in `folder`, which is a run, a posterior, or made by another program."""
    inner = folder / POSTERIOR
    return (inner if inner.is_dir() else folder) / TENSOR_FILE


def _with_sizes_of(experiment: Experiment, model: PeftModel) -> Experiment:
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    targets = experiment.target_modules
    # If the adapter names its layers by a regular expression, the experiment keeps its own list.
    if isinstance(config.target_modules, set | list) and set(config.target_modules) != set(targets or ()):
        targets = tuple(sorted(config.target_modules))
    return experiment.replace(rank=config.r, lora_alpha=config.lora_alpha, target_modules=targets)


def _finished(start: Start, folder: Path) -> PeftModel:
    """Load the plain LoRA adapter in `folder` (a run, a saved posterior, or made by another program) on the base.

    Raises:
        ConfigError: there is no adapter, or it is not plain LoRA.
        PosteriorError: the adapter does not fit the base.
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
            raise ConfigError(
                f"adapter {folder}: found a posterior, expected plain LoRA, as method mle trains it; for a "
                "temperature, train the posterior again with --temperature-split."
            )
        return model
    return _of_another_program(start, folder)


def _of_another_program(start: Start, folder: Path) -> PeftModel:
    """Load a plain LoRA adapter with PEFT, and check it against the base."""
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
        config.auto_mapping = config.revision = None  # they may describe another base than the one that is saved
    except Exception as error:  # safetensors, PEFT and re raise many types for a damaged file
        raise ConfigError(f"adapter {folder}: does not fit the base: {one_line(error)}") from error
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
