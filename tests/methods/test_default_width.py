"""The width of BLoB by default: no run is silently plain LoRA, whatever its rows, updates and trainer."""

import warnings

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from bayestune import BayesTrainer, KLCallback, KLSettings
from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneWarning
from bayestune.methods import Blob, Updates
from bayestune.training import initial_std, kl_only_std
from bayestune.training.kl import posterior_summary
from models import LLAMA, llama
from training.toys import TASK, rows

START = initial_std(0.05)


def updates(steps: int, count: int, batch_size: int) -> Updates:
    return Updates(steps=steps, rows=count, batch_size=batch_size, processes=1, warmup=0.06)


def reached(method: Blob, run: Updates) -> float:
    kl = method.kl(run)
    settings = {"updates": run.steps, "cycle": kl.cycle, "schedule": kl.schedule, "warmup": run.warmup}
    return kl_only_std(kl.learning_rate, start=START, prior_std=method.prior_std, **settings)


@pytest.mark.parametrize(
    ("steps", "count", "batch_size"), [(30, 4952, 4), (1000, 20_000, 4), (1000, 36, 8), (5000, 640, 4)]
)
def test_the_default_reaches_its_width_in_runs_of_any_length(steps: int, count: int, batch_size: int) -> None:
    run = updates(steps, count, batch_size)
    default = Blob().resolved("causal")
    assert default.posterior_std == pytest.approx(0.06)
    assert default.kl(run).cycle <= steps
    expected = 0.06 if steps > 30 else 5 * START  # the largest rate that keeps the means limits a run of 30
    assert reached(default, run) >= 0.999 * expected


def test_the_papers_recipe_is_its_own_and_what_is_given_wins() -> None:
    paper = Blob(recipe="paper").resolved("causal")
    assert (paper.kl_schedule, paper.kl_learning_rate, paper.estimator) == ("paper", 0.01, "flipout_token")
    assert paper.posterior_std is None and paper.kl(updates(1000, 20_000, 4)).cycle == 1221
    assert paper.resolved("causal") == paper
    assert reached(paper, updates(1000, 20_000, 4)) == pytest.approx(START, rel=0.01)  # plain LoRA, as measured
    given = Blob(recipe="paper", posterior_std=0.1, kl_schedule="linear").resolved("encoder")
    assert (given.posterior_std, given.kl_schedule, given.kl_learning_rate) == (0.1, "linear", None)


def test_a_start_wider_than_the_default_keeps_its_width() -> None:
    wide = Blob(rho_init=0.5).resolved("encoder")
    assert wide.posterior_std is None and wide.kl_learning_rate == 0.002


def train(trainer: str, settings: KLSettings | None, steps: int, folder: str) -> list[str]:
    """Train a tiny Llama with a trainer, and return the warnings about its width."""
    model = get_peft_model(llama(), LLAMA.config(rho_init=0.05))
    args = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=5,
        disable_tqdm=True,
        warmup_steps=0.06,
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", BayestuneWarning)
        if trainer == "BayesTrainer":
            BayesTrainer(model, task=TASK, args=args, train_rows=rows(8), kl=settings).train()
        else:
            assert settings is not None
            ids = torch.arange(3, 8)
            data = [{"input_ids": ids, "labels": ids}] * 8
            Trainer(model, args, train_dataset=data, callbacks=[KLCallback(settings)]).train()
    std = posterior_summary(list(gaussian_layers(model).values()))["std"]
    found = [str(warning.message) for warning in caught if "posterior std" in str(warning.message)]
    if not found:
        assert std >= 5 * START
    return found


@pytest.mark.parametrize("trainer", ["BayesTrainer", "Trainer"])
def test_a_run_of_thirty_updates_has_a_width_or_says_so(trainer: str, tmp_path) -> None:
    run = updates(30, 4952, 4)
    default = None if trainer == "BayesTrainer" else Blob().resolved("causal").kl(run)
    assert train(trainer, default, 30, str(tmp_path)) == []
    narrow = train(trainer, Blob(recipe="paper").resolved("causal").kl(run), 30, str(tmp_path))
    assert len(narrow) == 1
    for word in ("30 updates", "hardly from its start", "plain LoRA", "steps", "posterior_std", "kl_schedule"):
        assert word in narrow[0]
    wide = train(trainer, KLSettings(cycle=1, learning_rate=0.04), 30, str(tmp_path))
    assert len(wide) == 1 and "nearly to the prior's 0.2" in wide[0]
