"""`Posterior`: a distribution over the adapters of one model; `Sampler`: its draws, ready to answer batches."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.func import functional_call

from bayestune.errors import DrawError
from bayestune.tasks import Task

Settings = dict[str, Any]
"""Plain JSON values."""

_SUBSTITUTING = threading.RLock()


class Sampler(ABC):
    """The draws of one prediction: made once, then asked batch by batch.

    Attributes:
        slices: how many draws there are; 1 for a point.
        gradients: whether `logits` needs gradients of the model, so that inference mode must be off.
    """

    slices: int
    gradients: ClassVar[bool] = False

    @abstractmethod
    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        """The logits of draws `part` for a batch on the model's device; draw k is the same function for any batch.

        Raises:
            DrawError: the draws of `part` cannot be told apart when they are stacked in one forward.
        """

    def at_once(self, batch: dict[str, Tensor]) -> int:
        """How many draws to ask for in one call."""
        return 1


class Posterior(ABC):
    """What a method leaves: a distribution over the adapters of `model`.

    Attributes:
        kind: what the manifest of its folder calls it.
        model: the model with the adapter at the mean (the mode, or the first member), in evaluation mode.
        default_draws: draws of a prediction when none are asked for.
        temperature: T; every draw answers with ``softmax(logits / T)``. 1 unless `fit_temperature` set it.
    """

    kind: ClassVar[str]
    default_draws: int
    model: PeftModel
    temperature: float

    def __init__(self, model: PeftModel, *, temperature: float = 1.0) -> None:
        self.model, self.temperature = model, temperature

    @abstractmethod
    def sampler(self, *, draws: int, seed: int) -> Sampler:
        """Draws 0 to `draws` - 1 of `seed`; the mean alone for ``draws=0``.

        Raises:
            DrawError: this posterior has no such draws.
        """

    def settings(self) -> Settings:
        """What belongs to the posterior beside its tensors, for the manifest."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """What belongs to the posterior beside the adapter of `model`, for its own safetensors file."""
        return {}

    def more_members(self) -> Sequence[Mapping[str, Tensor]]:
        """Further adapters of the same settings, each by the keys of a LoRA file."""
        return ()

    @classmethod
    def from_saved(
        cls,
        model: PeftModel,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        members: Sequence[Mapping[str, Tensor]],
    ) -> "Posterior":
        """The posterior that `settings`, `tensors` and `more_members` were taken from, on a model with its adapter.

        Raises:
            PosteriorError: they are not those of this kind.
        """
        return cls(model)


class SubstitutedDraws(Sampler):
    """Draws that are whole sets of weights: one forward each, with those weights in the place of the model's.

    `weights` holds one mapping a draw, from parameter names of `model` to tensors. The model is changed only inside
    a forward (`torch.func.functional_call`). Forwards of several threads take turns; one that goes past this class,
    such as calling the model itself in another thread meanwhile, would see the substituted weights.
    """

    def __init__(self, model: PeftModel, weights: Sequence[Mapping[str, Tensor]]) -> None:
        self.model, self.weights, self.slices = model, weights, len(weights)

    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        return torch.stack([task.outputs(Substituted(self.model, self.weights[k]), batch) for k in part])


class Substituted:
    """`model` as a function of its inputs, with some of its parameters replaced."""

    def __init__(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        self.model, self.weights = model, weights
        self.config: Any = model.config

    def __call__(self, **inputs: Any) -> Any:
        with _SUBSTITUTING:
            return functional_call(self.model, dict(self.weights), (), inputs)


def refuse_draws(draws: int, why: str) -> DrawError:
    """The error for a number of draws that a posterior does not have."""
    return DrawError(f"draws: found {draws}; {why}")
