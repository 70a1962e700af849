"""`Generation`: texts under a posterior, with the uncertainty of every token."""

import itertools
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bayestune.errors import ConfigError

Tokens = tuple[Float[Tensor, " tokens"], ...]
"""One number per token, for each prompt."""
Same = str | Callable[[str, str], bool]
"""The rule by which two texts are one answer: a name in `RULES`, or a function of two texts."""


@dataclass(frozen=True, kw_only=True)
class Generation:
    r"""One text per prompt, with the uncertainty of its tokens. Entropies and log-probabilities are in nats.

    All but `draws` and `seed` have one entry per prompt. Figures of tokens are float64 on the CPU, and are conditional
    on the tokens before them.

    Attributes:
        texts: the texts, without special tokens.
        sequences: ids of the new tokens, including the one that ended the text.
        pieces: the text of each token.
        draw_log_probs: log p(token | before, draw k), [slices, tokens]; one slice, the mean's, if `draws` is 0.
        total: entropy of the average over draws of the next-token distributions.
        aleatoric: mean entropy of the draws' next-token distributions.
        finished: whether the text ended by itself; False if the limit of new tokens was reached.
        draws: number of draws; 0 for the mean alone. seed: seed of the draws.
        draw_texts: in mode "per_draw" the text of each draw; otherwise None.
        agreement: in mode "per_draw" the share of draws whose text is the same answer; otherwise None.
        information: in mode "per_draw", if tokens were sampled from unmodified distributions (``do_sample=True,
            top_k=0``, no processors), a Monte Carlo estimate of the mutual information of text and weights,
            ``I = 1/K sum_k (log p(y_k | theta_k) - log 1/K sum_j p(y_k | theta_j))``, with y_k the text of draw k;
            it is at most log K. Otherwise None.
    """

    texts: tuple[str, ...]
    sequences: tuple[Int[Tensor, " tokens"], ...]
    pieces: tuple[tuple[str, ...], ...]
    draw_log_probs: tuple[Float[Tensor, "slices tokens"], ...]
    total: Tokens
    aleatoric: Tokens
    finished: tuple[bool, ...]
    draws: int
    seed: int
    draw_texts: tuple[tuple[str, ...], ...] | None = None
    agreement: tuple[float, ...] | None = None
    information: tuple[float, ...] | None = None

    @property
    def epistemic(self) -> Tokens:
        """Mutual information of next token and weights, ``total - aleatoric``, at least 0."""
        return tuple((t - a).clamp(min=0) for t, a in zip(self.total, self.aleatoric, strict=True))

    @property
    def log_probs(self) -> Tokens:
        """Log-probability of each token in averaged decoding, ``log 1/K sum_k p(token | before, theta_k)``."""
        return tuple(_averaged(each) for each in self.draw_log_probs)

    @property
    def log_likelihood(self) -> Float[Tensor, " prompts"]:
        """Log-probability of the whole text under the mixture of the draws, ``log 1/K sum_k p(text | theta_k)``."""
        return torch.stack([_averaged(each.sum(-1)) for each in self.draw_log_probs])

    @property
    def mean_entropy(self) -> Float[Tensor, " prompts"]:
        """Mean total entropy of the tokens; 0 for a text without a token."""
        return torch.stack([each.mean() if len(each) else each.new_zeros(()) for each in self.total])

    @property
    def largest_entropy(self) -> Float[Tensor, " prompts"]:
        """Largest total entropy of a token; 0 for a text without a token."""
        return torch.stack([each.max() if len(each) else each.new_zeros(()) for each in self.total])

    def records(self) -> list[dict[str, Any]]:
        """Return one JSON object per prompt: the text, its tokens, and the figures of the tokens and the text."""
        whole = {name: getattr(self, name).tolist() for name in ("log_likelihood", "mean_entropy", "largest_entropy")}
        each = {name: getattr(self, name) for name in ("log_probs", "total", "aleatoric", "epistemic")}
        drawn = {"draw_texts": self.draw_texts, "agreement": self.agreement, "information": self.information}
        found = []
        for i, text in enumerate(self.texts):
            tokens = {name: values[i].tolist() for name, values in each.items()}
            record = {"text": text, "finished": self.finished[i], "tokens": list(self.pieces[i]), **tokens}
            record |= {name: values[i] for name, values in whole.items()}
            found.append(record | {name: values[i] for name, values in drawn.items() if values is not None})
        return found


def _averaged(log_probs: Tensor) -> Tensor:
    return log_probs.logsumexp(0) - math.log(len(log_probs))


def normalized(text: str) -> str:
    """Return a text in lower case, without articles, brackets, quotes, dashes and sentence punctuation.

    Periods, commas and dashes before a digit stay, as in 1.5 and -3, and so do symbols, as in C++.
    """
    text = unicodedata.normalize("NFC", text).lower()
    kept = "".join(
        letter
        for letter, after in itertools.zip_longest(text, text[1:], fillvalue=" ")
        if not _is_punctuation(letter) or (letter in ".,-" and after.isdigit())
    )
    return " ".join(word for word in kept.split() if word not in ("a", "an", "the"))


def _is_punctuation(letter: str) -> bool:
    return letter in ".,;:!?'\"…¡¿。、" or unicodedata.category(letter) in ("Pi", "Pf", "Ps", "Pe", "Pd")


RULES: dict[str, Callable[[str], str]] = {"exact": str.strip, "normalized": normalized}
"""By name of the rule: the form that two texts must share to be one answer."""


def clusters(texts: Sequence[str], same: Same = "normalized") -> list[list[int]]:
    """Return the indices of equivalent texts, the largest cluster first and, of equally large ones, the earlier first.

    Args:
        texts: the texts.
        same: "normalized" (ignores case, punctuation and articles), "exact", or a function of two texts; a text
            joins the first cluster whose first text it matches.

    Raises:
        ConfigError: there is no rule of this name.
    """
    if isinstance(same, str):
        if same not in RULES:
            raise ConfigError(f"same: found {same!r}, expected one of {', '.join(RULES)}, or a function of two texts.")
        keys = [RULES[same](text) for text in texts]
        order = [key for key, _ in Counter(keys).most_common()]
        return [[i for i, key in enumerate(keys) if key == found] for found in order]
    groups: list[list[int]] = []
    for i, text in enumerate(texts):
        mine = next((group for group in groups if same(texts[group[0]], text)), None)
        if mine is None:
            groups.append([i])
        else:
            mine.append(i)
    return sorted(groups, key=len, reverse=True)
