"""Averaged decoding: the next token under the mixture of all draws, with its uncertainty, one token at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_GREEDY = 1e-6
"""A lower temperature counts as 0, since dividing by it would overflow."""
Distribution = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Token:
    """A chosen token.

    Attributes:
        id: id of the token. log_prob: its log-probability under the mixture, in nats.
        top: the most probable tokens and their log-probabilities, best first.
        total: entropy of the mixture. aleatoric: mean entropy of the draws. epistemic: their difference; all in nats.
    """

    id: int
    log_prob: float
    top: tuple[tuple[int, float], ...]
    total: float
    aleatoric: float
    epistemic: float


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen from the mixture of the draws.

    Attributes:
        temperature: applied to the mixture; 0 takes the most probable token. top_p: probability mass of the nucleus.
        top: number of the most probable tokens to report. seed: seed of the sampled tokens.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top: int = 0
    seed: int = 0


def decode(
    ask: Callable[[Sequence[int]], Distribution],
    context: Sequence[int],
    *,
    max_tokens: int,
    sampling: Sampling,
    stops: Callable[[Sequence[int]], bool],
) -> list[Token]:
    """Return up to `max_tokens` tokens, each chosen from the average of the draws' next-token distributions.

    ``p(t) = 1/K sum_k p(t | before, theta_k)``. At every token, all draws see the same text.

    Args:
        ask: returns the log-probabilities [draws, vocabulary] after a context.
        context: token ids of the prompt.
        max_tokens: largest number of tokens.
        sampling: how a token is chosen.
        stops: returns whether the ids so far end the answer.
    """
    generator = np.random.default_rng(sampling.seed)
    tokens: list[Token] = []
    ids: list[int] = []
    while len(ids) < max_tokens and not (ids and stops(ids)):
        tokens.append(next_token(ask([*context, *ids]), sampling, generator))
        ids.append(tokens[-1].id)
    return tokens


def next_token(log_probs: Distribution, sampling: Sampling, generator: np.random.Generator) -> Token:
    """Choose a token from the log-probabilities [draws, tokens] of all draws."""
    mixture = np.logaddexp.reduce(log_probs, axis=0) - np.log(len(log_probs))
    best = np.argsort(-mixture, kind="stable")
    chosen = int(best[0]) if sampling.temperature < _GREEDY else _sampled(mixture, best, sampling, generator)
    total, aleatoric = float(_entropies(mixture[None]).mean()), float(_entropies(log_probs).mean())
    return Token(
        id=chosen,
        log_prob=float(mixture[chosen]),
        top=tuple((int(token), float(mixture[token])) for token in best[: sampling.top]),
        total=total,
        aleatoric=aleatoric,
        epistemic=max(0.0, total - aleatoric),
    )


def _sampled(mixture: Distribution, best: NDArray[np.intp], sampling: Sampling, generator: np.random.Generator) -> int:
    scaled = (mixture[best] - mixture[best[0]]) / sampling.temperature
    probs = np.exp(scaled - np.logaddexp.reduce(scaled))
    kept = probs.cumsum() - probs < sampling.top_p  # the smallest set of tokens with at least this mass
    nucleus = np.where(kept, probs, 0.0)
    return int(generator.choice(best, p=nucleus / nucleus.sum()))


def _entropies(log_probs: Distribution) -> Distribution:
    """Return the entropy of each row, in nats."""
    probs = np.exp(log_probs)
    return -np.where(probs > 0, probs * np.where(probs > 0, log_probs, 0.0), 0.0).sum(-1)
