r"""SWAG: a Gaussian fitted to the weights that the tail of a run visits (Maddox et al. 2019, arXiv 1902.02476).

Over T snapshots theta_i of all weights of a plain LoRA adapter (A, B and `modules_to_save`), with the running mean
``m_i = (theta_1 + ... + theta_i) / i``,

    mean = m_T,   Sigma_diag = diag(1/T sum_i theta_i^2 - mean^2),   D = the last K columns theta_i - m_i,

and draw k is (equation 1)

    theta_k = mean + 1/sqrt(2) Sigma_diag^(1/2) z_1 + 1/sqrt(2 (K - 1)) D z_2,

whose covariance is ``Sigma_diag / 2 + D D^T / (2 (K - 1))``. z_2 is one vector for all weights of a draw.
"""

import math
from collections import deque
from typing import Any

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerState

from bayestune.adapters import is_merged
from bayestune.errors import ConfigError, DrawError, PosteriorError, TrainingError
from bayestune.functional import prediction_noise
from bayestune.methods.base import Fitting, PostHocMethod, plain_adapter
from bayestune.methods.mle import Mle
from bayestune.sampling.base import (
    Members,
    Posterior,
    Sampler,
    SubstitutedDraws,
    Tensors,
    Values,
    refuse_draws,
    saved_settings,
)
from bayestune.settings import LARGEST_WHOLE, Settings
from bayestune.storage.state import active_adapter, adapter_tensors, describe, parameter_names, tensor_fault

_SNAPSHOTS = 20
_COLUMNS = "swag columns"  # names the noise z_2; no weight has this name


class Moments:
    """Running mean and variance of named tensors, and their last K deviations, all on the CPU.

    Welford's recursion in float64 stays accurate if the spread is small relative to the mean.

    Attributes:
        rank: K, the largest number of columns to keep.
        snapshots: T, the number of snapshots added.
        mean: m_T, float64.
        deviations: the last min(T, K) columns ``theta_i - m_i``, oldest first; float32.

    Raises:
        ConfigError: `rank` is below 2.
    """

    def __init__(self, *, rank: int = 20) -> None:
        if rank < 2:
            raise ConfigError(f"SWAG rank: found {rank}, expected 2 or more: the scale of K columns is 1 / (K - 1).")
        self.rank, self.snapshots = rank, 0
        self.mean: dict[str, Tensor] = {}
        self.deviations: dict[str, deque[Tensor]] = {}
        self._squares: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, weights: Tensors) -> None:
        """Add a snapshot, with the same names and shapes as the earlier ones.

        Raises:
            ConfigError: the names differ.
            PosteriorError: a value is NaN or infinite; nothing was added.
        """
        for name, weight in weights.items():
            if not torch.isfinite(weight).all():
                raise PosteriorError(f"SWAG: snapshot {self.snapshots + 1} of {name!r} holds NaN or infinite values.")
        if self.snapshots and weights.keys() != self.mean.keys():
            wrong = sorted(weights.keys() ^ self.mean.keys())[0]
            raise ConfigError(f"SWAG: found different weights, such as {wrong!r}, expected those of snapshot 1.")
        self.snapshots += 1
        for name, weight in weights.items():
            new = weight.detach().cpu().double()
            if self.snapshots == 1:
                self.mean[name], self._squares[name] = torch.zeros_like(new), torch.zeros_like(new)
                self.deviations[name] = deque(maxlen=self.rank)
            change = new - self.mean[name]
            self.mean[name] += change / self.snapshots
            self._squares[name] += change.square() * ((self.snapshots - 1) / self.snapshots)
            self.deviations[name].append((new - self.mean[name]).float())

    def variance(self, name: str) -> Tensor:
        """Return the diagonal of Sigma_diag, ``1/T sum_i (theta_i - mean)^2``, float64."""
        return self._squares[name] / self.snapshots


class _Saved(Settings):
    snapshots: int = Field(ge=1)
    columns: int = Field(ge=1)


