"""`Experiment`: the settings of one run, including those of its method."""

import difflib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, model_validator
from pydantic.fields import FieldInfo

from bayestune.errors import ConfigError
from bayestune.methods import DEFAULT, METHODS, Method
from bayestune.methods.base import Family
from bayestune.settings import LARGEST_WHOLE, Settings, check_value, from_text
from bayestune.storage.state import MAX_RANK
from bayestune.tasks.prompts import CHAT, PAPER, Prompt, Scoring

_FAMILY_DEFAULTS: Mapping[Family, Mapping[str, Any]] = MappingProxyType(
    {
        "causal": {"batch_size": 4, "learning_rate": 1e-4, "lora_alpha": 16, "max_tokens": 300},
        "encoder": {"batch_size": 32, "learning_rate": 5e-4, "lora_alpha": 8, "max_tokens": 256},
    }
)
"""The paper's settings: those of Llama-2 for causal models, those of RoBERTa for encoders."""
PROMPT = ("scoring", "prompt", "system", "shots", "label_words")
"""Settings of the prompt for a language model."""
OF_TASKS = ("noise", "target_mean", "target_std")
"""Settings that only some tasks have; a task lists its own in `settings`."""
BEFORE_PROMPTS = {"scoring": "letters", "prompt": PAPER}
"""How language models were asked before these settings existed; older records without them mean these values."""
REPORTING = ("eval", "eval_rows", "report_to")
"""Settings that do not affect what is trained."""
_TEXT = r"\S"
_PAPER = "default: the paper's for this kind of model"


