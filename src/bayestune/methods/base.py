"""`Method`: the settings of a method, and how it gets from an adapter to a posterior.

A method is one class in one file of this folder, or in a script of yours: its settings are fields with bounds and one
line of help, `adapter_config` says which adapter it trains, `fit` how its posterior comes about, and `posterior` is
the class of what it leaves, draws and files included. Command-line options, keys of settings files, lines of tables
and the page of methods in the docs are made from these declarations.
"""

from abc import ABC
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

from peft import LoraConfig, PeftModel

from bayestune.errors import BayestuneError
from bayestune.sampling import Point, Posterior
from bayestune.settings import Settings
from bayestune.tasks import AnyRow, Task
from bayestune.training import KLSettings

Family = Literal["causal", "encoder"]
_M = TypeVar("_M", bound="Method")


@dataclass(frozen=True, kw_only=True)
class Updates:
    """What a training run consists of.

    Attributes:
        steps: updates. rows: training rows. batch_size: rows per update and process. processes: that train together.
        warmup: share of the updates in which the learning rate rises.
    """

    steps: int
    rows: int
    batch_size: int
    processes: int
    warmup: float


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table: its label, and the settings in which it differs from those of the table.

    Attributes:
        by_default: whether the line is run when no methods are named.
    """

    label: str
    settings: Mapping[str, Any]
    by_default: bool = True


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """The run that a method is fitted in.

    Attributes:
        task: what is asked. rows: training rows. more_rows: rows of the splits that settings of the method name, by
            setting. seed, draws: of the run.
        started: the model already holds a finished adapter, which the run was given to start from.
        folder: where the run keeps checkpoints. checkpoints: whether it keeps any. resume: continue from them.
        progress: show bars.
        train: ``train(model, label=..., seed=..., folder=..., resume=..., callbacks=..., **training_arguments)``.
        renew: ``renew(model, seed)``, the same base with a new adapter and a new head.
        keep: ``keep(model, folder)`` saves a finished adapter (main process only).
        restore: ``restore(model, folder)`` puts a kept adapter in the place of the model's own.
        precision: context in which the model is evaluated.
    """

    task: Task
    rows: Sequence[AnyRow]
    more_rows: Mapping[str, Sequence[AnyRow]]
    seed: int
    draws: int
    started: bool
    folder: Path
    checkpoints: bool
    resume: bool
    progress: bool
    train: Callable[..., None]
    renew: Callable[[PeftModel, int], PeftModel]
    keep: Callable[[PeftModel, Path], None]
    restore: Callable[[PeftModel, Path], PeftModel]
    precision: Callable[[], AbstractContextManager[Any]]


class Method(Settings, ABC):
    """How a posterior over adapter weights is obtained. Subclasses declare their settings as fields.

    Attributes:
        name: what settings, records and options call it. label: what tables call it. paper: its source.
        summary: one line about it.
        posterior: class of what it leaves.
        has_no_draws: whether it always answers with one set of weights.
        variants: further lines of tables, by name.
        start: the method whose finished adapter it starts from, for one that is fitted after training; else None.
        needs: settings of the run, beside its own, that must be given.
        splits: its own settings that name splits of rows.
    """

    name: ClassVar[str]
    label: ClassVar[str]
    summary: ClassVar[str]
    paper: ClassVar[str]
    posterior: ClassVar[type[Posterior]] = Point
    start: ClassVar["type[Method] | None"] = None
    needs: ClassVar[tuple[str, ...]] = ()
    splits: ClassVar[tuple[str, ...]] = ()
    has_no_draws: ClassVar[bool] = False
    variants: ClassVar[Mapping[str, Line]] = MappingProxyType({})

    def resolved(self: _M, family: Family) -> _M:
        """The same with the paper's values for this family of models where a setting is None."""
        return self

    def adapter_config(self, **lora: Any) -> LoraConfig:
        """The PEFT configuration of a new adapter; `lora` holds the settings that every method has."""
        return LoraConfig(**lora)

    def training_arguments(self) -> dict[str, Any]:
        """Arguments of `TrainingArguments` that are the method's own."""
        return {}

    def kl(self, updates: Updates) -> KLSettings | None:
        """The KL step of its training; None without one."""
        return None

    def weight_prior_std(self) -> float | None:
        """Standard deviation of a Gaussian prior that is a term of the training loss; None without one."""
        return None

    def check(self, model: PeftModel, updates: Updates) -> None:
        """Refuse what this machine or this run cannot do, before anything is trained or written.

        Raises:
            ConfigError: naming the setting.
        """

    def fit(self, model: PeftModel, run: Fitting) -> Posterior:
        """The posterior, in evaluation mode, from a `model` with a new adapter, or the one to start from."""
        run.train(model, label=self.name)
        return self.posterior(model.eval())

    def draw_counts(self, draws: int) -> tuple[int, ...]:
        """The numbers of draws of its evaluations, in order, when `draws` are asked for; 0 is the mean."""
        return (0, draws)

    @classmethod
    def lines(cls) -> dict[str, Line]:
        """Its lines in tables, by name."""
        return {cls.name: Line(label=cls.label, settings={}), **cls.variants}


class PointMethod(Method, ABC):
    """A method whose posterior is one adapter: no draws."""

    has_no_draws: ClassVar[bool] = True

    def draw_counts(self, draws: int) -> tuple[int, ...]:
        return (0,)


ADAPTER = "adapter"
"""The folder, beside the checkpoints, of an adapter that was trained as the start of a fit."""


def finished_adapter(method: Method, model: PeftModel, run: Fitting) -> PeftModel:
    """`model` with a finished plain LoRA adapter: the one it was given, or one that is trained now and kept."""
    if not run.started:
        run.train(model, label=method.name)
        run.keep(model.eval(), run.folder.with_name(ADAPTER))
    return model.eval()


def refit_hint(error: BayestuneError, run: Fitting) -> BayestuneError:
    """The error of a fit that failed, with where the adapter is that was trained for it."""
    if run.started:
        return error
    kept = run.folder.with_name(ADAPTER)
    return type(error)(f"{error} The adapter trained for it is in {kept}: fit again with --adapter.")


class PostHocMethod(Method, ABC):
    """A method that is fitted to a finished plain LoRA adapter: `fit_to` a model that holds one."""

    def fit(self, model: PeftModel, run: Fitting) -> Posterior:
        model = finished_adapter(self, model, run)
        try:
            return self.fit_to(model, run)
        except BayestuneError as error:
            raise refit_hint(error, run) from error

    def fit_to(self, model: PeftModel, run: Fitting) -> Posterior:
        """The posterior around the finished adapter of `model`."""
        raise AssertionError("a method that is fitted after training defines fit_to")
