"""`Posterior`: a distribution over the adapters of one model; `Sampler`: its draws, which evaluate batches."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from bayestune.errors import ConfigError, DrawError, PosteriorError
from bayestune.settings import Settings
from bayestune.tasks import Task

Values = Mapping[str, Any]
Tensors = Mapping[str, Tensor]
Members = Sequence[Tensors]

_SUBSTITUTING = threading.RLock()
_S = TypeVar("_S", bound=Settings)


class Sampler(ABC):
    """The draws of one prediction: sampled once, then evaluated batch by batch.

    Attributes:
        slices: number of draws; 1 for a point.
        gradients: whether `outputs` needs gradients of the model, so that inference mode must be off.
    """

    slices: int
    gradients: ClassVar[bool] = False

    @abstractmethod
    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        """Return the task's outputs under the draws `part`; draw k is the same function for every batch.

        Args:
            task: the task that reads the outputs from the model.
            batch: a batch of the task, on the model's device.
            part: indices of the draws.

        Raises:
            DrawError: the draws of `part` cannot be separated when they are stacked in one forward.
        """

    def at_once(self, batch: dict[str, Tensor]) -> int:
        """Return how many draws to ask for in one call: all if they share backward passes, otherwise 1."""
        return self.slices if self.gradients else 1


class Posterior(ABC):
    """A distribution over the adapters of `model`: the result of a method.

    Attributes:
        kind: its name in the manifest of a saved posterior.
        adapter: kind of adapter that it uses: "point" (plain LoRA) or "variational" (`BayesLoraConfig`).
        has_mean: whether ``draws=0`` answers with one set of weights.
        model: the model with the adapter at the mean (the mode, or the first member), in evaluation mode.
        default_draws: default number of draws of a prediction.
        temperature: T; every draw answers with ``softmax(logits / T)``. 1 unless it was fitted, or is a teacher's.
        known: features of training rows, [rows, width], to which `novelty` compares; None if none are kept.
    """

    kind: ClassVar[str]
    adapter: ClassVar[str] = "point"
    has_mean: ClassVar[bool] = True
    default_draws: int
    known: Float[Tensor, "rows width"] | None = None

    def __init__(self, model: PeftModel, *, temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature

    @abstractmethod
    def sampler(self, *, draws: int, seed: int) -> Sampler:
        """Return the sampler of draws 0 to `draws` - 1 of `seed`, or of the mean for ``draws=0``.

        Raises:
            DrawError: this posterior has no such draws.
        """

    def with_predictive(self, name: str) -> "Posterior":
        """Return this posterior with another way to average draws: `name` is a `predictive` of `Variational`.

        Raises:
            ConfigError: the name is unknown, or this posterior has only one way.
        """
        raise ConfigError(f"predictive: found {name!r}, expected a posterior with Gaussian or dropout adapters.")

    def settings(self) -> dict[str, Any]:
        """Return the settings of the posterior, plain JSON values, which the manifest stores."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the posterior beyond the adapter of `model`; they are stored in a safetensors file."""
        return {}

    def more_members(self) -> Members:
        """Return further adapters with the same settings, each as tensors by the keys of a LoRA file."""
        return ()

    @classmethod
    def from_saved(cls, model: PeftModel, settings: Values, tensors: Tensors, members: Members) -> "Posterior":
        """Return the posterior that was saved.

        Args:
            model: a model with the saved adapter.
            settings: result of `settings`.
            tensors: result of `tensors`; their values are finite.
            members: result of `more_members`.

        Raises:
            PosteriorError: they do not belong to this kind of posterior.
        """
        return cls(model)


def saved_settings(kind: str, declared: type[_S], values: Values) -> _S:
    """Return the settings of a saved posterior, checked as `declared`.

    Raises:
        PosteriorError: a setting is missing, unknown or out of range.
    """
    try:
        return declared(**values)
    except ConfigError as error:
        raise PosteriorError(f"{kind}: {error}") from error


class SubstitutedDraws(Sampler):
    """Draws that are whole sets of weights: one forward per draw, with its weights in place of the model's.

    The model is changed only inside a forward (`torch.func.functional_call`). Forwards of several threads take turns,
    but a thread that calls the model directly in the meantime would see the substituted weights.

    Args:
        model: the model.
        weights: per draw, tensors by parameter names of `model`.
    """

    def __init__(self, model: PeftModel, weights: Sequence[Tensors]) -> None:
        self.model, self.weights, self.slices = model, weights, len(weights)

    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        return torch.stack([task.outputs(Substituted(self.model, self.weights[k]), batch) for k in part])


class Substituted:
    """`model` with some of its parameters replaced, as a callable with `config` and `parameters`."""

    def __init__(self, model: nn.Module, weights: Tensors) -> None:
        self.model, self.weights = model, weights
        self.config: Any = model.config

    def __call__(self, **inputs: Any) -> Any:
        with _SUBSTITUTING:
            return functional_call(self.model, dict(self.weights), (), inputs)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the model's own parameters; those of the draw have the same types and devices."""
        return self.model.parameters()


def refuse_draws(draws: int, why: str) -> DrawError:
    """Return the error for a number of draws that a posterior does not have."""
    return DrawError(f"draws: found {draws}; {why}")
