r"""The KL term of the objective as a decoupled step, in the manner of the weight decay of AdamW.

The released BLoB code has two optimisers: AdamW moves the means M and B along the gradient of the mean negative
log-likelihood (NLL); plain SGD moves G along NLL + pi KL, and M along pi KL. The gradient of the KL is known in
closed form, so the second optimiser needs no backward pass and no state: `KLCallback` takes its step right after
AdamW's,

    M <- M - eta pi M / s_p^2
    G <- G - eta (dNLL/dG + pi (2 G^3 / s_p^2 - 2 / G)),

with ``eta`` the KL learning rate, following the main schedule, and ``pi`` the KL weight of this update.

How the weights relate to the ELBO. With the mean NLL over rows as the loss, the negative ELBO per row of a training
set of N rows is ``mean NLL + KL / N``: `elbo_kl_weight(N)`. The paper's weights instead count the whole KL once a
cycle of M updates (they add up to about 1 over a cycle), on average ``N / M`` times as strong: for N > M the posterior
is a tempered one, closer to the prior. G's fixed point is that of the weighted objective.
M's is not, since AdamW rescales the NLL gradient and not the KL's, just as decoupled decay is not an L2 penalty; with
`optim="sgd"` and equal learning rates both are.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import TrainerControl, TrainerState, TrainingArguments

from bayestune.adapters import GaussianLinear, gaussian_layers
from bayestune.errors import ConfigError
from bayestune.functional import clamp_rho, gaussian_kl_gradient, paper_kl_weight
from bayestune.training.clock import NoiseCallback
from bayestune.training.finite import all_finite, first_nonfinite, stopped

JOINED = {"cpu": 2**16, "other": 2**21}
"""Entries of the layers that move together: a few kernels for many small layers, and a CPU's cache not exceeded."""

Schedule = Callable[[int, int], float]
"""KL weight of update `step` (from 0) in cycles of `cycle` updates."""


def elbo_kl_weight(rows: int) -> Schedule:
    """The constant weight ``1 / rows``: mean NLL + weight * KL is then the negative ELBO per row, in nats.

    Raises:
        ConfigError: `rows`, the number of training rows, is not positive.
    """
    if rows < 1:
        raise ConfigError(f"elbo_kl_weight rows: found {rows}, expected the number of training rows, at least 1.")
    return lambda step, cycle: 1.0 / rows


@dataclass(frozen=True, kw_only=True)
class KLSettings:
    """How the KL enters training.

    Attributes:
        cycle: M, updates in one cycle of KL weights; `functional.cycle_steps(rows, batch_size)` is the paper's.
        schedule: weight of each update; `paper_kl_weight`, `uniform_kl_weight` and `linear_kl_weight` of
            `bayestune.functional`, `elbo_kl_weight(rows)`, or your own function of (step, cycle).
        learning_rate: eta of the SGD step, at the peak of the main learning-rate schedule, which it follows.

    Raises:
        ConfigError: a value out of range.
    """

    cycle: int
    schedule: Schedule = paper_kl_weight
    learning_rate: float = 0.01

    def __post_init__(self) -> None:
        if self.cycle < 1:
            raise ConfigError(f"KLSettings cycle: found {self.cycle}, expected a number of updates, at least 1.")
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"KLSettings learning_rate: found {self.learning_rate}, expected 0 or more.")


