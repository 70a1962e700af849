"""Prediction sets: exact small cases, a slow oracle, coverage on simulated rows, and what is refused."""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayestune import metrics
from bayestune.errors import ConfigError, DataError

SCORES = pytest.mark.parametrize("score", ["lac", "aps"])


def simulated(rows: int, classes: int = 5, *, seed: int, sharp: float = 2.0) -> tuple[Tensor, Tensor]:
    """Overconfident predictions, and labels from other probabilities: coverage must not need a good model."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (sharp * logits).log_softmax(1), labels


# Exact cases.


def test_lac_by_hand() -> None:
    # Scores of the labels: 0.1, 0.2, ..., 0.9. With alpha 0.3 the threshold is the ceil(10 x 0.7) = 7th of them.
    first = torch.arange(9, 0, -1, dtype=torch.float64) / 10
    log_probs = torch.stack([first, 1 - first], 1).log()
    threshold = metrics.conformal_threshold(log_probs, torch.zeros(9, dtype=torch.int64), alpha=0.3)
    assert threshold == pytest.approx(0.7, abs=1e-15)
    new = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.25, 0.35, 0.4], [0.34, 0.33, 0.33]], dtype=torch.float64)
    sets = metrics.prediction_sets(new.log(), threshold)
    expected = [[True, True, False], [True, False, False], [False, True, True], [True, True, True]]
    assert sets.tolist() == expected


@pytest.mark.parametrize(
    ("alpha", "rows", "rank"),
    [
        (0.1, 9, 9),
        (0.1, 10, 10),
        (0.1, 18, 18),
        (0.1, 19, 18),
        (0.1, 99, 90),
        (0.7, 9, 3),
        (0.29, 99, 71),
        (0.5, 1, 1),
    ],
)
def test_the_threshold_has_the_rank_of_exact_arithmetic(alpha: float, rows: int, rank: int) -> None:
    """1 - 0.7 and 100 x 0.29 are no exact floats: a rank from them would be one too high."""
    first = 1 - torch.arange(1, rows + 1, dtype=torch.float64) / 1000
    log_probs, labels = torch.stack([first, 1 - first], 1).log(), torch.zeros(rows, dtype=torch.int64)
    assert metrics.conformal_threshold(log_probs, labels, alpha=alpha) == pytest.approx(rank / 1000, abs=1e-14)


def test_aps_adds_a_uniform_part_of_the_class_to_all_that_are_more_probable() -> None:
    """The scores of one row, found by the thresholds at which classes enter its set: p_1 U, p_1 + p_2 U, ..."""
    probs = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64)
    for seed in range(5):
        enters = []
        for place in range(3):
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                inside = metrics.prediction_sets(probs.log(), middle, score="aps", seed=seed)[0, place]
                low, high = (low, middle) if inside else (middle, high)
            enters.append(high)
        uniform = enters[1] / 0.5
        assert 0 <= uniform < 1
        # A sum of three probabilities in float64.
        assert enters == pytest.approx([0.8 + 0.2 * uniform, 0.5 * uniform, 0.5 + 0.3 * uniform], abs=1e-15)


def nearly_sure(first: int, rows: int) -> torch.Tensor:
    """Rows whose label has nearly all probability, each a little less than the one before."""
    rest = 1e-9 * torch.arange(first, first + rows, dtype=torch.float64).add(1)
    return torch.stack([torch.log1p(-rest), rest.log()], 1)


def test_the_uniform_numbers_of_aps_are_uniform() -> None:
    """Of rows that are sure, the score is U: its quantiles are thresholds, and sets of other rows ignore it."""
    rows, alpha = 4000, 0.25
    labels = torch.zeros(rows, dtype=torch.int64)
    threshold = metrics.conformal_threshold(nearly_sure(0, rows), labels, alpha=alpha, score="aps")
    error = math.sqrt(alpha * (1 - alpha) / rows)  # of a quantile of a uniform number
    assert threshold == pytest.approx(1 - alpha, abs=4 * error)
    sets = metrics.prediction_sets(nearly_sure(rows, rows), threshold, score="aps")
    assert sets[:, 0].double().mean().item() == pytest.approx(1 - alpha, abs=4 * math.sqrt(2) * error)


@SCORES
def test_a_choice_that_a_row_does_not_have_is_never_in_a_set(score: str) -> None:
    log_probs = torch.tensor([[0.6, 0.4, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64).log()
    for threshold in (1.0, math.inf):
        sets = metrics.prediction_sets(log_probs, threshold, score=score)
        assert sets.tolist() == [[True, True, False], [False, True, False]]


@SCORES
def test_an_infinite_quantile_gives_every_class_that_a_row_has(score: str) -> None:
    """Labels of probability zero have an infinite score: more of them than alpha allows make it infinite."""
    log_probs = torch.tensor([[0.5, 0.5, 0.0]] * 9, dtype=torch.float64).log()
    threshold = metrics.conformal_threshold(log_probs, torch.tensor([0] * 7 + [2] * 2), alpha=0.1, score=score)
    assert threshold == math.inf
    assert metrics.prediction_sets(log_probs[:1], threshold, score=score).tolist() == [[True, True, False]]
    assert not metrics.prediction_sets(log_probs[:1], -math.inf, score=score).any()
    with pytest.raises(ConfigError, match="threshold is nan, expected a number; take it from conformal_threshold"):
        metrics.prediction_sets(log_probs, math.nan, score=score)


# Coverage.


@SCORES
@pytest.mark.parametrize(("rows", "alpha"), [(9, 0.1), (40, 0.2)])
def test_sets_hold_the_label_as_often_as_asked(score: str, rows: int, alpha: float) -> None:
    """Over 2,000 calibration sets and one new row each; no two scores are equal, so the coverage has both bounds."""
    trials = 2000
    log_probs, labels = simulated(trials * (rows + 1), seed=rows)
    held = 0
    for trial, (own, truth) in enumerate(zip(log_probs.split(rows + 1), labels.split(rows + 1), strict=True)):
        threshold = metrics.conformal_threshold(own[:-1], truth[:-1], alpha=alpha, score=score, seed=trial)
        held += int(metrics.prediction_sets(own[-1:], threshold, score=score, seed=trial)[0, truth[-1]])
    exact = math.ceil((rows + 1) * (1 - alpha) - 1e-9) / (
        rows + 1
    )  # P(rank of the new score <= that of the threshold)
    assert 1 - alpha - 1e-12 <= exact <= 1 - alpha + 1 / (rows + 1)
    error = math.sqrt(exact * (1 - exact) / trials)
    assert held / trials == pytest.approx(exact, abs=4 * error)


def test_aps_covers_hard_rows_more_evenly_than_lac() -> None:
    """Half of the rows are easy. LAC sacrifices the hard ones; APS knows the probabilities and covers both alike."""
    rows, alpha = 20_000, 0.1
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, 10, generator=generator, dtype=torch.float64)
    hard = torch.arange(rows) % 2 == 0
    log_probs = (logits * torch.where(hard, 0.5, 6.0)[:, None]).log_softmax(1)
    labels = torch.multinomial(log_probs.exp(), 1, generator=generator)[:, 0]
    covered, sizes = {}, {}
    for score in ("lac", "aps"):
        threshold = metrics.conformal_threshold(log_probs, labels, alpha=alpha, score=score)
        sets = metrics.prediction_sets(log_probs, threshold, score=score)
        covered[score] = sets.gather(1, labels[:, None])[hard].double().mean().item()
        sizes[score] = sets.sum(1).double().mean().item()
    error = math.sqrt(alpha * (1 - alpha) / (rows / 2))
    assert covered["aps"] == pytest.approx(1 - alpha, abs=5 * error)
    assert covered["lac"] < 1 - alpha - 5 * error
    assert sizes["lac"] < sizes["aps"]


# Halves.


@SCORES
def test_split_conformal_is_the_threshold_of_one_half_on_the_other(score: str) -> None:
    """Against the definition, with loops, on the halves that the number of calibration rows tells."""
    rows = 101
    log_probs, labels = simulated(rows, seed=1)
    found = metrics.split_conformal(log_probs, labels, score=score, seed=3)
    assert (found.calibration_rows, found.rows, found.alpha) == (50, 51, 0.1)
    again = metrics.split_conformal(log_probs, labels, score=score, seed=3)
    assert again == found
    others = {metrics.split_conformal(log_probs, labels, score=score, seed=seed).threshold for seed in range(10)}
    assert len(others) > 5
    if score == "lac":
        scores = 1 - log_probs.exp()
        own = scores.gather(1, labels[:, None])[:, 0]
        inside, covered = scores <= found.threshold, int((own <= found.threshold).sum())
        # 46 of the 50 calibration labels are covered: the rank is ceil(51 x 0.9) = 46.
        assert found.threshold in own.tolist() and found.coverage == (covered - 46) / 51
        assert 0 < found.size * 51 <= int(inside.sum())


def test_more_of_the_same_rows_give_the_coverage_asked_for() -> None:
    log_probs, labels = simulated(40_000, seed=2)
    for score in ("lac", "aps"):
        found = metrics.split_conformal(log_probs, labels, alpha=0.2, score=score)
        # The coverage of one calibration set has a beta distribution, that of 20,000 new rows a binomial one.
        assert found.coverage == pytest.approx(0.8, abs=4 * math.sqrt(2 * 0.2 * 0.8 / 20_000))


@SCORES
def test_the_order_of_classes_does_not_count(score: str) -> None:
    log_probs, labels = simulated(60, seed=3)
    order = torch.tensor([3, 0, 4, 1, 2])
    moved, place = log_probs[:, order], order.argsort()
    found = metrics.split_conformal(log_probs, labels, score=score)
    other = metrics.split_conformal(moved, place[labels], score=score)
    assert other.threshold == pytest.approx(found.threshold, abs=1e-15)
    assert (other.coverage, other.size) == (found.coverage, found.size)


def test_the_order_of_calibration_rows_does_not_count_and_inputs_are_left_alone() -> None:
    log_probs, labels = simulated(60, seed=4)
    kept, order = log_probs.clone(), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = metrics.conformal_threshold(log_probs[order], labels[order])
    assert found == metrics.conformal_threshold(log_probs, labels)
    state = torch.get_rng_state()
    metrics.split_conformal(log_probs, labels, score="aps")
    assert torch.equal(log_probs, kept) and torch.equal(torch.get_rng_state(), state)


def test_smaller_alpha_gives_larger_sets() -> None:
    log_probs, labels = simulated(200, seed=5)
    for score in ("lac", "aps"):
        thresholds = [
            metrics.conformal_threshold(log_probs, labels, alpha=a, score=score) for a in (0.5, 0.2, 0.1, 0.02)
        ]
        assert thresholds == sorted(thresholds)
        sets = [metrics.prediction_sets(log_probs, threshold, score=score) for threshold in thresholds]
        assert all(bool((small <= large).all()) for small, large in zip(sets, sets[1:], strict=False))


# Refusals.


@pytest.mark.parametrize(("alpha", "least"), [(0.5, 1), (0.3, 3), (0.1, 9), (0.05, 19), (0.01, 99), (0.7, 1)])
def test_too_few_calibration_rows_are_refused(alpha: float, least: int) -> None:
    assert metrics.smallest_calibration(alpha) == least
    log_probs, labels = simulated(least, seed=6)
    assert metrics.conformal_threshold(log_probs, labels, alpha=alpha) < 1
    if least > 1:
        found = f"found {least - 1} calibration rows, expected at least {least} for alpha={alpha}"
        with pytest.raises(DataError, match=found):
            metrics.conformal_threshold(log_probs[1:], labels[1:], alpha=alpha)
    with pytest.raises(DataError, match="found 8 calibration rows, expected at least 9"):
        metrics.split_conformal(*simulated(17, seed=7))
    with pytest.raises(DataError, match="found 1 row, expected at least 2"):
        metrics.split_conformal(*simulated(1, seed=7))


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, math.nan])
def test_an_impossible_alpha_is_refused(alpha: float) -> None:
    with pytest.raises(ConfigError, match=f"alpha is {alpha}, expected a share between 0 and 1"):
        metrics.conformal_threshold(*simulated(50, seed=8), alpha=alpha)


def test_an_unknown_score_and_rows_that_are_no_probabilities_are_refused() -> None:
    log_probs, labels = simulated(50, seed=9)
    with pytest.raises(ConfigError, match="score is 'raps', expected lac or aps"):
        metrics.conformal_threshold(log_probs, labels, score="raps")
    with pytest.raises(DataError, match="row 0"):
        metrics.prediction_sets(log_probs + 1, 0.5)


def test_the_example_of_the_docs_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parents[2] / "docs" / "decisions.md").read_text(encoding="utf-8")
    code = page.partition("## Prediction sets")[2].partition("```python\n")[2].partition("```")[0]
    exec(compile(code, "decisions.md", "exec"), {})
    assert re.fullmatch(
        r"0\.\d{3} of the sets hold the label, with \d\.\d\d classes on average\n", capsys.readouterr().out
    )


def test_the_sets_do_not_depend_on_the_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(40, 4, generator=generator, dtype=torch.float64).log_softmax(-1)
    threshold = 0.8
    whole = metrics.prediction_sets(log_probs, threshold, score="aps")
    parts = [metrics.prediction_sets(log_probs[i : i + 1], threshold, score="aps") for i in range(40)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, metrics.prediction_sets(log_probs, threshold, score="aps", seed=1))
