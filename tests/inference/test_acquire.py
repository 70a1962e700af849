"""`acquire`: closed forms of its scores, rows given in several predictions, and what is refused."""

import math

import pytest
import torch

from bayestune.errors import ConfigError
from bayestune.inference import Prediction, acquire
from bayestune.inference.acquire import ACQUISITIONS


def predicted(probs: list[list[list[float]]], *, draws: int | None = None, start: int = 0) -> Prediction:
    """Draws of probabilities [draws, rows, classes], of rows named r0, r1, ..."""
    log_probs = torch.tensor(probs, dtype=torch.float64).log()
    count = len(probs) if draws is None else draws
    ids = tuple(f"r{start + i}" for i in range(log_probs.shape[1]))
    return Prediction(ids=ids, draw_log_probs=log_probs, labels=None, draws=count, seed=0, task="made")


def test_one_average_for_all_draws_has_no_mutual_information() -> None:
    probit = predicted([[[0.5, 0.5]]], draws=10)
    with pytest.raises(ConfigError, match="acquire: found 1 draws, of which the mutual information is 0"):
        acquire([probit], 1)
    with pytest.raises(ConfigError, match="first: found 5 draws, expected 1 to 1"):
        probit.first(5)


SURE, OTHER, UNSURE = [1.0, 0.0], [0.0, 1.0], [0.5, 0.5]


def test_scores_are_the_closed_forms_of_draws_that_agree_disagree_and_are_unsure() -> None:
    prediction = predicted([[SURE, SURE, UNSURE, [0.75, 0.25]], [SURE, OTHER, UNSURE, [0.25, 0.75]]])
    quarter = math.log(2) - (0.75 * math.log(4 / 3) + 0.25 * math.log(4))
    found = acquire([prediction], 4)
    assert [row for row, _ in found] == ["r1", "r3", "r0", "r2"]
    # Sums of at most four products of probabilities and logarithms in float64.
    assert [score for _, score in found] == pytest.approx([math.log(2), quarter, 0, 0], abs=1e-15)
    entropies = acquire([prediction], 4, score="entropy")
    assert [row for row, _ in entropies] == ["r1", "r2", "r3", "r0"]
    assert [score for _, score in entropies] == pytest.approx([math.log(2)] * 3 + [0], abs=1e-15)


@pytest.mark.parametrize("score", ACQUISITIONS)
def test_rows_in_several_predictions_are_ranked_as_in_one(score: str) -> None:
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(4, 50, 3, generator=generator, dtype=torch.float64)
    probs = probs / probs.sum(-1, keepdim=True)
    probs[:, 7] = probs[:, 21]  # equal scores, also across predictions
    whole = acquire([predicted(probs.tolist())], 50, score=score)
    parts = [predicted(probs[:, i : i + 20].tolist(), start=i) for i in range(0, 50, 20)]
    assert acquire(iter(parts), 50, score=score) == whole
    assert acquire(parts, 8, score=score) == whole[:8]
    assert [value for _, value in whole] == sorted((value for _, value in whole), reverse=True)
    ids = [row for row, _ in whole]
    assert len(set(ids)) == 50 and (score == "random" or ids.index("r21") == ids.index("r7") + 1)


def test_random_is_uniform_and_depends_on_seed_and_id_alone() -> None:
    rows = 2000
    prediction = predicted([[UNSURE] * rows] * 2)
    found = dict(acquire([prediction], rows, score="random", seed=1))
    assert dict(acquire([predicted([[SURE] * 9], start=5)], 9, score="random", seed=1)) == {
        f"r{i}": found[f"r{i}"] for i in range(5, 14)
    }
    values = torch.tensor(sorted(found.values()), dtype=torch.float64)
    distance = (values - (torch.arange(rows) + 0.5) / rows).abs().max().item()
    assert distance < 1.95 / math.sqrt(rows)  # Kolmogorov and Smirnov, one in a thousand
    assert dict(acquire([[f"r{i}" for i in range(rows)]], rows, score="random", seed=1)) == found
    other = [row for row, _ in acquire([prediction], 200, score="random", seed=2)]
    shared = len(set(other) & {row for row, _ in acquire([prediction], 200, score="random", seed=1)})
    assert abs(shared - 20) < 4 * math.sqrt(20 * 0.9 * 0.9)  # hypergeometric: 200 of 2,000, twice


@pytest.mark.parametrize("draws", [0, 1])
def test_mutual_information_needs_draws(draws: int) -> None:
    one = predicted([[UNSURE, SURE]], draws=draws)
    with pytest.raises(ConfigError, match=f"acquire: found {draws} draws, .* expected at least 2; use a posterior"):
        acquire([one], 1)
    assert acquire([one], 1, score="entropy") == [("r0", pytest.approx(math.log(2), abs=1e-15))]


def test_a_count_and_a_score_that_do_not_exist_are_refused() -> None:
    one = predicted([[UNSURE], [SURE]])
    with pytest.raises(ConfigError, match="count is 0, expected at least 1"):
        acquire([one], 0)
    with pytest.raises(ConfigError, match="score is 'margin', expected one of mutual_information, entropy, random"):
        acquire([one], 1, score="margin")
    with pytest.raises(ConfigError, match="found ids of rows for score 'entropy', expected predictions"):
        acquire([["r0"]], 1, score="entropy")
    assert acquire([], 3) == []
