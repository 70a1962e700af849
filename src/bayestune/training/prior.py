"""A Gaussian prior on point weights: the term that makes maximum likelihood maximum a posteriori (MAP)."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.errors import ConfigError


def gaussian_penalty(parameters: Iterable[nn.Parameter], prior_std: float) -> Float[Tensor, ""]:
    """``-log p(theta) = ||theta||^2 / (2 s_p^2)`` in nats for the whole data set, up to a constant.

    Added to the summed NLL of all N rows it gives the MAP objective; per row it has the weight ``1 / N``.

    Raises:
        ConfigError: `prior_std` is not above 0.
    """
    if not 0 < prior_std < float("inf"):
        raise ConfigError(f"prior_std: found {prior_std}, expected a number above 0.")
    return torch.stack([parameter.square().sum() for parameter in parameters]).sum() / (2 * prior_std**2)
