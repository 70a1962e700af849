"""Laplace-LoRA as a method: a Gaussian fitted around a finished plain LoRA adapter."""

from typing import Literal

from peft import PeftModel
from pydantic import Field

from bayestune.methods.base import FIT_SPLIT, FIT_SPLIT_HELP, Fitting, PostHocMethod, Updates
from bayestune.methods.laplace.linears import refuse_if_too_large
from bayestune.methods.laplace.posterior import LaplacePosterior, check_task, fit_laplace
from bayestune.methods.mle import Mle
from bayestune.tasks import Task


class Laplace(PostHocMethod):
    """A Gaussian with K-FAC curvature around a finished adapter; predictions are linear in the weights."""

    name = "laplace"
    label = "Laplace"
    summary = "Gaussian around a finished adapter with K-FAC curvature, linearized predictions"
    paper = "Yang et al. 2024, arXiv 2308.13111"
    posterior = LaplacePosterior
    start = Mle
    splits = (FIT_SPLIT,)

    laplace_layers: Literal["all", "last"] = Field(
        "all", description="Layers with curvature: all adapted ones, or the last (the trained head, if there is one)."
    )
    laplace_predictive: Literal["mc", "probit"] = Field(
        "mc", description="mc: draws of the linearized model; probit: the average over them in closed form."
    )
    fit_split: str | None = Field(None, min_length=1, description=FIT_SPLIT_HELP)

    def check_task(self, task: Task) -> None:
        precision = "marglik" if self.fit_split is None else "validation"
        check_task(task, precision, self.laplace_predictive)

    def check(self, model: PeftModel, updates: Updates) -> None:
        refuse_if_too_large(model, layers=self.laplace_layers)

    def draw_counts(self, draws: int) -> tuple[int, ...]:
        return (1,) if self.laplace_predictive == "probit" and draws else super().draw_counts(draws)

    def fit_to(self, model: PeftModel, run: Fitting) -> LaplacePosterior:
        validation = run.more_rows.get(FIT_SPLIT) or None
        with run.precision():
            return fit_laplace(
                model,
                run.task,
                run.rows,
                layers=self.laplace_layers,
                precision="validation" if validation else "marglik",
                validation_rows=validation,
                predictive=self.laplace_predictive,
                progress=run.progress,
            )
