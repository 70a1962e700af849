"""Find the pretrained model of an experiment, choose its task, and load it with an adapter."""

import difflib
import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as LORA_TARGETS
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bayestune.errors import ConfigError, one_line
from bayestune.experiment.settings import OF_TASKS, Experiment
from bayestune.methods.base import Family
from bayestune.packaged import PACKAGED, model_source
from bayestune.tasks import TASKS, Prompt, TokenizedTask, dataset
from bayestune.tasks.rows import shown

PACKAGED_DATA = Path(__file__).parent.parent / "data"
PACKAGED_TASKS = ("everyday",)


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """The configuration and tokenizer of a pretrained model; its weights are not loaded yet."""

    source: str
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    family: Family
    positions: int | None

    @property
    def chat(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return bool(self.tokenizer.chat_template)


def find_backbone(model: str) -> Backbone:
    """Read the configuration and the tokenizer of `model`: a packaged model, a folder, a GGUF file or a Hub id.

    Raises:
        ConfigError: there is no such model, its code is not part of transformers, or it has no usable tokenizer.
    """
    source = model_source(model)
    if not Path(source).is_dir() and (Path(source).exists() or source.startswith((".", "/", "~"))):
        known = ", ".join(PACKAGED)
        raise ConfigError(
            f"model {model!r}: found no such folder, expected a folder, a .gguf file, a Hugging Face id, or {known}."
        )
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        positions = config.get_text_config().to_dict().get("max_position_embeddings")
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception as error:  # transformers raises many types for an invalid configuration
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"model {model!r}: it needs code of its own, expected none; such code is not run."
            ) from error
        raise ConfigError(
            f"model {model!r}: neither a usable folder nor a Hugging Face id: {one_line(error)}"
        ) from error
    family = _family(model, config)
    return Backbone(source=source, config=config, tokenizer=tokenizer, family=family, positions=positions)