class SwagPosterior(Posterior):
    """The Gaussian of the SWAG equation, made by `from_moments`; each draw replaces all weights of the adapter.

    The adapter of `model` holds the mean. `variance` (the diagonal of Sigma_diag) and `deviations` (D, [columns,
    *shape]) are float32, keyed as the weights in a saved adapter. With one snapshot, every draw is the mean.
    """

    kind = "swag"
    default_draws = 10

    def __init__(
        self, model: PeftModel, *, snapshots: int, variance: dict[str, Tensor], deviations: dict[str, Tensor]
    ) -> None:
        super().__init__(model)
        self.snapshots, self._variance, self._deviations = snapshots, variance, deviations
        self._columns = len(next(iter(deviations.values())))

    @classmethod
    @torch.no_grad()
    def from_moments(cls, model: PeftModel, moments: Moments) -> "SwagPosterior":
        """Return the posterior of the snapshots in `moments`; the active adapter of `model` is set to their mean.

        Raises:
            ConfigError: there are no snapshots, or they are not of the plain LoRA adapter of `model`.
        """
        weights = trained_weights(model)
        expected = describe({name: weight.double() for name, weight in weights.items()})
        fault = tensor_fault(expected, describe(moments.mean))
        if fault:
            raise ConfigError(f"SWAG: {fault}, in {moments.snapshots} snapshots: collect them from this very adapter.")
        for name, weight in weights.items():
            weight.copy_(moments.mean[name])
        return cls(
            model.eval(),
            snapshots=moments.snapshots,
            variance={name: moments.variance(name).float() for name in weights},
            deviations={name: torch.stack(list(moments.deviations[name])) for name in weights},
        )

    @classmethod
    def from_saved(cls, model: PeftModel, settings: Values, tensors: Tensors, members: Members) -> "SwagPosterior":
        saved = saved_settings(cls.kind, _Saved, settings)
        if saved.columns > saved.snapshots:
            raise PosteriorError(f"swag: found {dict(settings)}, expected columns <= snapshots.")
        shapes = {name: list(weight.shape) for name, weight in trained_weights(model).items()}
        expected = {f"variance.{name}": [shape, "float32"] for name, shape in shapes.items()}
        expected |= {f"deviations.{name}": [[saved.columns, *shape], "float32"] for name, shape in shapes.items()}
        fault = tensor_fault(expected, describe(tensors))
        if fault:
            raise PosteriorError(f"swag: {fault}.")
        variance = {name: tensors[f"variance.{name}"] for name in shapes}
        for name, tensor in variance.items():
            if (tensor < 0).any():
                raise PosteriorError(f"swag: tensor 'variance.{name}' holds a negative variance.")
        deviations = {name: tensors[f"deviations.{name}"] for name in shapes}
        return cls(model, snapshots=saved.snapshots, variance=variance, deviations=deviations)

    def settings(self) -> dict[str, Any]:
        return {"snapshots": self.snapshots, "columns": self._columns}

    def tensors(self) -> dict[str, Tensor]:
        variance = {f"variance.{name}": tensor for name, tensor in self._variance.items()}
        return variance | {f"deviations.{name}": tensor for name, tensor in self._deviations.items()}

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        """Return draws of all adapter weights; ``draws=0`` is the mean, as in stochastic weight averaging (SWA)."""
        if draws < 0:
            raise refuse_draws(draws, "expected 0 (the mean) or more.")
        if draws and is_merged(self.model):
            raise DrawError("the adapter is merged into the base weights: call unmerge_adapter() first.")
        if not draws:
            return SubstitutedDraws(self.model, [{}])
        names, means = parameter_names(*active_adapter(self.model)[:2]), trained_weights(self.model)
        weights = [{names[key]: self._drawn(key, mean, k, seed) for key, mean in means.items()} for k in range(draws)]
        return SubstitutedDraws(self.model, weights)

    def _drawn(self, key: str, mean: Tensor, index: int, seed: int) -> Tensor:
        """Compute one weight of draw (`seed`, `index`), in float64 on the CPU, so it is the same on every machine."""
        noise = prediction_noise(seed, index, key, tuple(mean.shape)).double()
        change = (self._variance[key].double() / 2).sqrt() * noise
        if self._columns > 1:
            z = prediction_noise(seed, index, _COLUMNS, (self._columns,)).double()
            scale = 1 / math.sqrt(2 * (self._columns - 1))
            change = change + scale * torch.tensordot(z, self._deviations[key].double(), dims=1)
        return (mean.cpu().double() + change).to(mean)


