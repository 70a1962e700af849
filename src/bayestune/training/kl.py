r"""The KL term of the objective as a decoupled step, like the weight decay of AdamW.

BLoB's released code has two optimizers: AdamW moves M and B along the gradient of the mean negative log-likelihood
(NLL); plain SGD moves G along NLL + pi KL, and M along pi KL. The gradient of the KL has a closed form, so the second
optimizer needs no backward pass and no state: `KLCallback` takes its step right after AdamW's,

    M <- M - eta pi M / s_p^2
    G <- G - eta (dNLL/dG + pi (2 G^3 / s_p^2 - 2 / G)),

with ``eta`` the KL learning rate, following the main schedule, and ``pi`` the KL weight of this update.

If the loss is the mean NLL over rows, the negative ELBO per row of a training set of N rows is ``mean NLL + KL / N``:
`elbo_kl_weight(N)`. If the loss is a mean over tokens, as TRL's is, N counts the trained tokens instead. The paper's
weights instead count the whole KL once per cycle of M updates (they add up to about 1), on average ``N / M`` times as
strong: for N > M the posterior is tempered, closer to the prior. The fixed point of G is that of the weighted
objective. That of M is not, because AdamW rescales the NLL gradient but not the KL's (as with decoupled weight decay
and an L2 penalty); with `optim="sgd"` and equal learning rates both are.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from bayestune.adapters import GaussianLinear
from bayestune.errors import ConfigError
from bayestune.functional import clamp_rho, gaussian_kl, gaussian_kl_gradient, paper_kl_weight, std
from bayestune.training.sharding import local, total

JOINED = {"cpu": 2**16, "other": 2**21}
"""The largest number of entries in one computation: few kernels for many small layers, within a CPU's cache."""

Schedule = Callable[[int, int], float]
"""KL weight of update `step` (from 0) in cycles of `cycle` updates."""


def elbo_kl_weight(rows: int) -> Schedule:
    """Return the schedule of the constant weight ``1 / rows``; the objective is then the negative ELBO per row.

    Args:
        rows: the number of training rows, if the loss is a mean over rows, as in `BayesTrainer`. In TRL's `SFTTrainer`
            and transformers' causal models it is a mean over tokens: give the number of training tokens with a label
            (not -100). Otherwise the KL weighs too much, by the number of tokens per row.
    """
    if rows < 1:
        raise ConfigError(
            f"elbo_kl_weight rows: found {rows}, expected the number of training rows (or tokens), at least 1."
        )
    return lambda step, cycle: 1.0 / rows


@dataclass(frozen=True, kw_only=True)
class KLSettings:
    """How the KL enters training.

    Attributes:
        cycle: M, updates in one cycle of KL weights; the paper's is `functional.cycle_steps(rows, batch_size)`.
        schedule: KL weight of each update: `paper_kl_weight`, `uniform_kl_weight` or `linear_kl_weight` of
            `bayestune.functional`, `elbo_kl_weight(rows)`, or any function of (step, cycle).
        learning_rate: eta of the SGD step at the peak of the main learning-rate schedule, which it follows.
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
def posterior_summary(layers: Collection[GaussianLinear]) -> dict[str, float]:
    """Return "kl", the KL of `layers` in nats, and "std", their mean standard deviation; nothing without layers.

    If `layers` are sharded, every process must call this.
    """
    if not layers:
        return {}
    parts = [(local(layer.weight), local(layer.rho), layer.prior_std) for layer in layers]
    kl = math.fsum(gaussian_kl(*part).item() for part in parts)
    stds, rhos = math.fsum(std(rho.double()).sum().item() for _, rho, _ in parts), [layer.rho for layer in layers]
    return {"kl": total(kl, rhos), "std": total(stds, rhos) / sum(rho.numel() for rho in rhos)}


@torch.no_grad()
def kl_step(layers: Iterable[GaussianLinear], *, rate: float, weight: float, along_nll: bool) -> None:
    """Take one step of plain SGD on ``weight * KL`` for M and G of `layers`, in place (see the module docstring).

    The KL part of the step stops at the minimum of the KL, ``|G| = sqrt(s_p)``: a G near 0, whose gradient is
    ``-2 / G``, would jump far past it. ``|G|`` stays at or above `RHO_FLOOR`. Layers with the same prior move in one
    computation with up to `JOINED` entries. Entries move independently, so each process moves those of its shards.

    Args:
        layers: Gaussian layers.
        rate: learning rate eta of this update.
        weight: KL weight pi of this update.
        along_nll: whether G also moves along its NLL gradient, `layer.rho.grad`; M never does.
    """
    for prior_std, group in layer_groups(layers):
        means, rhos = [local(layer.weight) for layer in group], [local(layer.rho) for layer in group]
        mean, rho = parameters_to_vector(means), parameters_to_vector(rhos)
        d_mean, d_rho = gaussian_kl_gradient(mean, rho, prior_std)
        mean.sub_(d_mean, alpha=rate * weight)
        to_best = torch.full_like(rho, math.sqrt(prior_std)).copysign(rho) - rho
        step = (-rate * weight * d_rho).clamp(min=to_best.clamp(max=0), max=to_best.clamp(min=0))
        if along_nll:
            gradients = [layer.rho.grad for layer in group]
            found = zip(gradients, rhos, strict=True)
            along = [torch.zeros_like(rho) if gradient is None else local(gradient) for gradient, rho in found]
            step.sub_(parameters_to_vector(along), alpha=rate)
        _put_back(mean, means)
        _put_back(clamp_rho(rho + step), rhos)


def layer_groups(layers: Iterable[GaussianLinear]) -> Iterator[tuple[float, list[GaussianLinear]]]:
    """Yield groups of layers with the same prior, device and dtype, which one computation moves, and their prior."""
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


def _put_back(joined: Tensor, tensors: Sequence[Tensor]) -> None:
    sizes = [tensor.numel() for tensor in tensors]
    for values, tensor in zip(joined.split(sizes), tensors, strict=True):
        tensor.copy_(values.view_as(tensor))
