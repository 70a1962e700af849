"""The mathematics of a mean-field Gaussian over adapter weights: tensors in, tensors out.

Nothing here knows a module, a device policy or a logger, and nothing reads or moves the global random state.
Symbols: M mean, G (`rho`) with std = G^2, s_p (`prior_std`) the standard deviation of the prior N(0, s_p^2).
"""

import hashlib
import math
import operator
from collections.abc import Iterable
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor

RHO_FLOOR = 1e-4
"""Smallest |G| that training keeps: std = 1e-8, far below any width that changes an answer."""


def std(rho: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Standard deviation of each weight, ``Omega = G * G`` (BLoB, arXiv 2406.11675); never negative."""
    return rho * rho


def gaussian_kl(mean: Float[Tensor, "*shape"], rho: Float[Tensor, "*shape"], prior_std: float) -> Float[Tensor, ""]:
    r"""KL divergence of the posterior from the prior, in nats, summed over all entries.

    ``KL = sum log(s_p / Omega) + (Omega^2 + M^2) / (2 s_p^2) - 1/2`` with ``Omega = G^2``
    (BLoB, arXiv 2406.11675). Computed and returned in float64 whatever the dtype of the inputs, since the terms of
    billions of weights are added up. It is ``inf`` where some G is 0: the prior is not a point.
    """
    m, omega = mean.double(), std(rho.double())
    return (math.log(prior_std) - omega.log() + (omega.square() + m.square()) / (2 * prior_std**2) - 0.5).sum()


def gaussian_kl_gradient(
    mean: Float[Tensor, "*shape"], rho: Float[Tensor, "*shape"], prior_std: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Gradient of :func:`gaussian_kl` in closed form, in the dtype of the inputs.

    ``dKL/dM = M / s_p^2`` and ``dKL/dG = 2 G^3 / s_p^2 - 2 / G``. G is held away from 0 by `clamp_rho`,
    so the result is finite.
    """
    g = clamp_rho(rho)
    return mean / prior_std**2, 2 * g**3 / prior_std**2 - 2 / g


def gaussian_penalty(parameters: Iterable[Tensor], prior_std: float) -> Float[Tensor, ""]:
    """Return ``-log p(theta) = ||theta||^2 / (2 s_p^2)``, in nats and up to a constant: the prior's term in MAP.

    It belongs to the NLL summed over a whole data set of N rows; beside a mean NLL it has the weight ``1 / N``.
    """
    return torch.stack([parameter.square().sum() for parameter in parameters]).sum() / (2 * prior_std**2)


def clamp_rho(rho: Float[Tensor, "*shape"], floor: float = RHO_FLOOR) -> Float[Tensor, "*shape"]:
    """`rho` with its magnitude held at or above `floor`, its sign kept (0 counts as positive)."""
    return torch.where(rho < 0, rho.clamp(max=-floor), rho.clamp(min=floor))


def cycle_steps(rows: int, batch_size: int, *, gamma: float = 8.0, processes: int = 1) -> int:
    """Updates M in one cycle of KL weights: ``M = int(100 rows^(3.14159 / gamma) / processes / batch_size)``.

    The paper's rescaling of the data set (its released code): small sets get longer cycles than their number of
    batches. At least 1. Example: 640 rows in batches of 4 give 316.
    """
    return max(1, int(100 * rows ** (3.14159 / gamma) / processes / batch_size))


def paper_kl_weight(step: int, cycle: int) -> float:
    """Weight pi_i of the KL in update `step` (counted from 0) of cycles of `cycle` updates.

    ``pi_i = 2^i / (2^(M+1) - 1)``, ``i = step mod M + 1`` (BLoB, released code): 1/2 in the last update
    of a cycle, 1/4 in the one before. They add up to ``1 - 1/(2^(M+1) - 1)`` over a cycle; written so that no power
    overflows for any M.
    """
    i = step % cycle + 1
    return 2.0 ** (i - cycle - 1) / (1.0 - 2.0 ** -(cycle + 1))


def uniform_kl_weight(step: int, cycle: int) -> float:
    """Weight ``1 / M`` in every update of a cycle of M: the KL counted once a cycle."""
    return 1.0 / cycle


def linear_kl_weight(step: int, cycle: int) -> float:
    """Weight ``2 i / (M (M + 1))``, ``i = step mod M + 1``: rises linearly and adds up to 1 over a cycle."""
    return 2.0 * (step % cycle + 1) / (cycle * (cycle + 1))


def derive_seed(*key: SupportsIndex | str) -> int:
    """A 63-bit seed that is a pure function of `key`: the same in every process and on every machine.

    An integer is known by its value, whatever its type (numpy's too); it is never the same key as a string.
    """
    text = "\x1f".join(f"str:{part}" if isinstance(part, str) else f"int:{operator.index(part)}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def prediction_noise(seed: int, index: int, name: str, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Standard normal noise of draw (`seed`, `index`) in layer `name`: float32, on the CPU.

    A pure function of its arguments. It is made on the CPU on every machine, so that a draw is the same weights
    wherever it is used, and it does not depend on which other layers exist. Made in float64 and rounded: torch's
    float32 normals differ in the last bits between CPUs with and without vector instructions.
    """
    generator = torch.Generator().manual_seed(derive_seed("draw", seed, index, name))
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def training_generator(
    seed: int, step: int, micro: int, rank: int, device: torch.device | str, place: int = 0
) -> torch.Generator:
    """Generator of the training noise of one forward: keyed by (`seed`, `step`, `micro`, `rank`), on `device`.

    `place` counts the devices that the layers of one model lie on: each has a stream of its own.
    """
    return torch.Generator(device).manual_seed(derive_seed("training", seed, step, micro, rank, place))
