"""`Method`: the settings of a method, and how it gets from an adapter to a posterior.

A method is one class in one file of this folder, or in a script of yours. Command-line options, keys of settings
files, lines of tables and the page of methods in the docs are made from its declaration.
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
"""The setting, and the rows of a run, that a method fits something on after training."""
FIT_SPLIT_HELP = (
    "Rows for what is fitted after training, the scale of the std (default: cut from the training rows by the seed) "
    "or the prior precision of laplace (default: the marginal likelihood, without rows)."
)


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What a training run consists of."""

    steps: int  # number of updates
    rows: int  # number of training rows
    batch_size: int  # rows per update and process
    processes: int  # that train together
    warmup: float  # share of the updates in which the learning rate rises


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table."""

    label: str
    settings: Mapping[str, Any]  # those in which it differs from the table's
    by_default: bool = True  # whether it runs if no methods are named


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The run that a method is fitted in.

    ``train(model, label=..., task=..., rows=..., seed=..., folder=..., resume=..., optimizer=..., callbacks=...,
    **training_arguments)`` trains an adapter; ``renew(model, seed)`` returns the same base with a new adapter and a
    new head.
    """

    task: Task
    rows: Sequence[AnyRow]  # of the training split
    more_rows: Mapping[str, Sequence[AnyRow]]  # of the splits that settings name, by setting, and those held out
    seed: int
    learning_rate: float  # its peak
    draws: int  # of the run's predictions
    tempered: bool  # whether a temperature is fitted afterwards
    started: bool  # whether the model already holds the finished adapter that the run was given to start from
    folder: Path  # where the run keeps checkpoints
    checkpoints: bool  # whether it keeps any
    resume: bool  # whether to continue from them
    progress: bool  # whether to show progress bars
    found: dict[str, Any]  # what the method wants in the record of the run, under "fitted"
    train: Callable[..., None]
    renew: Callable[[PeftModel, int], PeftModel]
    keep: Callable[[PeftModel, Path], None]  # saves a finished adapter (main process only)
    restore: Callable[[PeftModel, Path], PeftModel]  # replaces the model's adapter with a kept one
    load: Callable[[PeftModel, Path], Posterior]  # replaces the model's adapter with the posterior of another run
    precision: Callable[[], AbstractContextManager[Any]]  # context in which the model is evaluated


class Method(Settings, ABC):
    """How a posterior over adapter weights is obtained. Subclasses declare their settings as fields."""

    name: ClassVar[str]  # in settings, records and options
    label: ClassVar[str]  # in tables
    summary: ClassVar[str]  # one line about it
    paper: ClassVar[str]  # its source
    posterior: ClassVar[type[Posterior]] = Point
    start: ClassVar["type[Method] | None"] = None  # whose finished adapter it is fitted to, after training
    needs: ClassVar[tuple[str, ...]] = ()  # settings of the run, beside its own, that must be given
    splits: ClassVar[tuple[str, ...]] = ()  # its own settings that name splits of rows
    has_no_draws: ClassVar[bool] = False  # whether it always answers with one set of weights
    variants: ClassVar[Mapping[str, Line]] = MappingProxyType({})  # further lines of tables, by name
    in_tables: ClassVar[Mapping[str, Any]] = MappingProxyType(
        {}
    )  # where it would hold rows out: all train on the same

    @property
    def as_published(self) -> bool:
        """Whether all settings of its paper are asked for."""
        return False

    def resolved(self, family: Family) -> "Method":
        """The same method with the paper's values for this family of models where a setting is None."""
        return self

    def run_defaults(self, family: Family) -> Mapping[str, Any]:
        """Settings of the run, by name, whose defaults differ from the paper's for this family of models."""
        return {}

    def adapter_config(self, **lora: Any) -> LoraConfig:
        """The PEFT configuration of a new adapter; `lora` holds the settings that every method has."""
        return LoraConfig(**lora)

    def training_arguments(self) -> dict[str, Any]:
        """The method's own arguments of `TrainingArguments`."""
        return {}

    def kl(self, updates: Updates) -> KLSettings | None:
        """The KL step of its training, if it has one."""
        return None

    def held_out(self, rows: int) -> int:
        """How many of `rows` training rows it does not train on: they come as `more_rows["fit_split"]`."""
        return 0

    def weight_prior_std(self) -> float | None:
        """Standard deviation of a Gaussian prior that is a term of the training loss, if there is one."""
        return None

    def check(self, model: PeftModel, updates: Updates) -> None:
        """Raise a ConfigError if this machine or run cannot do it, before anything is trained or written."""

    def check_task(self, task: Task) -> None:
        """Raise a ConfigError if it cannot answer a task, before anything is trained or written."""

    def fit(self, model: PeftModel, run: Fitting) -> Posterior:
        """The posterior, in evaluation mode, from a `model` with a new adapter, or the one to start from."""
        run.train(model, label=self.name)
        return self.posterior(model.eval())

    def draw_counts(self, draws: int) -> tuple[int, ...]:
        """The numbers of draws of its evaluations, in order, if `draws` are asked for; 0 is the mean."""
        return (0,) if self.has_no_draws or draws == 0 else (0, draws)

    @classmethod
    def lines(cls) -> dict[str, Line]:
        """Its lines in tables, by name."""
        return {cls.name: Line(label=cls.label, settings={}), **cls.variants}


class PointMethod(Method, ABC):
    """A method whose posterior is one adapter: no draws."""

    has_no_draws = True


class PostHocMethod(Method, ABC):
    """A method that is fitted to a finished plain LoRA adapter: one that is given, or one that is trained first."""

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
        """The posterior around the finished adapter of `model`."""


def plain_adapter(model: nn.Module, *, by: str) -> tuple[PeftModel, str]:
    """`model` and the name of its active adapter, which the method `by` can start from.

    Raises:
        ConfigError: not a PeftModel with one active, plain LoRA adapter that is not merged.
    """
    model, adapter, kind = active_adapter(model)
    if kind != "point":
        raise ConfigError(f"{by}: adapter {adapter!r} is a posterior already, expected plain LoRA (LoraConfig).")
    if is_merged(model):
        raise ConfigError(f"{by}: adapter {adapter!r} is merged into the base weights: call unmerge_adapter() first.")
    return model, adapter
