"""Compare changes to the paper's recipe for BLoB, one at a time, on rows held out from a train split.

    python benchmarks/recipe.py --data DIR                        # make every missing record in results/recipe
    python benchmarks/recipe.py --data DIR --variants paper,elbo --seeds 1,2,3
    python benchmarks/recipe.py --page                            # make docs/recipe.md from the records; train nothing

Trains on the first 1000 rows of OpenBookQA's train split and scores 1000 other rows of it. It does not use the last
400 rows, on which the settings of the baseline were chosen, nor dev and test. With little data and about ten
passes, plain LoRA is overconfident. All runs have the same rows, order, updates and starting weights, except for
what `VARIANTS` names. After an interruption, the same command makes the missing records."""

import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from options import parser
from recipe_page import page
from recipe_variants import HELD_OUT, SETTINGS, TRAIN_ROWS, TUNED_ON, VARIANTS, WARM_UP, updates
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments

from bayestune import BayesTrainer, evaluate, predict, save_posterior
from bayestune.adapters import gaussian_layers
from bayestune.experiment import Experiment
from bayestune.experiment.backbone import add_adapter, build_task, find_backbone, load_base
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.files import read_json, write_json, write_text
from bayestune.functional import std

ROOT = Path(__file__).parent.parent


class EmpiricalPrior(TrainerCallback):
    """Set the prior of each layer to the maximizer of the ELBO, ``s_p^2 = mean(M^2 + G^4)``, before every update."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for layer in gaussian_layers(kwargs["model"]).values():
            square = layer.weight.detach().double().square() + std(layer.rho.detach().double()).square()
            layer.prior_std = math.sqrt(square.mean().item())


class AdaptiveTrainer(BayesTrainer):
    """Train G with AdamW, without decay; `KLCallback` then adds only the KL step."""

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if new:
            assert self.model is not None
            rhos = [layer.rho for layer in gaussian_layers(self.model).values()]
            optimizer.add_param_group({"params": rhos, "weight_decay": 0.0, "lr": self.args.learning_rate})
        return optimizer


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", help="folder with openbookqa/")
    made.add_argument("--variants", default=",".join(VARIANTS))
    made.add_argument("--seeds", default="1")
    made.add_argument("--results", default=ROOT / "results" / "recipe", type=Path)
    made.add_argument("--runs", default=Path("runs/recipe"), type=Path, help="folder for the posteriors")
    made.add_argument("--page", action="store_true", help="write docs/recipe.md from the records")
    options = made.parse_args()
    if options.page:
        write_text(ROOT / "docs" / "recipe.md", page([read_json(p, "a record") for p in files(options.results)]))
        return
    if options.data is None:
        made.error("expected --data DIR or --page")
    transformers.logging.set_verbosity_error()
    names = options.variants.split(",")
    if set(names) - set(VARIANTS):
        made.error(f"--variants: found {min(set(names) - set(VARIANTS))}, expected some of {', '.join(VARIANTS)}")
    todo = [(name, int(seed)) for seed in options.seeds.split(",") for name in names]
    missing = [cell for cell in todo if not record_path(options.results, *cell).exists()]
    options.results.mkdir(parents=True, exist_ok=True)
    for name, seed in tqdm(missing, desc="recipe", unit="run"):
        record = measure(name, seed, options.data, options.runs)
        write_json(record_path(options.results, name, seed), record)
        tqdm.write(f"{name} seed {seed}: " + ", ".join(f"{k} NLL {s['nll']:.4f}" for k, s in record["scores"].items()))


def record_path(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name}-seed{seed}.json"


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json"))


def measure(name: str, seed: int, data: str, runs: Path) -> dict[str, Any]:
    """Train the variant, save its posterior, and score the held-out rows at the mean and with 10 draws."""
    variant = VARIANTS[name]
    backbone = find_backbone(SETTINGS["model"])
    settings = {"method": "blob", **SETTINGS, **variant.settings, "seed": seed, "target_modules": ("query", "value")}
    experiment = Experiment(**settings).resolved(backbone.family)
    assert experiment.max_tokens is not None
    task = build_task(backbone, experiment.task, data, experiment.max_tokens)
    rows = task.rows("train")
    train, held_out = rows[:TRAIN_ROWS], rows[TRAIN_ROWS:-TUNED_ON][-HELD_OUT:]
    base, new = load_base(backbone, task, experiment)
    model = add_adapter(base, experiment, new=new, task_type=None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        trainer = (AdaptiveTrainer if variant.adaptive else BayesTrainer)(
            model,
            task=task,
            args=arguments(experiment, folder),
            train_rows=train,
            kl=experiment.method.kl(updates(experiment, len(train))),
            train_draws=variant.train_draws,
            callbacks=[EmpiricalPrior()] if variant.empirical else [],
        )
        trainer.train()
    seconds = time.monotonic() - started
    model.eval()
    save_posterior(model, runs / f"{name}-seed{seed}", overwrite=True)
    counts = {"mle": 0} if experiment.method.name == "mle" else {"n0": 0, "n10": 10}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = {key: evaluate(predict(model, task, held_out, draws=n, seed=seed)) for key, n in counts.items()}
    layers = gaussian_layers(model).values()
    return {
        "variant": name,
        "held_out": len(held_out),
        "seed": seed,
        "scores": {key: value.as_dict() for key, value in scores.items()},
        "std": statistics.mean(std(layer.rho).mean().item() for layer in layers) if layers else None,
        "prior_std": statistics.mean(layer.prior_std for layer in layers) if layers else None,
        "seconds": round(seconds, 1),
        "command": ["python", "benchmarks/recipe.py", *sys.argv[1:]],
        "experiment": {**experiment.as_dict(), "train_draws": variant.train_draws},
        "adaptive": variant.adaptive,
        "empirical": variant.empirical,
        "sha256": {"train_rows": rows_sha256(train), "held_out": rows_sha256(held_out)},
        "versions": versions(),
        "hardware": hardware(),
    }


def arguments(experiment: Experiment, folder: str) -> TrainingArguments:
    """Return the arguments of a run of `bayestune train`, without its log."""
    assert experiment.learning_rate is not None and experiment.batch_size is not None
    return TrainingArguments(
        output_dir=folder,
        seed=experiment.seed,
        max_steps=experiment.steps,
        per_device_train_batch_size=experiment.batch_size,
        train_sampling_strategy="group_by_length",
        learning_rate=experiment.learning_rate,
        warmup_steps=WARM_UP,
        adam_epsilon=1e-6,
        max_grad_norm=0.0,
        use_cpu=not torch.cuda.is_available(),
        bf16=experiment.precision == "bf16",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        report_to="none",
    )


if __name__ == "__main__":
    main()