@torch.no_grad()
def kl_step(layers: Iterable[GaussianLinear], *, rate: float, weight: float, along_nll: bool) -> None:
    """One step of plain SGD on ``weight * KL`` for M and G of `layers`, in place (module docstring).

    Args:
        rate: learning rate eta of this update.
        weight: KL weight pi of this update.
        along_nll: whether G also moves along its NLL gradient, `layer.rho.grad`; M never does.

    The KL part stops at the minimum of the KL, ``|G| = sqrt(s_p)``, where a G near 0, whose gradient is
    ``-2 / G``, would jump far past it. ``|G|`` stays at or above `RHO_FLOOR`. Layers of one prior move in one
    computation, their entries laid end to end: as many layers as have `JOINED` entries, or else one.
    """
    for prior_std, group in _together(layers):
        means, rhos = _parts(group)
        mean, rho = _joined(means), _joined(rhos)
        d_mean, d_rho = gaussian_kl_gradient(mean, rho, prior_std)
        mean.sub_(d_mean, alpha=rate * weight)
        to_best = torch.full_like(rho, math.sqrt(prior_std)).copysign(rho) - rho
        step = (-rate * weight * d_rho).clamp(min=to_best.clamp(max=0), max=to_best.clamp(min=0))
        if along_nll:
            gradients = [torch.zeros_like(rho) if rho.grad is None else rho.grad for rho in rhos]
            step.sub_(_joined(gradients), alpha=rate)
        _put_back(mean, means)
        _put_back(clamp_rho(rho + step), rhos)


