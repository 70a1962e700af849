"""Choose the precision of a Laplace posterior's Gaussian prior, by marginal likelihood or on a validation set."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayestune.errors import ConfigError

CANDIDATES = tuple(10 ** (exponent / 4) for exponent in range(-16, 33))
"""Precisions that a validation set chooses from: 1e-4 to 1e8, four per decade."""
_RELATIVE_WIDTH = 1e-12


def log_evidence(curvatures: Sequence[Tensor], square_norm: float, precision: float) -> float:
    """Return Laplace's log marginal likelihood minus the log-likelihood of the data at the mode, in nats (float64).

    ``1/2 [P log tau - sum_i log(lambda_i + tau) - tau ||theta||^2]`` with the prior N(0, 1 / tau). `curvatures` are
    the eigenvalues lambda of every layer, P is their number, and `square_norm` is the ``||theta||^2`` of the mode
    (MacKay 1992; Immer et al., arXiv 2104.04975). The omitted log-likelihood does not depend on tau or need labels.
    """
    # log1p keeps the difference of the two logarithms exact if tau is far above lambda.
    gain = sum(torch.log1p(values.double() / precision).sum().item() for values in curvatures)
    return -(gain + precision * square_norm) / 2


def most_evident(curvatures: Sequence[Tensor], square_norm: float) -> float:
    """Return the precision that maximizes `log_evidence`, found by bisection on a log scale.

    At the maximum, ``tau ||theta||^2 = sum_i lambda_i / (lambda_i + tau)``: the left side rises with tau and the right
    side falls, so there is only one solution.

    Raises:
        ConfigError: all curvatures, or all weights, are 0.
    """
    if square_norm == 0 or not any((values > 0).any() for values in curvatures):
        raise ConfigError(
            "precision='marglik': found no curvature or no weights (both must differ from 0): the rows say nothing "
            "about this adapter; give a number, or precision='validation'."
        )

    def excess(precision: float) -> float:
        fitted = sum((v / (v + precision)).sum().item() for v in (values.double() for values in curvatures))
        return precision * square_norm - fitted

    high = sum(values.numel() for values in curvatures) / square_norm
    low = high
    while excess(low) > 0:
        low /= 16
    while high / low > 1 + _RELATIVE_WIDTH:
        middle = math.sqrt(low * high)
        if middle in (low, high):
            break
        low, high = (low, middle) if excess(middle) > 0 else (middle, high)
    return math.sqrt(low * high)


def best_candidate(log_probs: Float[Tensor, "candidates rows classes"], labels: Int[Tensor, " rows"]) -> float:
    """Return the precision in `CANDIDATES` with the smallest mean negative log-likelihood; the largest one on a tie.

    Raises:
        ConfigError: a label has probability 0 under every candidate.
    """
    index = labels.view(1, -1, 1).expand(len(log_probs), -1, 1)
    nll = -log_probs.double().gather(2, index).squeeze(2).mean(1)
    if not nll.isfinite().any():
        raise ConfigError("precision='validation': a label of the validation rows has probability 0, expected none.")
    return CANDIDATES[len(nll) - 1 - int(nll.flip(0).argmin())]
