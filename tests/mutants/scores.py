"""Defects of metrics."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from mutants.defect import defect, replace, wrap

SCORES = "bayestune.metrics.scores"
TESTS = "test_metrics.py"


@defect(TESTS, "S19")
def brier_score_halved() -> None:
    wrap(f"{SCORES}.row_brier", lambda right: lambda log_probs, labels: right(log_probs, labels) / 2)


@defect(TESTS, "S19")
def an_impossible_label_clipped() -> None:
    wrap(f"{SCORES}.row_nll", lambda right: lambda log_probs, labels: right(log_probs, labels).clamp(max=30))


@defect(TESTS, "S19")
def rows_that_are_not_probabilities_pass() -> None:
    replace(f"{SCORES}._checked", lambda log_probs, labels: (log_probs.double(), labels.long()))


@defect(TESTS, "S19")
def bins_closed_on_the_right() -> None:
    def wrong(log_probs: Tensor, bins: int) -> tuple[Tensor, Tensor]:
        confidence = log_probs.amax(1).exp()
        edges = torch.arange(1, bins, dtype=torch.float64) / bins
        return confidence, torch.bucketize(confidence * (1 - 1e-12), edges, right=False)

    replace(f"{SCORES}._confidence_bins", wrong)


@defect(TESTS, "S19")
def calibration_error_whose_signs_cancel() -> None:
    replace(f"{SCORES}.ece", lambda log_probs, labels, **settings: abs(_gap(log_probs, labels)))


def _gap(log_probs: Tensor, labels: Tensor) -> float:
    confidence, answer = log_probs.double().exp().max(1)
    return ((answer == labels).double() - confidence).mean().item()


@defect(TESTS, "S21")
def intervals_of_half_the_level() -> None:
    wrap(f"{SCORES}._percentiles", lambda right: lambda statistics, level: right(statistics, level / 2))


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