class KLCallback(NoiseCallback):
    """Adds the KL term to `transformers.Trainer` or TRL's `SFTTrainer`, after every optimiser step.

    It also keeps the clock of the training noise (seed, step, rank) and M, G and B in float32. Where G is
    among the optimiser's parameters, as in a plain Trainer, the optimiser has already moved it along the NLL and
    only the KL part is added here; `BayesTrainer` leaves G to this callback, as the paper does.

    Gradient clipping, if it is on, acts on the NLL gradients of M, G and B together, not on the KL.

    Raises:
        ConfigError: when training begins: no Gaussian layer, fp16, DeepSpeed, or weight decay on G.
        TrainingError: a step of the KL is not finite; raised before the optimiser's.
    """

    def __init__(self, settings: KLSettings) -> None:
        if not isinstance(settings, KLSettings):
            raise ConfigError(f"KLCallback: found a {type(settings).__name__}, expected KLSettings(cycle=...).")
        super().__init__()
        self.settings = settings
        self._layers: list[GaussianLinear] = []
        self._along_nll = True
        self._rate = self._weight = 0.0  # of this update

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _restore_float32(kwargs["model"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if args.fp16:
            raise ConfigError("fp16=True scales the loss, and the KL step is taken outside the scaler: use bf16=True.")
        if args.deepspeed:
            raise ConfigError("DeepSpeed owns the optimiser step, so the KL step cannot follow it: train without it.")
        _restore_float32(model)
        self._layers = list(gaussian_layers(model).values())
        if not self._layers:
            raise ConfigError(
                "KLCallback found no Gaussian layer in the model: make it with get_peft_model(base, BlobConfig(...)), "
                "or leave the callback out for plain LoRA."
            )
        if not _peak_rate(optimizer.param_groups[0], args) > 0:
            raise ConfigError(
                "learning_rate: found 0, expected more: the KL's learning rate follows the main schedule, as a share "
                "of its peak. To train G alone, give a very small rate."
            )
        self._along_nll = not _optimised(self._layers, optimizer)
        super().on_train_begin(args, state, control, **kwargs)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        group = kwargs["optimizer"].param_groups[0]
        self._rate = self.settings.learning_rate * group["lr"] / _peak_rate(group, args)
        self._weight = self.settings.schedule(state.global_step, self.settings.cycle)
        found = f"the KL weight is {self._weight}, its learning rate {self._rate}"
        if math.isfinite(self._rate * self._weight):
            bad = self._nonfinite_gradient()
            if bad is None:
                return
            found = f"the KL gradient of {bad[0]} (of {bad[1]} in all) is not finite"
        raise stopped(
            "kl",
            found,
            step=state.global_step,
            learning_rate=group["lr"],
            output=args.output_dir,
            advice="look at the schedule of KLSettings, or lower its learning_rate",
        )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kl_step(self._layers, rate=self._rate, weight=self._weight, along_nll=self._along_nll)

    @torch.no_grad()
    def _nonfinite_gradient(self) -> tuple[str, int] | None:
        """The first layer and part whose gradient is not finite, and how many there are."""
        largest: list[Tensor] = []  # they grow with |M| and |G|, so those of the largest entries tell
        for prior_std, group in _together(self._layers):
            mean, rho = (get_total_norm(part, math.inf) for part in _parts(group))
            largest += gaussian_kl_gradient(mean, rho, prior_std)
        if all_finite(largest) and all_finite(self._along()):
            return None
        gradients: dict[str, Tensor] = {}
        for layer in self._layers:
            mean, rho = gaussian_kl_gradient(layer.weight, layer.rho, layer.prior_std)
            gradients |= {f"M of {layer.name}": mean, f"G of {layer.name}": rho}
            if self._along_nll and layer.rho.grad is not None:
                gradients[f"G of {layer.name} (with its NLL)"] = layer.rho.grad
        return first_nonfinite(gradients)

    def _along(self) -> list[Tensor]:
        """The NLL gradients that G moves along."""
        return [layer.rho.grad for layer in self._layers if self._along_nll and layer.rho.grad is not None]


def _together(layers: Iterable[GaussianLinear]) -> Iterator[tuple[float, list[GaussianLinear]]]:
    """The layers whose entries one computation moves, of one prior, device and dtype, and that prior."""
    groups: dict[tuple[float, torch.device, torch.dtype], list[GaussianLinear]] = {}
    for layer in layers:
        groups.setdefault((layer.prior_std, layer.rho.device, layer.rho.dtype), []).append(layer)
    for (prior_std, device, _), group in groups.items():
        limit, chosen, entries = JOINED["cpu" if device.type == "cpu" else "other"], [], 0
        for layer in group:
            if chosen and entries + layer.rho.numel() > limit:
                yield prior_std, chosen
                chosen, entries = [], 0
            chosen.append(layer)
            entries += layer.rho.numel()
        yield prior_std, chosen


def _parts(layers: Sequence[GaussianLinear]) -> tuple[list[Tensor], list[Tensor]]:
    """M and G of each layer."""
    return [layer.weight for layer in layers], [layer.rho for layer in layers]


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def _put_back(joined: Tensor, tensors: Sequence[Tensor]) -> None:
    parts = joined.split([tensor.numel() for tensor in tensors])
    for part, tensor in zip(parts, tensors, strict=True):
        tensor.copy_(part.view_as(tensor))


def _peak_rate(group: dict[str, Any], args: TrainingArguments) -> float:
    """The main learning rate without its schedule; ReduceLROnPlateau does not keep it in the group."""
    return group.get("initial_lr", args.learning_rate)


def _optimised(layers: list[GaussianLinear], optimizer: torch.optim.Optimizer) -> bool:
    """Whether G of all `layers` (True) or of none (False) is among the optimiser's parameters."""
    rhos = {id(layer.rho) for layer in layers}
    found: set[int] = set()
    for index, group in enumerate(optimizer.param_groups):
        here = rhos & {id(parameter) for parameter in group["params"]}
        if here and group.get("weight_decay", 0.0):
            raise ConfigError(
                f"parameter group {index} decays G (rho) with weight_decay={group['weight_decay']}, which pulls the "
                "posterior to a point: use BayesTrainer, set weight_decay=0, or put rho in a group without decay."
            )
        found |= here
    if found and found != rhos:
        raise ConfigError(
            f"the optimiser holds G (rho) of {len(found)} of {len(rhos)} Gaussian layers: give it all of them or none."
        )
    return bool(found)


def _restore_float32(model: nn.Module) -> None:
    """Widen adapter weights that something cast to half: bf16 loses updates below 1e-4 of a weight near 0.05."""
    for module in model.modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter in module.active_adapters:
            for part in (module.lora_A, module.lora_B):
                if adapter not in part:
                    continue
                for parameter in part[adapter].parameters():
                    if parameter.dtype in (torch.float16, torch.bfloat16):
                        parameter.data = parameter.data.float()
