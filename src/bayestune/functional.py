"""The mathematics of a mean-field Gaussian over adapter weights: tensors in, tensors out.

Nothing here depends on modules, devices or loggers, and nothing reads or changes the global random state.
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
"""Smallest |G| that training keeps: std = 1e-8, far below any value that changes an answer."""


def std(rho: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the standard deviation of each weight, ``Omega = G * G`` (BLoB, section 3), which is never negative."""
    return rho * rho


def initial_std(rho_init: float) -> float:
    """Return the mean of Omega = G^2 at the start, where G is uniform on (rho_init / sqrt(2), rho_init)."""
    low = 1 / math.sqrt(2)
    return rho_init**2 * (1 - low**3) / (3 * (1 - low))


def gaussian_kl(mean: Float[Tensor, "*shape"], rho: Float[Tensor, "*shape"], prior_std: float) -> Float[Tensor, ""]:
    """Return ``KL(q || p)``, the divergence of the posterior from the prior, in nats, summed over all entries.

    ``KL = sum log(s_p / Omega) + (Omega^2 + M^2) / (2 s_p^2) - 1/2`` with ``Omega = G^2``.

    Args:
        mean: M.
        rho: G, of the same shape.
        prior_std: s_p, the standard deviation of the prior.

    Returns:
        A float64 scalar for inputs of any dtype, as it sums the terms of up to billions of weights; ``inf`` if some G
        is 0.

    References:
        BLoB: Wang et al. 2024, arXiv 2406.11675, section 3.
    """
    m, omega = mean.double(), std(rho.double())
    return (math.log(prior_std) - omega.log() + (omega.square() + m.square()) / (2 * prior_std**2) - 0.5).sum()


def gaussian_kl_gradient(
    mean: Float[Tensor, "*shape"], rho: Float[Tensor, "*shape"], prior_std: float
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """Return the gradient of :func:`gaussian_kl` by M and by G in closed form, in the dtype of the inputs.

    ``dKL/dM = M / s_p^2`` and ``dKL/dG = 2 G^3 / s_p^2 - 2 / G``. `clamp_rho` keeps G away from 0, so the result is
    finite.

    Args:
        mean: M.
        rho: G, of the same shape.
        prior_std: s_p, the standard deviation of the prior.
    """
    g = clamp_rho(rho)
    return mean / prior_std**2, 2 * g**3 / prior_std**2 - 2 / g


def gaussian_penalty(parameters: Iterable[Tensor], prior_std: float) -> Float[Tensor, ""]:
    """Return ``-log p(theta) = ||theta||^2 / (2 s_p^2)``, in nats and up to a constant: the prior's term in MAP.

    Add it to the NLL summed over a whole data set of N rows, or add ``1 / N`` of it to the mean NLL.
    """
    return torch.stack([parameter.square().sum() for parameter in parameters]).sum() / (2 * prior_std**2)


def clamp_rho(rho: Float[Tensor, "*shape"], floor: float = RHO_FLOOR) -> Float[Tensor, "*shape"]:
    """Return `rho` with its magnitude at or above `floor` and its sign kept (0 counts as positive)."""
    return torch.where(rho < 0, rho.clamp(max=-floor), rho.clamp(min=floor))


def cycle_steps(rows: int, batch_size: int, *, gamma: float = 8.0, processes: int = 1) -> int:
    """Return M, the updates in one cycle of KL weights: ``int(100 rows^(3.14159 / gamma) / processes / batch_size)``.

    This is how BLoB's released code rescales the data set: small sets get longer cycles than their number of batches.

    Args:
        rows: training rows.
        batch_size: rows per update of one process.
        gamma: the exponent's divisor.
        processes: number of processes.

    Returns:
        The number of updates, at least 1.

    Example:
        >>> cycle_steps(640, 4)
        316
    """
    return max(1, int(100 * rows ** (3.14159 / gamma) / processes / batch_size))


def paper_kl_weight(step: int, cycle: int) -> float:
    """Return BLoB's weight pi_i of the KL in update `step` (from 0) of cycles of M = `cycle` updates.

    ``pi_i = 2^i / (2^(M+1) - 1)`` with ``i = step mod M + 1`` (BLoB's released code): 1/2 in the last update of a
    cycle, 1/4 in the one before. The weights of a cycle add up to ``1 - 1/(2^(M+1) - 1)``. No power overflows.
    """
    i = step % cycle + 1
    return 2.0 ** (i - cycle - 1) / (1.0 - 2.0 ** -(cycle + 1))


def uniform_kl_weight(step: int, cycle: int) -> float:
    """Return the weight ``1 / M`` for every update of a cycle of M, so that the weights of a cycle add up to 1."""
    return 1.0 / cycle


def linear_kl_weight(step: int, cycle: int) -> float:
    """Return ``2 i / (M (M + 1))``, ``i = step mod M + 1``: it rises linearly and adds up to 1 over a cycle."""
    return 2.0 * (step % cycle + 1) / (cycle * (cycle + 1))


def derive_seed(*key: SupportsIndex | str) -> int:
    """Return a 63-bit seed that is a pure function of `key`: the same in every process and on every machine.

    Integers of any type (numpy's too) count by their value; an integer and a string are always different keys.
    """
    text = "\x1f".join(f"str:{part}" if isinstance(part, str) else f"int:{operator.index(part)}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def prediction_noise(seed: int, index: int, name: str, shape: tuple[int, ...]) -> Float[Tensor, "..."]:
    """Return the standard normal noise of draw (`seed`, `index`) in layer `name`: float32, on the CPU.

    It is a pure function of its arguments and always sampled on the CPU, so a draw has the same weights on every
    machine and does not depend on other layers. It is sampled in float64 and rounded, because torch's float32 normals
    differ in their last bits between CPUs with and without vector instructions.
    """
    generator = torch.Generator().manual_seed(derive_seed("draw", seed, index, name))
    return torch.randn(shape, generator=generator, dtype=torch.float64).float()


def training_generator(
    seed: int, step: int, micro: int, rank: int, device: torch.device | str, device_index: int = 0
) -> torch.Generator:
    """Return the generator of the training noise of one forward, on `device`.

    Args:
        seed: seed of the run.
        step: index of the update.
        micro: index of the forward within the update.
        rank: index of the process.
        device: where the noise is sampled.
        device_index: index of the device among those that hold layers of the model; each has its own stream.
    """
    return torch.Generator(device).manual_seed(derive_seed("training", seed, step, micro, rank, device_index))
