"""`answer_scores`: the share of free-text answers that are right, and whether their uncertainty shows which."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from bayestune import metrics
from bayestune.errors import ConfigError, DataError
from bayestune.inference.generation import Generation, Same, clusters
from bayestune.tasks.base import AnyScores

SIGNALS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "probability": lambda text: text["log_likelihood"],
    "probability per token": lambda text: text["log_likelihood"] / max(1, len(text["tokens"])),
    "mean entropy": lambda text: -text["mean_entropy"],
    "largest entropy": lambda text: -text["largest_entropy"],
    "epistemic": lambda text: -sum(text["epistemic"]) / max(1, len(text["tokens"])),
    "length": lambda text: -float(len(text["tokens"])),
    "agreement": lambda text: text["agreement"],
}
"""Signals that are higher for more certain answers, as functions of one item of `Generation.records`."""


@dataclass(frozen=True, kw_only=True)
class AnswerScores(AnyScores):
    """Scores of free-text answers.

    Attributes:
        exact_match: share of texts that match the right answer.
        ece: expected calibration error. The confidence is the agreement of the draws in mode "per_draw", and otherwise
            the probability of the whole text under the mixture of the draws.
        ece_corrected: bias-corrected `ece`.
        auroc: per signal, the probability that it is higher for a right answer than for a wrong one, where ties count
            half; None if all answers are right, or all are wrong.
        aurc: per signal, the area under the risk-coverage curve, as `metrics.aurc`.
        rows: number of texts. draws: number of draws.
        intervals: 95 % intervals of `exact_match` (bootstrap) and of `ece_corrected`.
    """

    headings: ClassVar[Mapping[str, str]] = {"exact_match": "exact match", "ece_corrected": "ECE, bias-corrected"}

    exact_match: float
    ece: float
    ece_corrected: float
    auroc: dict[str, float | None]
    aurc: dict[str, float]
    rows: int
    draws: int
    intervals: dict[str, tuple[float, float]]


def answer_scores(generation: Generation, answers: Sequence[str], *, same: Same = "normalized") -> AnswerScores:
    """Return the share of texts that are right, and how well each signal separates right from wrong texts.

    Args:
        generation: what `generate` returned.
        answers: the right answer to each prompt.
        same: the rule by which a text is right: "normalized", "exact", or a function of two texts; see `clusters`.

    Raises:
        ConfigError: the numbers of texts and answers differ, or the rule is unknown.
        DataError: there are no texts.
    """
    return scores_of_texts(generation.records(), answers, draws=generation.draws, same=same)


def scores_of_texts(
    texts: Sequence[Mapping[str, Any]], answers: Sequence[str], *, draws: int, same: Same = "normalized"
) -> AnswerScores:
    """Like `answer_scores`, but for the records that `bayestune generate` writes."""
    if isinstance(answers, str):
        raise ConfigError(f"answer_scores: found {answers!r}, expected a list of answers.")
    if len(texts) != len(answers):
        raise ConfigError(f"answer_scores: found {len(answers)} answers to {len(texts)} texts, expected one each.")
    if not texts:
        raise DataError("answer_scores: found no texts, expected at least one.")
    correct = torch.tensor([len(clusters([t["text"], a], same)) == 1 for t, a in zip(texts, answers, strict=True)])
    signals = {
        name: torch.tensor([surer(text) for text in texts], dtype=torch.float64)
        for name, surer in SIGNALS.items()
        if name != "agreement" or "agreement" in texts[0]
    }
    confidence = signals.get("agreement", signals["probability"].exp())
    corrected, interval = metrics.confidence_ece_corrected(confidence, correct)
    return AnswerScores(
        exact_match=correct.double().mean().item(),
        ece=metrics.confidence_ece(confidence, correct),
        ece_corrected=corrected,
        auroc={name: _auroc(values, correct) for name, values in signals.items()},
        aurc={name: metrics.aurc(values, correct) for name, values in signals.items()},
        rows=len(texts),
        draws=draws,
        intervals={"exact_match": metrics.bootstrap_interval(correct.double()), "ece_corrected": interval},
    )


def _auroc(values: Float[Tensor, " rows"], correct: Tensor) -> float | None:
    return metrics.auroc(values, correct) if 0 < int(correct.sum()) < len(correct) else None