def _family(model: str, config: PreTrainedConfig) -> Family:
    """Return "causal" for a checkpoint of a causal language model, otherwise "encoder"."""
    if not config.architectures:
        raise ConfigError(f"model {model!r}: its config.json names no architectures, expected e.g. LlamaForCausalLM.")
    causal = set(config.architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    return "causal" if causal else "encoder"


def build_task(
    backbone: Backbone,
    name: str,
    data: str | Path | None,
    max_tokens: int,
    labels: tuple[str, ...] | None = None,
    prompt: Prompt | None = None,
    own: Mapping[str, Any] = MappingProxyType({}),
) -> TokenizedTask:
    """Build the first task of `TASKS` that can read the data set `name` and fits the model.

    `labels` are the class names, as in `dataset`. Tasks without prompts ignore `prompt`. `own` holds the settings of
    a run that only some tasks take.

    Raises:
        DataError, TaskError: as the functions of `bayestune.tasks`.
        ConfigError: `max_tokens` exceeds the positions of the model; the tokenizer's pad token has no embedding, or
            differs from that of an encoder; or a setting in `own` belongs to another task.
    """
    limit = backbone.positions
    if limit is not None and max_tokens > limit:
        raise ConfigError(f"max_tokens: found {max_tokens}, expected at most {limit}, the positions of the model.")
    if name in PACKAGED_TASKS and (data is None or not (Path(data) / name).is_dir()):
        data = PACKAGED_DATA
    moments = own.get("target_mean")
    spec = dataset(name, data, labels=labels, numbers=None if moments is None else len(moments))
    if labels not in (None, spec.labels):
        found = ", ".join(map(shown, labels))
        raise ConfigError(f"data set {name}: found no class names, expected {found} (those of the run, or --labels).")
    scoring = (prompt or Prompt()).scoring
    able = [each for each in TASKS if each.row is spec.row and backbone.family in each.families]
    make = next(each for each in able if not each.scorings or scoring in each.scorings)
    for setting in OF_TASKS:
        if own.get(setting) is not None and setting not in make.settings:
            raise ConfigError(
                f"{setting}: found {own[setting]!r}, expected none: {name} has {spec.row.noun} rows, without numbers."
            )
    options: dict[str, Any] = {"prompt": prompt} if make.scorings else {}
    options |= {setting: own[setting] for setting in make.settings if own.get(setting) is not None}
    task = make(spec, backbone.tokenizer, data=data, max_tokens=max_tokens, **options)
    _fit_tokenizer(backbone, task)
    return task


def _fit_tokenizer(backbone: Backbone, task: TokenizedTask) -> None:
    """Tell the task which tokens have embeddings, and check that the pad token can be used."""
    config = backbone.config.get_text_config().to_dict()
    size, theirs = config.get("vocab_size"), config.get("pad_token_id")
    task.embeddings = size
    if size is not None and task.pad_id >= size:
        raise ConfigError(
            f"tokenizer of {backbone.source}: it pads with id {task.pad_id}, expected one below {size}, the "
            "embeddings of the model; save it with more of them, or choose another pad_token."
        )
    own = backbone.tokenizer.pad_token_id
    if not task.generates and None not in (own, theirs) and own != theirs:
        raise ConfigError(
            f"tokenizer of {backbone.source}: it pads with id {own} and the model with {theirs}, expected the same; "
            "correct pad_token_id in the model's config.json, or pad_token of the tokenizer."
        )


def default_targets(backbone: Backbone, task: TokenizedTask) -> tuple[str, ...]:
    """Return PEFT's default layers (query and value projections), and an untied lm_head if it answers `task`.

    Raises:
        ConfigError: PEFT has no default for the architecture.
    """
    config = backbone.config
    known = LORA_TARGETS.get(config.model_type)
    if not isinstance(known, list):  # for some models PEFT has a regular expression
        raise ConfigError(
            f"target_modules: there is no default for model type {config.model_type!r}; name the layers, "
            "such as --target-modules q_proj,v_proj."
        )
    head = task.generates and not config.tie_word_embeddings
    return (*known, *(["lm_head"] if head else []))


def load_base(
    backbone: Backbone, task: TokenizedTask, experiment: Experiment, *, device: str | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """Load the pretrained model; return it and the names of its new layers (a head), drawn from `seed`.

    It is on `device`, by default the GPU of this process, or the CPU if there is none.

    Raises:
        ConfigError: the model cannot be loaded, a causal model's checkpoint lacks weights, or bitsandbytes is missing.
    """
    # A new head is trained in full and its updates need float32; the weights of a language model are frozen.
    dtype = torch.bfloat16 if task.generates and experiment.precision == "bf16" else torch.float32
    if device is None:
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    kwargs = task.head
    if experiment.quantization != "none":
        kwargs |= {"quantization_config": _quantized(experiment), "device_map": {"": device}}
    with torch.random.fork_rng():
        torch.manual_seed(experiment.seed)
        try:
            loaded: Any = task.auto_model.from_pretrained(
                backbone.source, dtype=dtype, trust_remote_code=False, output_loading_info=True, **kwargs
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ConfigError(f"model {experiment.model!r}: cannot be loaded: {one_line(error)}") from error
    model, loading = loaded
    # PEFT records this name of the base: the one that was given, not the path of an installed package.
    model.name_or_path = model.config._name_or_path = experiment.model
    new = sorted({key.rpartition(".")[0] for key in loading["missing_keys"]})
    if new and task.generates:
        raise ConfigError(f"model {experiment.model!r}: its checkpoint has no weights for {', '.join(new)}.")
    if model.config.pad_token_id is None or backbone.tokenizer.pad_token_id is None:
        model.config.pad_token_id = task.pad_id
    return model if experiment.quantization != "none" else model.to(device), new


def _quantized(experiment: Experiment) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization {experiment.quantization!r} needs the package bitsandbytes: install it.")
    if experiment.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)


def new_head(base: PreTrainedModel, new: list[str], seed: int) -> None:
    """Initialize the layers `new` of `base` again from `seed`, with the initialization of the model's class."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for name in new:
            base.get_submodule(name).apply(base._init_weights)


def add_adapter(base: PreTrainedModel, experiment: Experiment, *, new: list[str], task_type: str | None) -> PeftModel:
    """Add the method's adapter to `base`, initialized from `seed`; the layers `new` are trained in full.

    Raises:
        ConfigError: the adapter's settings cannot be used, or no layer has a name in `target_modules`.
    """
    settings: dict[str, Any] = {
        "r": experiment.rank,
        "lora_alpha": experiment.lora_alpha,
        "target_modules": list(experiment.target_modules or ()),
        "modules_to_save": new or None,
        "task_type": task_type,
    }
    config = experiment.method.adapter_config(**settings)
    _check_targets(base, experiment.target_modules or ())
    with torch.random.fork_rng():
        torch.manual_seed(experiment.seed)
        try:
            model = get_peft_model(base, config)
        except ConfigError:
            raise
        except ValueError as error:
            raise ConfigError(f"target_modules: {one_line(error)}") from error
    assert isinstance(model, PeftModel)
    return model


def _check_targets(base: PreTrainedModel, targets: tuple[str, ...]) -> None:
    """Raise an error if any target matches no layer; PEFT raises one only if none of them does."""
    names = [name for name, _ in base.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            near = difflib.get_close_matches(target, {name.rpartition(".")[2] for name in names}, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "name its layers, such as q_proj,v_proj."
            raise ConfigError(f"target_modules: the model has no layer {target!r}; {hint}")
