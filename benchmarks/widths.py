"""Compare BLoB's default width with other widths and methods: five data sets, three seeds, the same rows for all.

    python benchmarks/widths.py --data DIR                      # make every missing record in results/widths
    python benchmarks/widths.py --data DIR --tasks rte --seeds 1

MiniLM is trained on 300 rows in 120 updates of 16, about six passes. On so little data, plain LoRA is overconfident.
100 further rows choose the scale of the standard deviation (`fit_scale`) and the temperatures (`fit_temperature`),
with other draws than those that are scored. At most 500 rows of dev and test are scored. The seed chooses the rows to
train on, their order, the initial weights and the draws. After an interruption, the same command makes the missing
records; `benchmarks/tables.py` makes docs/width.md from them.
"""

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from options import parser
from recipe import arguments
from recipe_variants import updates

from bayestune import BayesTrainer, Prediction, evaluate, predict
from bayestune.adapters import gaussian_layers
from bayestune.experiment import Experiment
from bayestune.experiment.backbone import add_adapter, build_task, find_backbone, load_base
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.files import write_json
from bayestune.functional import derive_seed
from bayestune.methods import Point, Posterior, Variational, fit_temperature
from bayestune.methods.scale import fit_scale
from bayestune.tables.cells import portable
from bayestune.tasks import AnyRow, TokenizedTask
from bayestune.training.kl import posterior_summary

