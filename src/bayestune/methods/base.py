"""`Method`: the settings of a method, and how it gets from an adapter to a posterior.

A method is one class in one file of this folder, or in your own script. Its command-line options, its keys in
settings files, its lines in tables and its section in the docs are made from its declaration.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from peft import LoraConfig, PeftModel
from torch import nn

from bayestune.adapters import is_merged
from bayestune.errors import BayestuneError, ConfigError
from bayestune.sampling import Point, Posterior
from bayestune.settings import Settings
from bayestune.storage.state import active_adapter
from bayestune.tasks import AnyRow, Task
from bayestune.training import KLSettings

Family = Literal["causal", "encoder"]
FIT_SPLIT = "fit_split"
"""The setting that names the rows on which a method fits something after training, and the key of those rows."""
FIT_SPLIT_HELP = (
    "Split to fit the scale of the std on, after training (default: rows held out from the training rows), "
    "or the prior precision of laplace (default: the marginal likelihood, without a split)."
)


@dataclass(frozen=True, kw_only=True)
class Updates:
    """The number and size of the updates of a training run."""

    steps: int  # number of updates
    rows: int  # number of training rows
    batch_size: int  # rows per update and process
    processes: int  # that train together
    warmup: float  # share of the updates in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table."""

    label: str
    settings: Mapping[str, Any]  # settings that differ from the table's
    by_default: bool = True  # whether it runs if no methods are named


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """What a method may use of the run that it is fitted in.

    ``train(model, label=..., task=..., rows=..., seed=..., folder=..., resume=..., optimizer=..., callbacks=...,
    **training_arguments)`` trains an adapter; ``renew(model, seed)`` returns the same base with a new adapter and a
    new head.
    """

    task: Task
    rows: Sequence[AnyRow]  # of the training split
    more_rows: Mapping[str, Sequence[AnyRow]]  # of splits and files that the method names, by setting; held-out rows
    seed: int
    learning_rate: float  # the peak of the schedule
    draws: int  # draws in the run's predictions
    tempered: bool  # whether a temperature is fitted afterwards
    started: bool  # whether the model already holds the finished adapter that the run was given to start from
    folder: Path  # where the run keeps checkpoints
    checkpoints: bool  # whether the run keeps any checkpoints
    resume: bool  # whether to continue from them
    progress: bool  # whether to show progress bars
    found: dict[str, Any]  # filled by the method, and recorded with the run under "fitted"
    train: Callable[..., None]
    renew: Callable[[PeftModel, int], PeftModel]
    keep: Callable[[PeftModel, Path], None]  # saves a finished adapter (main process only)
    restore: Callable[[PeftModel, Path], PeftModel]  # replaces the model's adapter with a kept one
    load: Callable[[PeftModel, Path], Posterior]  # replaces the model's adapter with the posterior of another run
    precision: Callable[[], AbstractContextManager[Any]]  # context in which the model is evaluated


