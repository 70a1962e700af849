"""Defects of metrics."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mutants.defect import defect, replace, wrap

SCORES = "bayestune.metrics.scores"
CALIBRATION = "bayestune.metrics.calibration"
TESTS = "test_metrics.py"


@defect(TESTS, "S19")
def brier_score_halved() -> None:
    wrap(f"{SCORES}.row_brier", lambda right: lambda log_probs, labels: right(log_probs, labels) / 2)


@defect(TESTS, "S19")
def an_impossible_label_clipped() -> None:
    wrap(f"{SCORES}.row_nll", lambda right: lambda log_probs, labels: right(log_probs, labels).clamp(max=30))


@defect(TESTS, "S19")
def rows_that_are_not_probabilities_pass() -> None:
    replace(f"{SCORES}.checked", lambda log_probs, labels: (log_probs.double(), labels.long()))


@defect(TESTS, "S19")
def bins_closed_on_the_right() -> None:
    def wrong(confidence: Tensor, bins: int) -> Tensor:
        edges = torch.arange(1, bins, dtype=torch.float64) / bins
        return torch.bucketize(confidence * (1 - 1e-12), edges, right=False)

    replace(f"{CALIBRATION}._bins", wrong)


@defect(TESTS, "S19")
def calibration_error_whose_signs_cancel() -> None:
    replace(f"{CALIBRATION}.ece", lambda log_probs, labels, **settings: abs(_gap(log_probs, labels)))


def _gap(log_probs: Tensor, labels: Tensor) -> float:
    confidence, answer = log_probs.double().exp().max(1)
    return ((answer == labels).double() - confidence).mean().item()


@defect(TESTS, "S21")
def intervals_of_half_the_level() -> None:
    wrap(
        "bayestune.metrics.bootstrap.percentiles", lambda right: lambda statistics, level: right(statistics, level / 2)
    )


@defect("metrics/test_paired.py", "all_seeds")
def each_seed_has_its_own_resample_of_the_rows() -> None:
    def make(right: Any) -> Any:
        return lambda scores, reference, **more: right(scores.reshape(1, -1), reference.reshape(1, -1), **more)

    wrap("bayestune.metrics.paired.paired_interval", make)


@defect("tables/test_paired.py", "seeds_are_paired")
def all_cells_are_compared_with_the_same_mle_cell() -> None:
    def make(right: Any) -> Any:
        def wrong(cells: Any, column: Any) -> Any:
            first = next(cell for cell in cells if cell["method"] == "mle")
            pairs, left_out = right(cells, column)
            return [(cell, first) for cell, _ in pairs], left_out

        return wrong

    wrap("bayestune.tables.paired._pairs", make)


@defect(TESTS, "S19")
def accuracy_of_the_least_probable_answer() -> None:
    replace(f"{SCORES}.row_accuracy", lambda log_probs, labels: (log_probs.argmin(1).cpu() == labels.cpu()).double())


@defect(TESTS, "share_of_pairs")
def ties_cut_in_the_order_of_rows() -> None:
    def make(right: Any) -> Any:
        def wrong(score: Tensor, *more: Any, **settings: Any) -> float:
            return right(score.double() + 1e-9 * torch.arange(len(score)), *more, **settings)

        return wrong

    wrap("bayestune.metrics.ranking.auroc", make)


@defect("metrics/test_ranking.py", "matched_auroc")
def rows_of_any_size_are_matched() -> None:
    from bayestune.metrics.ranking import auroc

    replace(
        "bayestune.metrics.ranking.matched_auroc",
        lambda scores, positives, sizes, *, within=0.1: auroc(scores, positives),
    )


@defect("metrics/test_selective.py", "threshold")
def the_threshold_stops_at_the_first_that_is_good() -> None:
    def make(right: Any) -> Any:
        def wrong(confidence: Tensor, correct: Tensor, target: float, **settings: Any) -> Any:
            return right(confidence, correct, target / 2, **settings)

        return wrong

    wrap("bayestune.metrics.selective.threshold_for_error", make)


@defect("metrics/test_selective.py", "interval")
def binomial_intervals_of_a_lower_level() -> None:
    wrap(
        "bayestune.metrics.selective.binomial_interval",
        lambda right: lambda count, rows, level=0.95: right(count, rows, level=0.9 * level),
    )


@defect("metrics/test_selective.py", "aurc")
def the_area_of_the_last_risk() -> None:
    from bayestune.metrics.selective import risk_coverage

    replace("bayestune.metrics.selective.aurc", lambda *args: risk_coverage(*args)[1][-1].item())


@defect("metrics/test_draws.py", "excess_nll")
def few_draws_lose_twice_as_much() -> None:
    def make(right: Any) -> Any:
        return lambda draw_log_probs: dataclasses.replace(
            right(draw_log_probs), excess_nll=2 * right(draw_log_probs).excess_nll
        )

    wrap("bayestune.metrics.draws.spread", make)


@defect("metrics/test_draws.py", "centered")
def the_logit_variance_is_not_centered() -> None:
    def make(right: Any) -> Any:
        def wrong(draw_log_probs: Any) -> Any:
            return dataclasses.replace(right(draw_log_probs), logit_variance=draw_log_probs.var(0).mean().item())

        return wrong

    wrap("bayestune.metrics.draws.spread", make)


CONFORMAL = "bayestune.metrics.conformal"
SETS = "metrics/test_conformal.py"


@defect(SETS, "by_hand or exact_arithmetic")
def the_quantile_forgets_the_new_row() -> None:
    def make(right: Any) -> Any:
        def wrong(log_probs: Tensor, labels: Tensor, *, alpha: float = 0.1, **more: Any) -> float:
            rows = len(labels)
            return right(log_probs, labels, alpha=1 - (1 - alpha) * rows / (rows + 1) + 1e-9, **more)

        return wrong

    wrap(f"{CONFORMAL}.conformal_threshold", make)


@defect(SETS, "exact_arithmetic")
def the_rank_of_the_quantile_is_rounded_in_floats() -> None:
    replace(f"{CONFORMAL}._exact", lambda alpha: alpha)


@defect(SETS, "does_not_have")
def absent_choices_are_in_sets() -> None:
    from bayestune.metrics.conformal import _class_scores

    def wrong(log_probs: Tensor, threshold: float, *, score: str = "lac", seed: int = 0) -> Tensor:
        return _class_scores(log_probs, score, seed) <= threshold

    replace(f"{CONFORMAL}.prediction_sets", wrong)


@defect(SETS, "uniform")
def all_rows_get_one_uniform_number() -> None:
    wrap("bayestune.metrics.conformal.derive_seed", lambda right: lambda name, seed, key: right(name, seed))


@defect(SETS, "evenly or uniform")
def aps_always_adds_the_whole_class() -> None:
    def make(right: Any) -> Any:
        def wrong(log_probs: Tensor, score: str, seed: int) -> Tensor:
            probs, order = log_probs.exp().sort(1, descending=True)
            return torch.zeros_like(probs).scatter(1, order, probs.cumsum(1))

        return wrong

    wrap(f"{CONFORMAL}._class_scores", make)


@defect(SETS, "one_half_on_the_other")
def sets_are_scored_on_the_calibration_rows_too() -> None:
    def make(right: Any) -> Any:
        def wrong(log_probs: Tensor, labels: Tensor, **more: Any) -> Any:
            return right(log_probs.repeat(2, 1), labels.repeat(2), **more)

        return wrong

    wrap(f"{CONFORMAL}.split_conformal", make)


ACQUIRE = "bayestune.inference.acquire"
CHOICE = "inference/test_acquire.py"


@defect(CHOICE, "closed_forms")
def rows_are_chosen_by_the_entropy_of_the_draws() -> None:
    replace(
        f"{ACQUIRE}._scored",
        lambda prediction, score, seed: list(zip(prediction.ids, prediction.aleatoric.tolist(), strict=True)),
    )


@defect(CHOICE, "several_predictions")
def only_the_last_prediction_is_ranked() -> None:
    def make(right: Any) -> Any:
        def wrong(predictions: Any, count: int, **more: Any) -> Any:
            return right(list(predictions)[-1:], count, **more)

        return wrong

    wrap(f"{ACQUIRE}.acquire", make)


@defect(CHOICE, "random")
def random_rows_are_the_same_for_every_seed() -> None:
    wrap(f"{ACQUIRE}._scored", lambda right: lambda prediction, score, seed: right(prediction, score, 0))


@defect("cli/test_acquire.py", "wrong_input or needs_draws")
def a_posterior_without_draws_is_ranked() -> None:
    replace(f"{ACQUIRE}.check_acquisition", lambda score, draws, **more: None)


@defect("cli/test_acquire.py", "left_out")
def training_rows_are_chosen_again() -> None:
    replace("bayestune.experiment.overlap.folded", lambda row: (row.id,))
