"""Defects of numbers: their metrics, their task, their predictions, and their way through a run."""

from typing import Any

import torch
from torch import Tensor

from mutants.defect import defect, replace, wrap

METRICS, TASK = "bayestune.metrics.numbers", "bayestune.tasks.regression.Regression"
PREDICTION = "bayestune.tasks.numbers.RegressionPrediction"
MIXTURES, REGRESSION, RUNS = "metrics/test_numbers.py", "tasks/test_regression.py", "cli/test_numbers.py"


@defect(MIXTURES, "crps")
def crps_without_its_pairs() -> None:
    """The mean absolute error of the draws, which no spread makes smaller."""
    replace(f"{METRICS}.mixture_crps", lambda means, stds, targets: (targets - means).abs().mean(0))


@defect(MIXTURES, "crps")
def a_mean_size_of_half_the_spread() -> None:
    wrap(f"{METRICS}._mean_size", lambda right: lambda means, stds: right(means, stds / 2))


@defect(MIXTURES, "density")
def numbers_of_a_row_mixed_one_by_one() -> None:
    def make(right: Any) -> Any:
        def wrong(means: Tensor, stds: Tensor, targets: Tensor) -> Tensor:
            parts = [(each[..., d : d + 1] for each in (means, stds, targets)) for d in range(targets.shape[-1])]
            return torch.stack([right(*part) for part in parts]).sum(0)

        return wrong

    wrap(f"{METRICS}.mixture_row_nll", make)


@defect(MIXTURES, "quantiles")
def quantiles_averaged_over_draws() -> None:
    def wrong(means: Tensor, stds: Tensor, level: float) -> Tensor:
        return (means + stds * torch.special.ndtri(torch.tensor(level, dtype=torch.float64))).mean(0)

    replace(f"{METRICS}._quantile", wrong)


@defect("metrics/test_conformal_numbers.py", "in_turn")
def intervals_for_twice_the_alpha() -> None:
    wrap("bayestune.metrics.conformal._exact", lambda right: lambda alpha: right(alpha) * 2)


@defect(REGRESSION, "unit or loss")
def a_loss_in_standard_units() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
            return right(self, outputs, batch) - sum(torch.tensor(std).log() for std in self.target_std)

        return wrong

    wrap(f"{TASK}.row_loss", make)


@defect(REGRESSION, "fisher")
def roots_of_the_roots_of_the_fisher_matrix() -> None:
    def make(right: Any) -> Any:
        return lambda self, outputs: (root.clamp(min=0).pow(0.5) for root in right(self, outputs))

    wrap(f"{TASK}.loss_roots", make)


@defect(REGRESSION, "other_units")
def variances_scaled_like_means() -> None:
    def make(right: Any) -> Any:
        def wrong(self: Any, outputs: Tensor, rows: Any, **more: Any) -> Any:
            return right(self, outputs, rows, **more).tempered(1 / self.target_std[0])

        return wrong

    wrap(f"{TASK}.prediction", make)


@defect(REGRESSION, "variances")
def an_epistemic_variance_of_a_sample() -> None:
    replace(f"{PREDICTION}.epistemic", lambda self: self.draw_means.var(0) if len(self.draw_means) > 1 else 0)


@defect(REGRESSION, "coverage")
def a_wider_interval_is_counted() -> None:
    wrap("bayestune.metrics.numbers.mixture_cdf", lambda right: lambda *mixture: 0.5 + (right(*mixture) - 0.5) / 1.1)


@defect(REGRESSION, "linear_regression")
def a_curvature_of_half_the_rows() -> None:
    def make(right: Any) -> Any:
        return lambda self, outputs: (root / 2**0.5 for root in right(self, outputs))

    wrap(f"{TASK}.loss_roots", make)


@defect(REGRESSION, "linearised")
def only_differences_of_numbers_are_drawn() -> None:
    def make(right: Any) -> Any:
        def wrong(forward: Any, layers: Any) -> Tensor:
            found = right(forward, layers)
            found[:, 0] = found[:, :, 0] = 0
            return found

        return wrong

    wrap("bayestune.sampling.logit_space.output_covariance", make)


@defect(REGRESSION, "temperature_of_constant")
def a_temperature_of_the_standard_deviation() -> None:
    wrap(f"{PREDICTION}.tempered", lambda right: lambda self, temperature: right(self, temperature**2))


@defect(REGRESSION, "without_a_label")
def the_first_row_of_a_folder_is_not_looked_at() -> None:
    from bayestune.tasks.data import FORMATS

    replace("bayestune.tasks.datasets._formats", lambda folder: FORMATS)


@defect(REGRESSION, "no_number")
def numbers_without_end_pass() -> None:
    replace("bayestune.tasks.rows.NumberRow.__post_init__", lambda self: None)


@defect(RUNS, "keeps_its_units")
def units_are_not_recorded() -> None:
    replace(f"{TASK}.recorded", lambda self: {})


@defect(RUNS, "same_answers_only")
def any_answer_is_the_same() -> None:
    replace(f"{PREDICTION}.same_answer", lambda record, other: True)


@defect(RUNS, "constant_noise")
def constant_noise_is_never_fitted() -> None:
    replace(f"{TASK}.needs_temperature", lambda self: False)


@defect(RUNS, "started_from")
def an_adapter_gets_other_units() -> None:
    def make(right: Any) -> Any:
        def wrong(experiment: Any, source: Any, record: Any) -> Any:
            return right(experiment, source, {name: value for name, value in record.items() if "target" not in name})

        return wrong

    wrap("bayestune.experiment.trained.asked_as", make)


@defect(RUNS, "means_nothing")
def methods_do_not_look_at_the_task() -> None:
    replace("bayestune.methods.tfb.Tfb.check_task", lambda self, task: None)
    replace("bayestune.methods.tfb._check_task", lambda task: None)