class Method(Settings, ABC):
    """A way to obtain a posterior over adapter weights. Subclasses declare their settings as fields."""

    name: ClassVar[str]  # in settings, records and options
    label: ClassVar[str]  # in tables
    summary: ClassVar[str]  # a description in one line
    paper: ClassVar[str]  # the source
    posterior: ClassVar[type[Posterior]] = Point
    start: ClassVar["type[Method] | None"] = None  # the method whose finished adapter it is fitted to after training
    needs: ClassVar[tuple[str, ...]] = ()  # settings of the run, not its own, that must be given
    splits: ClassVar[tuple[str, ...]] = ()  # its own settings that name splits of rows
    files: ClassVar[tuple[str, ...]] = ()  # its own settings that name files of further rows, without labels
    one_training: ClassVar[bool] = True  # whether it trains one adapter, and only then looks at the whole model
    has_no_draws: ClassVar[bool] = False  # whether it always answers with one set of weights
    variants: ClassVar[Mapping[str, Line]] = MappingProxyType({})  # further lines of tables, by name
    # its settings in tables, so that it holds no rows out and all methods train on the same rows
    in_tables: ClassVar[Mapping[str, Any]] = MappingProxyType({})

    @property
    def as_published(self) -> bool:
        """Whether the method follows its paper's recipe; the run then uses the paper's prompt too."""
        return False

    @property
    def source_run(self) -> str | None:
        """The folder of a finished run that the method queries; this run keeps its prompt. None without one."""
        return None

    def resolved(self, family: Family) -> "Method":
        """Return a copy in which settings that are None have the paper's values for this family of models."""
        return self

    def run_defaults(self, family: Family) -> Mapping[str, Any]:
        """Return the run's settings, by name, whose defaults this method changes for this family of models."""
        return {}

    def adapter_config(self, **lora: Any) -> LoraConfig:
        """Return the PEFT configuration of a new adapter; `lora` holds the settings that every method has."""
        return LoraConfig(**lora)

    def training_arguments(self) -> dict[str, Any]:
        """Return the method's own arguments of `TrainingArguments`."""
        return {}

    def kl(self, updates: Updates) -> KLSettings | None:
        """Return the settings of the KL step of its training; None without a KL."""
        return None

    def held_out(self, rows: int) -> int:
        """Return how many of `rows` training rows to hold out; `fit` gets them as `more_rows["fit_split"]`."""
        return 0

    def weight_prior_std(self) -> float | None:
        """Return the standard deviation of the Gaussian prior in the training loss; None without one."""
        return None

    def check(self, model: PeftModel, updates: Updates) -> None:
        """Raise a ConfigError if the method cannot run here, before anything is trained or written."""

    def check_task(self, task: Task) -> None:
        """Raise a ConfigError if the method cannot answer the task, before anything is trained or written."""

    def fit(self, model: PeftModel, run: Fitting) -> Posterior:
        """Return the posterior, in evaluation mode; `model` has a new adapter, or the finished one to start from."""
        run.train(model, label=self.name)
        return self.posterior(model.eval())

    def draw_counts(self, draws: int) -> tuple[int, ...]:
        """Return the numbers of draws to evaluate, in order, if `draws` are asked for; 0 is the mean."""
        return (0,) if self.has_no_draws or draws == 0 else (0, draws)

    @classmethod
    def lines(cls) -> dict[str, Line]:
        """Return its lines in tables, by name."""
        return {cls.name: Line(label=cls.label, settings={}), **cls.variants}


class PointMethod(Method, ABC):
    """A method whose posterior is one adapter, without draws."""

    has_no_draws = True


class PostHocMethod(Method, ABC):
    """A method that is fitted to a finished plain LoRA adapter, which is given or trained first."""

    one_training = False

    def fit(self, model: PeftModel, run: Fitting) -> Posterior:
        kept = run.folder.with_name("adapter")
        if not run.started:
            run.train(model, label=self.name)
            run.keep(model.eval(), kept)
        try:
            return self.fit_to(model.eval(), run)
        except BayestuneError as error:
            if run.started:
                raise
            hint = f"The adapter trained for it is in {kept}: fit again with --adapter."
            raise type(error)(f"{error} {hint}") from error

    @abstractmethod
    def fit_to(self, model: PeftModel, run: Fitting) -> Posterior:
        """Return the posterior around the finished adapter of `model`."""


def plain_adapter(model: nn.Module, *, by: str) -> tuple[PeftModel, str]:
    """Return `model` and the name of its active adapter; `by` names the calling method in errors.

    Raises:
        ConfigError: `model` is not a PeftModel with one active, plain LoRA adapter that is not merged.
    """
    model, adapter, kind = active_adapter(model)
    if kind != "point":
        raise ConfigError(f"{by}: adapter {adapter!r} is a posterior already, expected plain LoRA (LoraConfig).")
    if is_merged(model):
        raise ConfigError(f"{by}: adapter {adapter!r} is merged into the base weights: call unmerge_adapter() first.")
    return model, adapter