def trained_weights(model: PeftModel) -> dict[str, Tensor]:
    """Return every parameter of the active plain LoRA adapter of `model`, by its key in a saved file.

    Raises:
        ConfigError: there is no such adapter.
    """
    model, adapter = plain_adapter(model, by="swag")
    tensors = adapter_tensors(model, adapter)
    return {key: tensors[key] for key in parameter_names(model, adapter)}


class SwagCallback(TrainerCallback):
    """Adds the weights of a plain LoRA adapter to `moments` after updates `start`, ``start + every``, ... of a run.

    It works with `BayesTrainer` and with transformers' Trainer, and does not change the training. Use a learning rate
    that is constant and not small over the tail, so that the snapshots spread as the posterior does (section 3.1).
    Checkpoints do not contain snapshots.

    Raises:
        ConfigError: a setting is out of range; or, when training begins, there is no plain LoRA adapter, something
            else is trained too, or the run ends before its second snapshot.
        TrainingError: the run is resumed after its first snapshot.
    """

    def __init__(self, *, start: int, every: int, rank: int = 20) -> None:
        if start < 1 or every < 1:
            raise ConfigError(f"SwagCallback: found start={start}, every={every}, expected at least 1.")
        self.start, self.every, self.moments = start, every, Moments(rank=rank)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            raise ConfigError("SwagCallback: found a sharded model (FSDP), expected whole weights: use DDP.")
        trained_weights(model)
        own = set(parameter_names(*active_adapter(model)[:2]).values())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in own:
                raise ConfigError(f"SwagCallback: {name} is trained but is not part of the adapter: freeze it.")
        if self.start + self.every > state.max_steps:
            raise ConfigError(
                f"SwagCallback: found start={self.start}, every={self.every} in a run of {state.max_steps} updates, "
                "expected at least two snapshots: start earlier."
            )
        due = max(0, (state.global_step - self.start) // self.every + 1)
        if due != self.moments.snapshots:
            raise TrainingError(
                f"SwagCallback: the run stands at update {state.global_step} with {self.moments.snapshots} snapshots, "
                f"expected {due}; snapshots are not in a checkpoint: resume before update {self.start}, use a new "
                "callback for a new run."
            )

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        past = state.global_step - self.start
        if past >= 0 and past % self.every == 0:
            self.moments.add(trained_weights(kwargs["model"]))


class Swag(PostHocMethod):
    """Trains a finished plain LoRA adapter for `swag_steps` more updates at a constant learning rate, and fits a
    Gaussian to the weights that it visits."""

    name = "swag"
    label = "SWAG"
    summary = "Gaussian of the weights that the tail of a run visits"
    paper = "Maddox et al. 2019, arXiv 1902.02476"
    posterior = SwagPosterior
    start = Mle

    swag_steps: int = Field(100, ge=2, le=LARGEST_WHOLE, description="Updates to collect weights from.")
    swag_learning_rate: float = Field(1e-4, gt=0, description="Constant learning rate of these updates.")

    def fit_to(self, model: PeftModel, run: Fitting) -> SwagPosterior:
        every = max(1, self.swag_steps // _SNAPSHOTS)
        callback = SwagCallback(start=every, every=every, rank=_SNAPSHOTS)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".default" in name)
        run.train(
            model,
            label=self.name,
            folder=run.folder / "tail",
            resume=False,
            callbacks=[callback],
            max_steps=self.swag_steps,
            learning_rate=self.swag_learning_rate,
            lr_scheduler_type="constant",
            warmup_steps=0,
            save_strategy="no",
        )
        model.requires_grad_(False)
        return SwagPosterior.from_moments(model.eval(), callback.moments)
