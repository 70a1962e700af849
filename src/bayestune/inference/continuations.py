"""`continuation_log_probs`: the log-probability of texts' last tokens under every draw of a causal language model."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayestune.errors import PosteriorError
from bayestune.inference.draws import evaluation_mode
from bayestune.inference.logits import Logits
from bayestune.sampling.base import Sampler
from bayestune.tasks.tensors import pad, widen


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """The tokens at the end of a text, and the tokens that the model reads to predict them.

    Attributes:
        inputs: the whole text without its last token.
        targets: the continuation: at least one token, and at most as many as there are inputs.
    """

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


def continuation_log_probs(
    model: nn.Module,
    sampler: Sampler,
    continuations: Sequence[Continuation],
    *,
    batch_size: int = 8,
    greedy: bool = True,
    progress: bool = False,
) -> tuple[Float[Tensor, "draws continuations"], Bool[Tensor, " continuations"]]:
    r"""Return the log-probability of each continuation y under each draw, and whether the mixture of draws decodes it.

    The sequence mixture is ``p(y | x) = 1/K sum_k p(y | x, theta_k)``. After the tokens ``y_<t`` it predicts

    .. math::
        p(y_t \mid x, y_{<t}) \propto \sum_k p(y_{<t} \mid x, \theta_k) \, p(y_t \mid x, y_{<t}, \theta_k) ,

    so each draw is weighted by the probability that it gave the previous tokens. Continuations with the same inputs,
    such as the letters of one question, share a forward.

    Args:
        model: the model of the posterior.
        sampler: draws of its weights.
        continuations: the continuations to score.
        batch_size: texts per forward.
        greedy: whether to compute what the mixture decodes; this takes memory for the vocabulary at every target.
        progress: show a bar on stderr.

    Returns:
        Nats, float64 on the CPU; and whether every target is the most probable token of the mixture, which is False
        unless `greedy`.

    Raises:
        PosteriorError: a log-probability is not a number.
    """
    by_draw = torch.empty(sampler.slices, len(continuations), dtype=torch.float64)
    decoded = torch.zeros(len(continuations), dtype=torch.bool)
    bar = tqdm(total=len(continuations), desc="lm-eval", unit="text", disable=not progress)
    with bar, evaluation_mode(model), torch.inference_mode():
        for batch in _batches(continuations, batch_size):
            for place, (sums, found) in _scored(model, sampler, continuations, batch, greedy).items():
                by_draw[:, place], decoded[place] = sums, found
                bar.update()
    if by_draw.isnan().any():
        raise PosteriorError(
            f"found {int(by_draw.isnan().any(0).sum())} texts whose log-probability is not a number: the adapter's "
            "weights, or the precision, are too large or too small for this model."
        )
    return by_draw, decoded


_Batch = dict[tuple[int, ...], list[int]]
"""Inputs, and the indices of the continuations that share them."""


def _batches(continuations: Sequence[Continuation], batch_size: int) -> Iterator[_Batch]:
    """Yield the inputs of all continuations, `batch_size` at a time, longest first."""
    places: _Batch = defaultdict(list)
    for place, each in enumerate(continuations):
        places[each.inputs].append(place)
    longest_first = sorted(places, key=len, reverse=True)
    for start in range(0, len(longest_first), batch_size):
        yield {inputs: places[inputs] for inputs in longest_first[start : start + batch_size]}


def _scored(
    model: nn.Module, sampler: Sampler, continuations: Sequence[Continuation], batch: _Batch, greedy: bool
) -> dict[int, tuple[Tensor, bool]]:
    """Return, for each continuation of a batch, the log-probability per draw and whether the mixture decodes it."""
    reader: Any = Logits()
    device = next(model.parameters()).device
    input_ids = pad(list(batch), 0, left=False).to(device)  # causal: padding after a text does not change it
    targets = {place: torch.tensor(continuations[place].targets) for group in batch.values() for place in group}
    sums = {place: torch.empty(sampler.slices, dtype=torch.float64) for place in targets}
    mixtures: dict[int, Tensor] = {}
    for k in range(sampler.slices):
        logits = sampler.outputs(reader, {"input_ids": input_ids}, range(k, k + 1))[0]
        for row, (inputs, group) in zip(logits, batch.items(), strict=True):
            for place in group:
                tokens = targets[place].to(device)
                log_probs = widen(row[len(inputs) - len(tokens) : len(inputs)]).double().log_softmax(-1)
                own = log_probs.gather(1, tokens.unsqueeze(1)).squeeze(1)
                sums[place][k] = own.sum()
                if greedy:
                    before = torch.cat([own.new_zeros(1), own[:-1]]).cumsum(0)
                    joint = log_probs + before.unsqueeze(1)  # log p(previous targets, any next token)
                    mixtures[place] = torch.logaddexp(mixtures[place], joint) if k else joint
    decoded = {place: torch.equal(joint.argmax(-1).cpu(), targets[place]) for place, joint in mixtures.items()}
    return {place: (found, decoded.get(place, False)) for place, found in sums.items()}
