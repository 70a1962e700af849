"""`prompt_information`: how much the draws of a causal language model disagree while they read the question."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayestune.errors import ConfigError, DataError, DrawError, PosteriorError
from bayestune.inference.draws import evaluation_mode
from bayestune.inference.logits import Logits
from bayestune.sampling.base import Posterior, Sampler
from bayestune.storage.saving import as_posterior
from bayestune.tasks import Row
from bayestune.tasks.causal import CausalChoice, without_appended
from bayestune.tasks.tensors import widen


def prompt_information(
    model: nn.Module | Posterior,
    task: CausalChoice,
    rows: Sequence[Row],
    *,
    draws: int = 10,
    seed: int = 0,
    progress: bool = False,
) -> Float[Tensor, " rows"]:
    r"""Return the mutual information of next token and weights, averaged over the tokens of each row's prompt.

        1/T sum_t ( H[1/K sum_k p_k(. | x_1..x_t)] - 1/K sum_k H[p_k(. | x_1..x_t)] ),

    with p_k the next-token distribution of draw k over the whole vocabulary. It needs neither choices nor labels.

    Args:
        model: a posterior, or a model with a BAYES_LORA adapter.
        task: the task that makes the prompts.
        rows: at least one; labels are not needed.
        draws, seed: number (at least 2) and seed of the draws.
        progress: show a bar on stderr.

    Returns:
        [rows], nats per token, float64 on the CPU.

    Raises:
        ConfigError: there are fewer than two draws.
        DataError: there are no rows, or a row cannot be used; names the row.
        DrawError: the posterior has no such draws, or draws outputs instead of weights, as linearized ones do.
        PosteriorError: the model's logits are not finite; names the row.
    """
    if draws < 2:
        raise ConfigError(f"prompt_information: found {draws} draws, whose disagreement is 0, expected at least 2.")
    if not rows:
        raise DataError("prompt_information: found no rows, expected at least one.")
    posterior = as_posterior(model)
    task.examples(rows, posterior.model)  # refuses rows that cannot be used
    sampler = posterior.sampler(draws=draws, seed=seed)
    if sampler.gradients:
        raise DrawError("prompt_information: found draws of the answers alone, expected draws of the weights.")
    device = next(posterior.model.parameters()).device
    found = []
    with evaluation_mode(posterior.model), torch.inference_mode():
        for row in tqdm(rows, desc="prompts", unit="row", disable=not progress):
            (encoding,) = task.encode([(task.prompt_text(row), None)])
            found.append(_information(sampler, torch.tensor([without_appended(encoding)], device=device)).cpu())
            _check_finite(found[-1], row)
    return torch.stack(found)


def _check_finite(value: Tensor, row: Row) -> None:
    if not value.isfinite():
        raise PosteriorError(
            f"prompt_information: the logits of row {row.id!r} are not finite: the adapter's weights, or the "
            "precision, are too large or too small for this model."
        )


def _information(sampler: Sampler, input_ids: Int[Tensor, "1 tokens"]) -> Float[Tensor, ""]:
    """Return the mutual information of one text, computed draw by draw: all draws would not fit in memory."""
    reader: Any = Logits()
    mean, entropy = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for k in range(sampler.slices):
        logits = sampler.outputs(reader, {"input_ids": input_ids}, range(k, k + 1))[0, 0]
        probs = widen(logits).log_softmax(-1).double().exp()
        mean, entropy = mean + probs / sampler.slices, entropy + torch.special.entr(probs).sum(-1) / sampler.slices
    return (torch.special.entr(mean).sum(-1) - entropy).mean().clamp(min=0)
