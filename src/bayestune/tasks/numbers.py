"""Predictions of numbers, which are mixtures of Gaussians over the draws, and their scores."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from bayestune import metrics
from bayestune.errors import DataError
from bayestune.metrics.numbers import share_error
from bayestune.tasks.base import AnyPrediction, AnyScores
from bayestune.tasks.rows import AnyRow

LEVEL = 0.9
"""Probability of the interval that is scored and reported."""
_SAME = 1e-3  # how much a mean may differ between batches, as a share of the std


@dataclass(frozen=True, kw_only=True)
class RegressionScores(AnyScores):
    """Scores of predicted numbers: means over rows, and over the numbers of a row if it has several.

    Attributes:
        rmse: root mean squared error of the predictive mean, in the unit of the target.
        nll: mean negative log density per row, in nats; it depends on the unit of the target and may be negative.
        crps: continuous ranked probability score, in the unit of the target.
        coverage: share of the numbers inside their central 90 % interval, in [0, 1].
        coverage_error: binomial standard error of `coverage`, as if all numbers were independent.
        rows: number of rows.
        draws: number of draws.
        intervals: 95 % bootstrap interval over rows of each score.
    """

    headings: ClassVar[Mapping[str, str]] = {
        "rmse": "RMSE",
        "nll": "NLL",
        "crps": "CRPS",
        "coverage": f"in {100 * LEVEL:g} % interval",
    }

    rmse: float
    nll: float
    crps: float
    coverage: float
    coverage_error: float
    rows: int
    draws: int
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class RegressionPrediction(AnyPrediction[RegressionScores]):
    """Predicted numbers: ``p(y|x) = 1/K sum_k N(y; mu_k, sigma_k^2)``, in the unit of the target.

    Attributes:
        ids: the rows' ids, in the order given.
        draw_means: mu_k, float64 on the CPU; one slice, the mean's, when `draws` is 0.
        draw_variances: sigma_k^2, the variance of the noise under draw k.
        targets: the right numbers, or None if some row has none.
        draws: number of draws; 0 for the mean alone.
        seed: seed of the draws.
        task: name of the task.
    """

    temperatures: ClassVar[tuple[float, float]] = (1e-6, 1e6)
    draw_means: Float[Tensor, "slices rows numbers"]
    draw_variances: Float[Tensor, "slices rows numbers"]
    targets: Float[Tensor, "rows numbers"] | None

    @property
    def mean(self) -> Float[Tensor, "rows numbers"]:
        """Mean of the predictive, ``1/K sum_k mu_k``."""
        return self.draw_means.mean(0)

    @property
    def total(self) -> Float[Tensor, "rows numbers"]:
        """Variance of the predictive, ``aleatoric + epistemic``."""
        return self.aleatoric + self.epistemic

    @property
    def aleatoric(self) -> Float[Tensor, "rows numbers"]:
        """Mean variance of the noise, ``1/K sum_k sigma_k^2``."""
        return self.draw_variances.mean(0)

    @property
    def epistemic(self) -> Float[Tensor, "rows numbers"]:
        """Variance over draws of the mean, ``1/K sum_k (mu_k - mean)^2``."""
        return self.draw_means.var(0, correction=0)

    def quantiles(self, levels: Sequence[float]) -> Float[Tensor, "levels rows numbers"]:
        """Return the quantiles of the predictive at `levels`, each between 0 and 1."""
        return metrics.mixture_quantiles(self.draw_means, self.draw_variances.sqrt(), levels)

    def interval(self, level: float = LEVEL) -> Float[Tensor, "2 rows numbers"]:
        """Return the ends of the central interval that holds the number with probability `level`."""
        return self.quantiles([(1 - level) / 2, (1 + level) / 2])

    def tempered(self, temperature: float) -> "RegressionPrediction":
        """Return the prediction with every noise variance multiplied by `temperature`."""
        return dataclasses.replace(self, draw_variances=self.draw_variances * temperature)

    def scores(self, *, resamples: int = 1000, seed: int = 0) -> RegressionScores:
        """Return RMSE, NLL, CRPS and the coverage of the 90 % interval, with bootstrap intervals.

        Args:
            resamples: number of bootstrap resamples.
            seed: seed of the bootstrap.

        Raises:
            DataError: a row has no label.
        """
        targets, stds = self._known_targets(), self.draw_variances.sqrt()
        reached = metrics.mixture_cdf(self.draw_means, stds, targets)
        covered = ((reached - 0.5).abs() <= LEVEL / 2).double()
        by_row = {
            "rmse": (self.mean - targets).square().mean(1),
            "nll": self.row_nll(),
            "crps": metrics.mixture_crps(self.draw_means, stds, targets).mean(1),
            "coverage": covered.mean(1),
        }
        means = {name: values.mean().item() for name, values in by_row.items()}
        resampling = {"resamples": resamples, "seed": seed}
        intervals = {name: metrics.bootstrap_interval(values, **resampling) for name, values in by_row.items()}
        low, high = intervals["rmse"]
        return RegressionScores(
            **{**means, "rmse": means["rmse"] ** 0.5},
            coverage_error=share_error(means["coverage"], covered.numel()),
            rows=len(targets),
            draws=self.draws,
            intervals={**intervals, "rmse": (low**0.5, high**0.5)},
        )

    def row_nll(self) -> Float[Tensor, " rows"]:
        """Return -log of the predictive density of each row's numbers, in nats.

        Raises:
            DataError: a row has no label.
        """
        return metrics.mixture_row_nll(self.draw_means, self.draw_variances.sqrt(), self._known_targets())

    def _known_targets(self) -> Float[Tensor, "rows numbers"]:
        if self.targets is None:
            raise DataError("evaluate: some rows have no target; found None, expected numbers for every row.")
        return self.targets

    def uncertainties(self) -> dict[str, Float[Tensor, " rows"]]:
        """Return the total and the epistemic variance of each row, as geometric means over its numbers."""
        found = {"total": self.total, "epistemic": self.epistemic}
        return {name: values.log().mean(1).exp() for name, values in found.items()}

    def records(self, rows: Sequence[AnyRow]) -> list[dict[str, Any]]:
        """Return one JSON object per row.

        Its keys are `id`, `mean`, `interval` (the ends of the central 90 % interval), and the variances `total`,
        `aleatoric` and `epistemic`. Each is a list if rows have several numbers.
        """
        values = {"mean": self.mean, "interval": self.interval().permute(1, 2, 0)}
        values |= {name: getattr(self, name) for name in ("total", "aleatoric", "epistemic")}
        single = self.draw_means.shape[-1] == 1
        found = {name: (each[:, 0] if single else each).tolist() for name, each in values.items()}
        return [{"id": row.id, **{name: each[i] for name, each in found.items()}} for i, row in enumerate(rows)]

    @staticmethod
    def same_answer(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Return whether two records have the same means, up to a thousandth of the std."""
        mean, variance, before = (
            torch.as_tensor(each, dtype=torch.float64).flatten()
            for each in (record["mean"], record["total"], other.get("mean", ()))
        )
        return mean.shape == before.shape and bool(((mean - before).abs() <= _SAME * variance.sqrt()).all())