RESULTS = Path(__file__).parent.parent / "results" / "widths"
TASKS = {
    "openbookqa": ("train", "dev+test"),
    "arc_easy": ("train", "dev+test"),
    "arc_challenge": ("train", "dev+test"),
    "rte": ("train", "dev"),
    "boolq": ("dev", None),  # the rest of the same split
}
TRAINED, HELD_OUT, SCORED, DRAWS, MEMBERS = 300, 100, 500, 10, 3
SETTINGS: dict[str, Any] = {
    "model": "minilm",
    "steps": 120,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "lora_alpha": 16,
    "max_tokens": 128,
    "target_modules": ("query", "value"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "point": {"method": "mle"},
    "default": {"method": "blob"},
    "paper": {"method": "blob", "recipe": "paper"},
}
SEEDS = (1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One variant on one data set with one seed, and the rows that train it, choose its scale and are scored."""

    task: TokenizedTask
    experiment: Experiment
    train: list[AnyRow]
    held_out: list[AnyRow]
    scored: list[AnyRow]

    def fitted(self, seed: int) -> Posterior:
        """Train on the rows of the cell, with the initial weights and order of `seed`, and return the posterior."""
        experiment = self.experiment.replace(seed=seed)
        base, new = load_base(find_backbone("minilm"), self.task, experiment)
        model = add_adapter(base, experiment, new=new, task_type=None)
        with tempfile.TemporaryDirectory() as folder:
            BayesTrainer(
                model,
                task=self.task,
                args=arguments(experiment, folder),
                train_rows=self.train,
                kl=experiment.method.kl(updates(experiment, len(self.train))),
            ).train()
        model.eval()
        return Variational(model) if gaussian_layers(model) else Point(model)

    def predicted(self, posterior: Posterior, rows: Sequence[AnyRow], draws: int, *, choosing: bool) -> Prediction:
        seed = self.experiment.seed
        return predict(posterior, self.task, rows, draws=draws, seed=derive_seed("widths", seed) if choosing else seed)

    def scores(self, key: str, posterior: Posterior, draws: int) -> dict[str, Any]:
        """Return the scores of a posterior, without and with a temperature fitted on the held-out rows."""
        fitted = self.predicted(posterior, self.held_out, draws, choosing=True)
        plain = self.predicted(posterior, self.scored, draws, choosing=False)
        temperature = fit_temperature(fitted.draw_log_probs, fitted.labels)
        warm = self.combined(plain.draw_log_probs, temperature)
        return {
            key: evaluate(plain).as_dict(),
            f"{key}_temperature": {**evaluate(warm).as_dict(), "temperature": temperature},
        }

    def combined(self, draw_log_probs: torch.Tensor, temperature: float = 1.0) -> Prediction:
        count = draw_log_probs.shape[0]
        return self.task.prediction(draw_log_probs, self.scored, draws=count, seed=0, temperature=temperature)


def cell(task_name: str, variant: str, seed: int, data: str) -> Cell:
    """Return the cell of a data set, a variant and a seed, without rows that the base cannot read."""
    backbone = find_backbone("minilm")
    experiment = Experiment(**SETTINGS, **VARIANTS[variant], task=task_name, seed=seed).resolved(backbone.family)
    assert experiment.max_tokens is not None
    task = build_task(backbone, task_name, data, experiment.max_tokens)
    train_split, score_split = TASKS[task_name]
    rows = usable(task, task.rows(train_split))
    scored = rows[TRAINED + HELD_OUT :] if score_split is None else usable(task, task.rows(score_split))
    first = rows[: TRAINED + HELD_OUT]
    random.Random(derive_seed("widths", seed)).shuffle(first)
    return Cell(
        task=task,
        experiment=experiment,
        train=first[:TRAINED],
        held_out=first[TRAINED:],
        scored=scored[:SCORED],
    )


def usable(task: TokenizedTask, rows: list[AnyRow]) -> list[AnyRow]:
    return [row for row, fault in zip(rows, task.faults(rows), strict=True) if fault is None]


def measured(cell: Cell) -> dict[str, Any]:
    """Train a variant and score it in each of its ways: mean, draws, scaled or as an ensemble."""
    seed = cell.experiment.seed
    posterior = cell.fitted(seed)
    if isinstance(posterior, Point):
        scores = cell.scores("mle", posterior, 0)
        members = [posterior, *(cell.fitted(seed + 3 * number) for number in range(1, MEMBERS))]
        draws = [cell.predicted(member, cell.scored, 0, choosing=False).draw_log_probs for member in members]
        return {"scores": scores | {"ensemble": evaluate(cell.combined(torch.cat(draws))).as_dict()}}
    summary = posterior_summary(list(gaussian_layers(posterior.model).values()))
    scores = cell.scores("n10", posterior, DRAWS)
    found = fit_scale(posterior, cell.task, cell.held_out, seed=seed)
    scores |= cell.scores("scaled", posterior, DRAWS if found.scale else 0)
    return {"scores": scores, "scale": found.scale, "nll_by_scale": found.nll, "posterior": summary}


def record(cell: Cell) -> dict[str, Any]:
    started = time.monotonic()
    return {
        **measured(cell),
        "rows": {"train": len(cell.train), "held_out": len(cell.held_out), "scored": len(cell.scored)},
        "seconds": round(time.monotonic() - started, 1),
        "command": ["python", "benchmarks/widths.py", *map(portable, sys.argv[1:])],
        "experiment": cell.experiment.as_dict(),
        "sha256": {name: rows_sha256(getattr(cell, name)) for name in ("train", "held_out", "scored")},
        "versions": versions(),
        "hardware": hardware(),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", required=True, help="folder of the data sets")
    made.add_argument("--tasks", default=",".join(TASKS))
    made.add_argument("--variants", default=",".join(VARIANTS))
    made.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    options = made.parse_args()
    transformers.logging.set_verbosity_error()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds.split(","):
        for task in options.tasks.split(","):
            for variant in options.variants.split(","):
                file = RESULTS / f"{task}-{variant}-seed{seed}.json"
                if file.exists():
                    continue
                made_now = record(cell(task, variant, int(seed), options.data))
                write_json(file, {"task": task, "variant": variant, "seed": int(seed), **made_now})
                nll = {key: round(scores["nll"], 4) for key, scores in made_now["scores"].items()}
                print(file.name, nll, made_now.get("scale"), made_now["seconds"], flush=True)


if __name__ == "__main__":
    main()
