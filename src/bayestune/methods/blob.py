r"""BLoB: Bayesian low-rank adaptation by backpropagation (Wang et al. 2024, arXiv 2406.11675).

The posterior is ``q(A) = N(M, diag(Omega^2))`` with ``Omega = G^2`` (section 3.2); M, G and B are trained together on
``mean NLL + pi_i KL(q || N(0, s_p^2))`` with the weights pi_i of `kl_schedule` (section 3.3).
"""

import warnings
from types import MappingProxyType
from typing import Any, ClassVar, Literal

from peft import LoraConfig, PeftModel
from pydantic import Field, model_validator

from bayestune.adapters import BayesLoraConfig, gaussian_layers
from bayestune.adapters.config import Distribution
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.functional import cycle_steps, linear_kl_weight, paper_kl_weight, uniform_kl_weight
from bayestune.methods.base import FIT_SPLIT, FIT_SPLIT_HELP, Family, Fitting, Line, Method, Updates
from bayestune.methods.scale import fit_scale, scale_std
from bayestune.sampling import Posterior, Variational
from bayestune.training import KLSettings, elbo_kl_weight, initial_std, kl_only_std, kl_rate_for_std
from bayestune.training.kl import Schedule, posterior_summary
from bayestune.training.posterior_std import DEFAULT_SHARE, check_std

_SCHEDULES: dict[str, Schedule] = {
    "paper": paper_kl_weight,
    "uniform": uniform_kl_weight,
    "linear": linear_kl_weight,
}
_PAPER_RATES: dict[Family, float] = {"causal": 0.01, "encoder": 0.002}


