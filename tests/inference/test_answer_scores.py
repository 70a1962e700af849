"""Scores of written answers, from texts made by hand."""

import dataclasses
import math

import pytest
import torch

import bayestune as bt
from bayestune.errors import ConfigError


def written(texts: list[str], probabilities: list[float], lengths: list[int]) -> bt.Generation:
    """Texts of these probabilities under one draw, spread evenly over their tokens; entropies rise with the place."""
    shares = [
        torch.full((1, n), math.log(p) / max(1, n), dtype=torch.float64)
        for p, n in zip(probabilities, lengths, strict=True)
    ]
    entropies = tuple(torch.full((n,), float(i + 1), dtype=torch.float64) for i, n in enumerate(lengths))
    return bt.Generation(
        texts=tuple(texts),
        sequences=tuple(torch.zeros(n, dtype=torch.long) for n in lengths),
        pieces=tuple(("x",) * n for n in lengths),
        draw_log_probs=tuple(shares),
        total=entropies,
        aleatoric=tuple(each / 2 for each in entropies),
        finished=(True,) * len(texts),
        draws=1,
        seed=0,
    )


TEXTS, ANSWERS = ["Iron.", "oak", "the wool", "tin"], [" iron", " ash", " wool", " lead"]
PROBABILITIES, LENGTHS = [0.9, 0.8, 0.3, 0.1], [4, 1, 1, 2]


def test_right_answers_and_what_tells_them_apart() -> None:
    """Right, wrong, right, wrong."""
    found = bt.answer_scores(written(TEXTS, PROBABILITIES, LENGTHS), ANSWERS)
    assert (found.exact_match, found.rows, found.draws) == (0.5, 4, 1)
    # Each confidence has a bin of its own: the mean distance to 1, 0, 1, 0.
    assert found.ece == pytest.approx((0.1 + 0.8 + 0.7 + 0.1) / 4, abs=1e-12)
    # Of the pairs (iron, oak), (iron, tin), (wool, oak), (wool, tin) these are in order:
    assert found.auroc == {
        "probability": 3 / 4,
        "probability per token": 2 / 4,  # geometric means 0.974, 0.8, 0.3, 0.316
        "mean entropy": 3 / 4,
        "largest entropy": 3 / 4,
        "epistemic": 3 / 4,
        "length": (0 + 0 + 0.5 + 1) / 4,
    }
    assert found.aurc["probability"] == pytest.approx((0 + 1 / 2 + 1 / 3 + 2 / 4) / 4, abs=1e-12)
    assert bt.answer_scores(written(TEXTS, PROBABILITIES, LENGTHS), ANSWERS, same="exact").exact_match == 0
    low, high = found.intervals["exact_match"]
    assert low <= 0.5 <= high


def test_where_each_draw_wrote_its_own_text_the_confidence_is_their_agreement() -> None:
    made = dataclasses.replace(
        written(TEXTS, PROBABILITIES, LENGTHS), draw_texts=(("a",),) * 4, agreement=(1.0, 0.4, 0.8, 0.4)
    )
    found = bt.answer_scores(made, ANSWERS)
    assert found.auroc["agreement"] == 1
    assert found.ece == pytest.approx((0 + 2 * 0.4 + 0.2) / 4, abs=1e-12)


def test_answers_that_are_all_wrong_and_texts_without_a_token() -> None:
    found = bt.answer_scores(written(["", "oak"], [1.0, 0.5], [0, 1]), [" iron", " tin"])
    assert found.exact_match == 0 and set(found.auroc.values()) == {None}
    assert found.aurc["probability"] == 1


@pytest.mark.parametrize(
    ("answers", "error"),
    [(["a", "b"], "found 2 answers to 1 texts, expected one each"), ("a", "found 'a', expected a list of answers")],
)
def test_wrong_input(answers: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        bt.answer_scores(written(["oak"], [0.5], [1]), answers)
