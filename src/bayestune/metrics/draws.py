"""How far the draws of a posterior differ, and how many are needed."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from bayestune.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Spread:
    """How far the draws move the answers, as means over rows.

    Attributes:
        logit_variance: variance over draws of the logits, centered over the classes of a row, mean over classes.
        mean_logit_variance: variance over classes of the logits' mean over draws: how confident one draw can be.
        epistemic: mutual information of answer and weights, in nats.
        excess_nll: how far the NLL of this many draws is above that of infinitely many, in nats.
        draws: number of draws.
    """

    logit_variance: float
    mean_logit_variance: float
    epistemic: float
    excess_nll: float
    draws: int

    def draws_needed(self, excess_nll: float = 0.01) -> int:
        """Return the number of draws whose NLL is at most `excess_nll` (nats) above that of infinitely many."""
        return max(1, math.ceil(self.draws * self.excess_nll / excess_nll - 1e-9))


def spread(draw_log_probs: Float[Tensor, "draws rows classes"]) -> Spread:
    r"""Return how far the draws differ.

    With z the log-probabilities of the draws, centered over the classes of a row, the logit variance is the mean of
    ``Var_k[z_kc]`` with the sample variance over draws k. To second order the average of K draws has an NLL above that
    of infinitely many by ``1/(2K) sum_c Var_k[p_kc] / p_c`` under its own predictive p, which is about 1/K of the
    mutual information.

    Args:
        draw_log_probs: log p(class | row, draw), [draws, rows, classes]; -inf for classes that a row lacks.

    Returns:
        The spread.

    Raises:
        DataError: there are fewer than two draws, or no rows.
    """
    draws, rows, _ = draw_log_probs.shape
    if draws < 2 or rows < 1:
        raise DataError(f"spread: found {draws} draws of {rows} rows, expected at least 2 draws of 1 row.")
    log_probs = draw_log_probs.double()
    present = log_probs.isfinite().all(0)
    count = present.sum(-1, keepdim=True)
    known = log_probs.masked_fill(~present, 0.0)
    centered = (known - known.sum(-1, keepdim=True) / count).masked_fill(~present, 0.0)
    probs = known.exp().masked_fill(~present, 0.0)
    mean = probs.mean(0)
    relative = (probs.var(0) / mean.clamp(min=torch.finfo(mean.dtype).tiny)).masked_fill(~present, 0.0)
    epistemic = torch.special.entr(mean).sum(-1) - torch.special.entr(probs).sum(-1).mean(0)
    return Spread(
        logit_variance=(centered.var(0).sum(-1) / count[:, 0]).mean().item(),
        mean_logit_variance=(centered.mean(0).square().sum(-1) / count[:, 0]).mean().item(),
        epistemic=epistemic.clamp(min=0).mean().item(),
        excess_nll=(relative.sum(-1) / (2 * draws)).mean().item(),
        draws=draws,
    )