class Blob(Method):
    """A Gaussian over A whose mean and standard deviation are trained by backpropagation; B is a point."""

    name = "blob"
    label = "BLoB"
    summary = "Gaussian posterior over A, mean and variance trained by backpropagation"
    paper = "Wang et al. 2024, arXiv 2406.11675"
    posterior = Variational
    distribution: ClassVar[Distribution] = "gaussian_a"
    variants = MappingProxyType(
        {
            "blob_wide": Line(  # docs/recipe.md
                label="BLoB, std 0.06",
                settings={"kl_learning_rate": None, "posterior_std": 0.06},
                by_default=False,
            )
        }
    )

    in_tables = MappingProxyType({"posterior_scale": 1.0})
    splits = (FIT_SPLIT,)

    recipe: Literal["default", "paper"] = Field(
        "default",
        description="Preset for the settings that you leave out. default: a target std of 0.3 x the prior's, unless "
        "it starts wider; uniform KL weights; a KL cycle no longer than the run; and a scale chosen on held-out rows. "
        "paper: the paper's KL weights, KL rate and flipout, and no scale.",
    )
    prior_std: float = Field(0.2, gt=0, description="Standard deviation of the prior.")
    rho_init: float = Field(0.05, gt=0, description="Initial G; the standard deviation is G^2.")
    estimator: Literal["independent", "flipout", "flipout_token"] | None = Field(
        None, description="Training noise: independent per row (default), flipout, or flipout_token (paper)."
    )
    kl_schedule: Literal["paper", "uniform", "linear", "elbo"] | None = Field(
        None, description="Weights of the KL: paper, uniform (default), linear, or elbo (1/rows in every update)."
    )
    kl_learning_rate: float | None = Field(
        None, gt=0, description="Learning rate of the SGD step on G and the KL; default: derived from the target std."
    )
    posterior_std: float | None = Field(
        None,
        gt=0,
        description="Target posterior std, default 0.3 x the prior's. Sets the KL learning rate for you.",
    )
    posterior_scale: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Factor that multiplies the std after training; 1: none; default: chosen on held-out rows.",
    )
    fit_split: str | None = Field(None, min_length=1, description=FIT_SPLIT_HELP)

    @model_validator(mode="after")
    def _check_scale(self) -> "Blob":
        if self.posterior_scale is not None and self.fit_split is not None:
            raise ConfigError("posterior_scale and fit_split: found both; the split chooses the scale, leave one out.")
        return self

    @model_validator(mode="after")
    def _check_width(self) -> "Blob":
        if self.kl_learning_rate is not None and self.posterior_std is not None:
            raise ConfigError("posterior_std and kl_learning_rate: found both; each fixes the other, leave one out.")
        if self.posterior_std is not None:
            check_std(self.posterior_std, start=initial_std(self.rho_init), prior_std=self.prior_std)
        return self

    @property
    def as_published(self) -> bool:
        return self.recipe == "paper"

    def resolved(self, family: Family) -> "Blob":
        paper = self.recipe == "paper"
        filled: dict[str, Any] = {
            "estimator": self.estimator or ("flipout_token" if paper else "independent"),
            "kl_schedule": self.kl_schedule or ("paper" if paper else "uniform"),
        }
        if self.kl_learning_rate is None and self.posterior_std is None:
            std = DEFAULT_SHARE * self.prior_std
            if paper or std <= initial_std(self.rho_init):  # it starts wider than the target
                filled["kl_learning_rate"] = _PAPER_RATES[family]
            else:
                filled["posterior_std"] = std
        if paper and self.posterior_scale is None and self.fit_split is None:
            filled["posterior_scale"] = 1.0
        return self.replace(**filled)

    def adapter_config(self, **lora: Any) -> LoraConfig:
        own = {"prior_std": self.prior_std, "rho_init": self.rho_init, "estimator": self.estimator or "independent"}
        return BayesLoraConfig(**lora, **own, distribution=self.distribution)

    def kl(self, updates: Updates) -> KLSettings:
        growth = self._growth(updates)
        rate = self.kl_learning_rate
        if rate is None:
            assert self.posterior_std is not None
            rate = kl_rate_for_std(self.posterior_std, **growth)
        return KLSettings(cycle=growth["cycle"], schedule=growth["schedule"], learning_rate=rate)

    def _growth(self, updates: Updates) -> dict[str, Any]:
        """Return the arguments that `kl_only_std` and `kl_rate_for_std` share."""
        assert self.kl_schedule is not None, "only resolved settings have one"
        cycle = cycle_steps(updates.rows, updates.batch_size, processes=updates.processes)
        return {
            "updates": updates.steps,
            "cycle": cycle if self.recipe == "paper" else min(cycle, updates.steps),
            "schedule": elbo_kl_weight(updates.rows) if self.kl_schedule == "elbo" else _SCHEDULES[self.kl_schedule],
            "start": initial_std(self.rho_init),
            "prior_std": self.prior_std,
            "warmup": updates.warmup,
        }

    def held_out(self, rows: int) -> int:
        """Hold out a fifth, at most 200 rows; nothing if there are fewer than 100 rows, which training needs more."""
        chosen = self.posterior_scale is None and self.fit_split is None
        return min(200, rows // 5) if chosen and rows >= 100 else 0

    def fit(self, model: PeftModel, run: Fitting) -> Posterior:
        """Train, then multiply every standard deviation by `posterior_scale`, or by the factor of `fit_scale`."""
        posterior, rows = super().fit(model, run), run.more_rows.get(FIT_SPLIT, ())
        run.found["trained_std"] = posterior_summary(list(gaussian_layers(posterior.model).values()))["std"]
        if self.posterior_scale is not None:
            scale_std(posterior, self.posterior_scale)
            run.found["posterior_scale"] = self.posterior_scale
        elif rows:
            with run.precision():
                settings = {"seed": run.seed, "tempered": run.tempered, "progress": run.progress}
                search = fit_scale(posterior, run.task, rows, **settings)
            nll = {f"{factor:.4g}": value for factor, value in search.nll.items()}
            run.found.update(posterior_scale=search.scale, rows=len(rows), nll_by_scale=nll)
        return posterior

    def check(self, model: PeftModel, updates: Updates) -> None:
        """Warn if the run is too short for `posterior_std` even at the largest KL rate."""
        if self.posterior_std is None:
            return
        rate = self.kl(updates).learning_rate
        reached = kl_only_std(rate, **self._growth(updates))
        if reached < 0.99 * self.posterior_std:
            warnings.warn(
                f"posterior_std: {updates.steps} updates are too few for {self.posterior_std:g} at the largest "
                f"KL rate, prior_std^2 = {rate:g}: the standard deviation ends near {reached:.3g}. Give "
                "more steps, or a smaller posterior_std.",
                BayestuneWarning,
                stacklevel=2,
            )