class Experiment(Settings):
    """All settings of a run. Fields that are None take the paper's value for the kind of model; the run records the
    values that it used.

    ``Experiment(model="minilm", task="everyday", method=Blob(prior_std=0.1))``, or flat, as in files:
    ``Experiment(model="minilm", task="everyday", method="blob", prior_std=0.1)``.

    Raises:
        ConfigError: a value is out of range, or settings contradict each other; the message names the field.
    """

    model: str = Field(pattern=_TEXT, description="Folder, .gguf file, Hugging Face id, or package: minilm, smollm2.")
    task: str = Field(pattern=_TEXT, description="Known data set, or folder in --data; everyday is built in.")
    data: str | None = Field(None, pattern=_TEXT, description="Folder of data sets; default: the Hugging Face Hub.")
    labels: tuple[str, ...] | None = Field(
        None,
        min_length=2,
        description="Names of the classes, comma-separated; default: those in the train split, sorted.",
    )
    scoring: Scoring | None = Field(
        None, description="What a language model scores of each choice: letters (default), text, or text_per_byte."
    )
    prompt: str | None = Field(
        None,
        pattern=_TEXT,
        description="paper, chat, or a template with {question} {choices} {passage}; default: chat if the tokenizer "
        "has a chat template, unless recipe is paper.",
    )
    system: str | None = Field(None, pattern=_TEXT, description="System message of a chat prompt.")
    shots: int = Field(0, ge=0, le=64, description="Training rows that every prompt shows with answers, by seed.")
    label_words: tuple[str, ...] | None = Field(
        None, min_length=2, description="Labels of the choices instead of letters, comma-separated."
    )
    noise: Literal["predicted", "constant"] | None = Field(
        None,
        description="Noise of numbers: predicted per row (default), or constant: fitted after training on "
        "temperature_split (default: the training rows).",
    )
    target_mean: tuple[float, ...] | None = Field(
        None, min_length=1, description="Mean of each number, comma-separated; default: that of the training rows."
    )
    target_std: tuple[float, ...] | None = Field(
        None, min_length=1, description="Standard deviation of each number; default: that of the training rows."
    )
    method: Method = Field(default_factory=DEFAULT, description="How the posterior is obtained.")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of weights, row order and noise.")
    steps: int = Field(1000, ge=1, le=LARGEST_WHOLE, description="Number of training updates.")
    batch_size: int | None = Field(None, ge=1, le=LARGEST_WHOLE, description=f"Rows per update and process; {_PAPER}.")
    learning_rate: float | None = Field(
        None, gt=0, description=f"Learning rate (6 % warm-up, then linear to 0); {_PAPER}, or the method's own."
    )
    rank: int = Field(8, ge=1, le=MAX_RANK, description="Rank of the adapter.")
    lora_alpha: int | float | None = Field(
        None, gt=0, le=LARGEST_WHOLE, description=f"Scale alpha / rank of the adapter; {_PAPER}."
    )
    target_modules: tuple[str, ...] | None = Field(
        None,
        min_length=1,
        description="Layers to adapt, comma-separated; default: query, value, and an untied lm_head.",
    )
    max_tokens: int | None = Field(
        None, ge=1, le=LARGEST_WHOLE, description="Tokens per row at most; longer rows are refused; " + _PAPER + "."
    )
    precision: Literal["float32", "bf16"] = Field(
        "float32", description="float32, or bf16 autocast (M, G and B stay float32)."
    )
    quantization: Literal["none", "int8", "nf4"] = Field(
        "none", description="Quantization of the base model by bitsandbytes: none, int8 or nf4."
    )
    activation_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, more time."
    )
    train_split: str = Field("train", pattern=_TEXT, description="Split to train on.")
    eval_split: str | None = Field(
        None, pattern=_TEXT, description="Split to score, such as test or dev+test; default: the data set's usual one."
    )
    eval: bool = Field(True, description="Score the posterior once it is trained.")
    eval_rows: int | None = Field(
        None, ge=1, le=LARGEST_WHOLE, description="Score only this many rows, the first of the split; default: all."
    )
    draws: int = Field(
        10, ge=0, le=LARGEST_WHOLE, description="Draws to evaluate, in addition to the mean; 0: the mean only."
    )
    checkpoint_steps: int = Field(0, ge=0, le=LARGEST_WHOLE, description="Updates between checkpoints; 0 for none.")
    adapter: str | None = Field(
        None, pattern=_TEXT, description="Run or LoRA folder to start from; default: an adapter is trained first."
    )
    temperature_split: str | None = Field(
        None, pattern=_TEXT, description="Split to fit a temperature on, such as dev; any method; default: none."
    )
    report_to: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"] = Field(
        "none", description="Tracker that training logs to: tensorboard, wandb, trackio or mlflow."
    )

    @model_validator(mode="before")
    @classmethod
    def _with_method(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Turn flat settings with the name of a method into settings with a method object."""
        method = values.get("method", DEFAULT.name)
        if isinstance(method, Method):
            return values
        if not isinstance(method, str) or method not in METHODS:
            raise ConfigError(f"method: found {method!r}, expected one of {', '.join(METHODS)}.")
        shared = {name: value for name, value in values.items() if name in cls.model_fields}
        found = METHODS[method]
        for name in values.keys() - shared.keys():
            _check_known(name)
            check_value(name, all_fields()[name], values[name])
        own = {name: value for name, value in values.items() if name in found.model_fields}
        return {**shared, "method": found(**own)}

    @model_validator(mode="after")
    def _check_together(self) -> "Experiment":
        if self.adapter is not None and self.method.start is None:
            able = ", ".join(name for name, method in METHODS.items() if method.start is not None)
            raise ConfigError(f"adapter: found one for method {self.method.name!r}, expected one of {able}.")
        for name in self.method.needs:
            if dict(self)[name] is None:
                raise ConfigError(f"{name}: found none, expected one: method {self.method.name!r} is fitted on it.")
        return self

    def resolved(self, family: Family, *, chat: bool = False) -> "Experiment":
        """Return a copy with the kind of model's defaults; target_modules, eval_split and data are not filled in.

        Args:
            family: the kind of model.
            chat: whether the tokenizer has a chat template.
        """
        defaults = {**_FAMILY_DEFAULTS[family], **self.method.run_defaults(family)}
        missing = {name: value for name, value in defaults.items() if dict(self)[name] is None}
        if family == "causal":
            style = CHAT if chat and not self.method.as_published else PAPER
            missing |= {"scoring": self.scoring or "letters", "prompt": self.prompt or style}
        return self.replace(**missing, method=self.method.resolved(family))

    def asked_prompt(self) -> Prompt | None:
        """Return the prompt for a language model; None if no setting of the prompt is given."""
        if (self.scoring, self.prompt, self.system, self.label_words, self.shots) == (None, None, None, None, 0):
            return None
        style, scoring = self.prompt or PAPER, self.scoring or "letters"
        return Prompt(scoring=scoring, style=style, system=self.system, words=self.label_words)

    def as_dict(self) -> dict[str, Any]:
        """Return all settings, including those of the method, as flat JSON values."""
        fields = {**dict(self), "method": self.method.name, **dict(self.method)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, where: str) -> "Experiment":
        """Build an experiment from the flat settings of a file; `where` names the file in errors.

        Settings of other methods are allowed, since one file may serve several methods; they have no effect.

        Raises:
            ConfigError: a setting is unknown (the message suggests the nearest one), missing, or out of range.
        """
        known = all_fields()
        try:
            for name in fields:
                _check_known(str(name))
            values: dict[str, Any] = {name: from_text(known, name, value) for name, value in fields.items()}
            return cls(**values)
        except ConfigError as error:
            raise ConfigError(f"{where}: {error}") from error


def all_fields() -> dict[str, FieldInfo]:
    """Return every setting, of a run and of all methods, by name."""
    fields = dict(Experiment.model_fields)
    for method in METHODS.values():
        fields |= method.model_fields
    return fields


def methods_with(name: str) -> list[str]:
    """Return the names of the methods that have their own setting called `name`."""
    return [method.name for method in METHODS.values() if name in method.model_fields]


def _check_known(name: str) -> None:
    known = all_fields()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
        raise ConfigError(f"unknown setting {name!r}; {hint}")
