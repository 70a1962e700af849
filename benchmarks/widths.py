"""Which width of the posterior by default: five data sets, three seeds, the same rows for every rival.

    python benchmarks/widths.py --data DIR                      # every missing record in results/widths
    python benchmarks/widths.py --data DIR --tune               # rows cut from train alone, seed 0
    python benchmarks/widths.py --data DIR --tasks rte --seeds 1

MiniLM is trained on 500 rows of the train split in 300 updates of 16, about ten passes. 100 further rows, drawn by the
seed, choose the scale of the standard deviation (`fit_scale`) and the temperature of each rival (`fit_temperature`),
with draws that are not those that score. Scored are at most 1000 rows of dev and test; with `--tune` 500 further rows
of train. Each record is one training; the ensemble of seed s has the members s, s + 3 and s + 6. A killed call goes
on with the records that are missing.
"""

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from options import parser
from recipe import arguments, updates

from bayestune import BayesTrainer, evaluate, predict
from bayestune.adapters import gaussian_layers
from bayestune.experiment import Experiment
from bayestune.experiment.backbone import add_adapter, build_task, find_backbone, load_base
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.files import write_json
from bayestune.functional import derive_seed
from bayestune.methods import Point, Posterior, Variational, fit_temperature, save_posterior
from bayestune.methods.scale import fit_scale
from bayestune.tasks import AnyRow, Task, TokenizedTask
from bayestune.training.kl import posterior_summary

RESULTS = Path(__file__).parent.parent / "results" / "widths"
TASKS = {
    "openbookqa": ("train", "dev+test"),
    "arc_easy": ("train", "dev+test"),
    "arc_challenge": ("train", "dev+test"),
    "rte": ("train", "dev"),
    "boolq": ("dev", None),
}
TRAINED, HELD_OUT, TUNED, SCORED, DRAWS = 500, 100, 500, 1000, 10
SETTINGS = {
    "model": "minilm",
    "steps": 300,
    "batch_size": 16,
    "learning_rate": 2e-3,
    "lora_alpha": 16,
    "target_modules": ("query", "value"),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mle": {"method": "mle"},
    "paper": {"method": "blob", "recipe": "paper"},
    **{
        f"std-{std:g}": {"method": "blob", "kl_schedule": "uniform", "posterior_std": std}
        for std in (0.06, 0.09, 0.13)
    },
}


def rows_of(task: TokenizedTask, name: str, seed: int, tune: bool) -> tuple[list[AnyRow], list[AnyRow], list[AnyRow]]:
    """Rows to train on, to choose on, and to score; rows that the base cannot read are left out beforehand."""
    train_split, score_split = TASKS[name]
    rows = usable(task, task.rows(train_split))
    first, rest = rows[: TRAINED + HELD_OUT], rows[TRAINED + HELD_OUT :]
    scored = rest[:TUNED] if tune else rest[TUNED:] if score_split is None else task.rows(score_split)
    random.Random(derive_seed("widths", seed)).shuffle(first)
    return first[:TRAINED], first[TRAINED:], usable(task, scored)[:SCORED]


def usable(task: TokenizedTask, rows: list[AnyRow]) -> list[AnyRow]:
    return [row for row, fault in zip(rows, task.faults(rows), strict=True) if fault is None]


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", required=True)
    made.add_argument("--tasks", default=",".join(TASKS))
    made.add_argument("--variants")
    made.add_argument("--seeds", default="1,2,3")
    made.add_argument("--tune", action="store_true")
    made.add_argument("--runs", default=Path("runs/widths"), type=Path)
    options = made.parse_args()
    transformers.logging.set_verbosity_error()
    for task in options.tasks.split(","):
        seeds = [0] if options.tune else [int(seed) for seed in options.seeds.split(",")]
        names = options.variants.split(",") if options.variants else list(VARIANTS)
        for seed in seeds:
            for name in names:
                file = RESULTS / f"{'tune-' if options.tune else ''}{task}-{name}-seed{seed}.json"
                if file.exists():
                    continue
                file.parent.mkdir(parents=True, exist_ok=True)
                record = measure(task, name, seed, options)
                write_json(file, record)
                print(
                    file.name,
                    {k: round(v["nll"], 4) for k, v in record["scores"].items()},
                    record["search"],
                    flush=True,
                )


def measure(task_name: str, name: str, seed: int, options: Any) -> dict[str, Any]:
    backbone = find_backbone("minilm")
    experiment = Experiment(**SETTINGS, **VARIANTS[name], task=task_name, seed=seed).resolved(backbone.family)
    task = build_task(backbone, task_name, options.data, experiment.max_tokens)
    train, held_out, scored = rows_of(task, task_name, seed, options.tune)
    base, new = load_base(backbone, task, experiment)
    model = add_adapter(base, experiment, new=new, task_type=None)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        BayesTrainer(
            model,
            task=task,
            args=arguments(experiment, folder),
            train_rows=train,
            kl=experiment.method.kl(updates(experiment, len(train))),
        ).train()
    seconds = time.monotonic() - started
    posterior = Variational(model.eval()) if name != "mle" else Point(model.eval())
    save_posterior(posterior, options.runs / f"{task_name}-{name}-seed{seed}", overwrite=True)
    summary = posterior_summary(list(gaussian_layers(model).values()))
    scores, search = {}, None
    if name == "mle":
        scores = scored_with_temperature("n0", posterior, task, held_out, scored, 0, seed)
    else:
        scores |= scored_with_temperature("n0", posterior, task, held_out, scored, 0, seed)
        scores |= scored_with_temperature("n10", posterior, task, held_out, scored, DRAWS, seed)
        found = fit_scale(posterior, task, held_out, seed=seed)
        search = {"scale": found.scale, "nll": {f"{k:.3f}": v for k, v in found.nll.items()}}
        scores |= scored_with_temperature(
            "scaled", posterior, task, held_out, scored, DRAWS if found.scale else 0, seed
        )
    return {
        "task": task_name,
        "variant": name,
        "seed": seed,
        "scores": scores,
        "search": search,
        "posterior": summary,
        "rows": {"train": len(train), "held_out": len(held_out), "scored": len(scored)},
        "seconds": round(seconds, 1),
        "command": ["python", "benchmarks/widths.py", *sys.argv[1:]],
        "experiment": experiment.as_dict(),
        "sha256": {"train": rows_sha256(train), "held_out": rows_sha256(held_out), "scored": rows_sha256(scored)},
        "versions": versions(),
        "hardware": hardware(),
    }


def scored_with_temperature(
    key: str,
    posterior: Posterior,
    task: Task,
    held_out: Sequence[AnyRow],
    scored: Sequence[AnyRow],
    draws: int,
    seed: int,
) -> dict[str, Any]:
    """Scores without and with a temperature fitted on held-out rows, whose draws are not those that score."""
    fitted = predict(posterior, task, held_out, draws=draws, seed=derive_seed("temperature", seed))
    temperature = fit_temperature(fitted.draw_log_probs, fitted.labels)
    plain = predict(posterior, task, scored, draws=draws, seed=seed)
    warm = task.prediction(plain.draw_log_probs, scored, draws=draws, seed=seed, temperature=temperature)
    return {
        key: evaluate(plain).as_dict(),
        f"{key}_temperature": {**evaluate(warm).as_dict(), "temperature": temperature},
    }


if __name__ == "__main__":
    main()
