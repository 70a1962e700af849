"""The variants that `recipe.py` compares: each is one change to the paper's recipe for BLoB."""

from dataclasses import dataclass, field
from typing import Any

from bayestune.experiment import Experiment
from bayestune.methods import Updates

TASK, TRAIN_ROWS, HELD_OUT, TUNED_ON = "openbookqa", 1000, 1000, 400
SETTINGS: dict[str, Any] = {
    "model": "minilm",
    "task": TASK,
    "steps": 300,
    "batch_size": 32,
    "learning_rate": 2e-3,
    "kl_learning_rate": 2e-3,
    "lora_alpha": 16,
    "precision": "bf16",
}
WARM_UP = 0.06


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One change to the recipe.

    Attributes:
        what: label of the variant on the page.
        settings: settings of `Experiment` that differ from `SETTINGS`.
        against: the variant that its NLL is compared with.
        train_draws: as in `BayesTrainer`.
        adaptive: whether AdamW instead of SGD moves G along the NLL; the KL step still uses SGD.
        empirical: whether each layer's prior is set, before every update, to the one that minimizes the KL.
    """

    what: str
    settings: dict[str, Any] = field(default_factory=dict)
    against: str = "paper"
    train_draws: int = 1
    adaptive: bool = False
    empirical: bool = False


def wide(std: float, **settings: Any) -> dict[str, Any]:
    return {"posterior_std": std, "kl_learning_rate": None, **settings}


ELBO = {"kl_schedule": "elbo", "kl_learning_rate": 0.03}
VARIANTS = {
    "mle": Variant(what="plain LoRA", settings={"method": "mle"}),
    "paper": Variant(what="the paper's recipe"),
    "kl-rate-0.005": Variant(what="rate of G and of the KL 0.005", settings={"kl_learning_rate": 0.005}),
    "kl-rate-0.01": Variant(what="rate of G and of the KL 0.01", settings={"kl_learning_rate": 0.01}),
    "std-0.04": Variant(what="rate for std 0.04", settings=wide(0.04)),
    "std-0.09": Variant(what="rate for std 0.09", settings=wide(0.09)),
    "uniform-std-0.06": Variant(
        what="uniform KL weights, rate for std 0.06", settings=wide(0.06, kl_schedule="uniform")
    ),
    "uniform": Variant(what="uniform KL weights", settings={"kl_schedule": "uniform"}),
    "flipout": Variant(what="flipout, signs per row", settings={"estimator": "flipout"}),
    "flipout-token": Variant(what="flipout, signs per token (released code)", settings={"estimator": "flipout_token"}),
    "two-draws": Variant(what="two draws per row and update (twice the cost)", train_draws=2),
    "wide-start": Variant(what="G starts twice as large", settings={"rho_init": 0.1}),
    "prior-0.1": Variant(what="prior std 0.1", settings={"prior_std": 0.1}),
    "prior-0.4": Variant(what="prior std 0.4", settings={"prior_std": 0.4}),
    "elbo": Variant(what="KL weight 1/rows, rate of G and of the KL 0.03", settings=ELBO),
    "empirical": Variant(
        what="the line above, and the empirical-Bayes prior of each layer", settings=ELBO, empirical=True
    ),
    "adamw-g": Variant(what="G along the NLL by AdamW", adaptive=True),
    "paper-150": Variant(what="150 updates: the paper's recipe", settings={"steps": 150}, against="paper-150"),
    "std-0.06-150": Variant(
        what="150 updates: rate for std 0.06", settings=wide(0.06, steps=150), against="paper-150"
    ),
    "paper-600": Variant(what="600 updates: the paper's recipe", settings={"steps": 600}, against="paper-600"),
    "std-0.06-600": Variant(
        what="600 updates: rate for std 0.06", settings=wide(0.06, steps=600), against="paper-600"
    ),
    "paper-arc": Variant(what="ARC-Easy: the paper's recipe", settings={"task": "arc_easy"}, against="paper-arc"),
    "std-0.06-arc": Variant(
        what="ARC-Easy: rate for std 0.06", settings=wide(0.06, task="arc_easy"), against="paper-arc"
    ),
}


def updates(experiment: Experiment, rows: int) -> Updates:
    assert experiment.batch_size is not None
    return Updates(steps=experiment.steps, rows=rows, batch_size=experiment.batch_size, processes=1, warmup=WARM_UP)
