"""Compare methods on a real language model, SmolLM2-135M-Instruct, scored by the texts of the choices, on little data.

    python benchmarks/decoder.py --data DIR --runs RUNS              # make every missing record in results/decoder
    python benchmarks/decoder.py --data DIR --runs RUNS --task openbookqa --variants mle,blob --seeds 1
    python benchmarks/decoder.py --data DIR --runs RUNS --tune       # compare learning rates and priors
    python benchmarks/decoder.py --data DIR --cut FOLDER --seeds 1   # write the rows of a seed, for other benchmarks
    python benchmarks/decoder.py --page                              # make docs/decoder.md from the records

Trains on 400 rows of the train split, in 300 updates of 4 rows. 60 further rows of that split choose the temperatures
and, for BLoB, the scale of the standard deviation, with other draws than those that are scored. The first 200 rows of
dev are scored. `--tune` scores each setting of its grid on 100 further rows of the train split, with 4 draws and seed
0, which no comparison uses. `--runs` keeps the trained runs; methods that start from plain LoRA start from the run of
the same seed. After an interruption, the same command makes the missing records.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from decoder_page import RESULTS, ROOT, TUNING, page, picture, read_records
from options import parser
from widths import usable

from bayestune import Prediction, evaluate, metrics
from bayestune.errors import ConfigError
from bayestune.experiment import Experiment, load_run, run
from bayestune.experiment.backbone import build_task, find_backbone
from bayestune.experiment.record import hardware, row_json, rows_sha256, versions
from bayestune.experiment.trained import Run
from bayestune.files import write_json, write_text
from bayestune.functional import derive_seed
from bayestune.methods import fit_temperature
from bayestune.tables.cells import portable
from bayestune.tasks import AnyRow

TASKS = ("arc_easy", "openbookqa")
TRAINED, HELD_OUT, TUNED, SCORED, DRAWS = 400, 60, 100, 200, 10
SETTINGS: dict[str, Any] = {
    "model": "smollm2",
    "scoring": "text",
    "prompt": "paper",
    "steps": 300,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "lora_alpha": 16,
    "max_tokens": 160,
    "target_modules": ["q_proj", "v_proj"],
    "eval_split": "scored",
    "draws": DRAWS,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "mle": {"method": "mle"},
    "blob": {"method": "blob", "fit_split": "held"},
    "blob_tempered": {"method": "blob", "fit_split": "held", "temperature_split": "held"},
    "blob_wide": {"method": "blob", "prior_std": 1.0, "fit_split": "held"},
    "ivon": {"method": "ivon", "learning_rate": 0.0003},
    "blob_paper": {"method": "blob", "recipe": "paper"},
    "tfb": {"method": "tfb"},
    "laplace": {"method": "laplace"},
    "dropout": {"method": "dropout"},
    "ensemble": {"method": "ensemble"},
}
ALL_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
_TUNED: dict[str, dict[str, Any]] = {
    **{f"mle-{rate}": {"method": "mle", "learning_rate": rate} for rate in (5e-4, 1e-3, 2e-3)},
    **{
        f"blob-prior{prior}-{rate}": {"method": "blob", "prior_std": prior, "learning_rate": rate}
        for prior in (0.2, 1.0, 3.0)
        for rate in (1e-3, 2e-3)
    },
    **{f"bbb-prior{prior}-0.001": {"method": "bbb", "prior_std": prior} for prior in (0.2, 1.0)},
    **{f"ivon-{rate}": {"method": "ivon", "learning_rate": rate} for rate in (0.0001, 0.0003, 0.001, 0.003, 0.01)},
    "mle-all-layers": {"method": "mle", "target_modules": ALL_LAYERS},
    "blob-all-layers-prior0.2": {"method": "blob", "target_modules": ALL_LAYERS},
    "blob-all-layers-prior1.0": {"method": "blob", "target_modules": ALL_LAYERS, "prior_std": 1.0},
    "mle-600-updates": {"method": "mle", "steps": 600},
    "blob-600-updates-prior0.2": {"method": "blob", "steps": 600},
    "blob-600-updates-prior1.0": {"method": "blob", "steps": 600, "prior_std": 1.0},
}
GRID = {
    name: own | ({"posterior_scale": 1} if own["method"] in ("blob", "bbb") else {}) for name, own in _TUNED.items()
}


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", help="folder of the data sets")
    made.add_argument("--runs", type=Path, help="folder for the trained runs")
    made.add_argument("--cut", type=Path, help="write the rows of the first of --seeds to this folder, and stop")
    made.add_argument("--page", action="store_true", help="write the page from the records")
    made.add_argument("--tune", nargs="?", const=",".join(GRID), help="settings of the grid to score; all by default")
    made.add_argument("--task", choices=TASKS, default=TASKS[0])
    made.add_argument("--variants", default=",".join(VARIANTS))
    made.add_argument("--seeds", default="1,2,3")
    options = made.parse_args()
    if options.page:
        write_text(ROOT / "docs" / "decoder.md", page())
        picture(read_records(), ROOT / "docs" / "images" / "decoder.png")
        return
    if options.data is None or (options.runs or options.cut) is None:
        made.error("expected --data DIR and --runs DIR or --cut FOLDER, or --page")
    transformers.logging.set_verbosity_error()
    if options.cut:
        write_rows(options.cut, options.task, cut(options.task, options.data, int(options.seeds.split(",")[0])))
        return
    if options.tune:
        if options.task != TASKS[0]:
            made.error(f"--tune: found --task {options.task}, expected {TASKS[0]}, whose records the page shows")
        cells = [("tune", name, GRID[name], 0) for name in options.tune.split(",")]
    else:
        seeds, variants = map(int, options.seeds.split(",")), options.variants.split(",")
        cells = [(options.task, name, VARIANTS[name], seed) for seed in seeds for name in variants]
    for use, name, settings, seed in cells:
        file = (TUNING if options.tune else RESULTS) / f"{use}-{name}-seed{seed}.json"
        if not file.exists():
            found = record(name, settings, seed, options)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, found)
            print(file.name, {key: round(s["nll"], 4) for key, s in found["scores"].items()}, flush=True)


def record(variant: str, own: dict[str, Any], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Return the scores of a variant without and with a temperature; `trained_run` trains it."""
    task, tune = options.task, options.tune is not None
    rows = cut(task, options.data, seed, tune=tune)
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), task, rows)
        output = trained_run(variant, own, seed, options, folder)
        result = json.loads((output / "result.json").read_text())
        if result["sha256"]["train_rows"] != rows_sha256(rows["train"]):
            raise ConfigError(f"{output}: found a run on other rows, expected those of {task}; choose other --runs.")
        started = time.monotonic()
        trained = load_run(output, data=folder)
        scores = scored(trained, rows, seed)
    return {
        **{name: result[name] for name in ("posterior_std", "fitted", "kl") if name in result},
        "model": "smollm2",
        "task": task,
        "variant": variant,
        "method": trained.experiment.method.name,
        "seed": seed,
        "draws": trained.experiment.draws,
        "scores": scores,
        "rows": {name: len(several) for name, several in rows.items()},
        "sha256": {name: rows_sha256(several) for name, several in rows.items()},
        "train_seconds": result["seconds"],
        "score_seconds": round(result["seconds"] + time.monotonic() - started, 1),
        "command": ["python", "benchmarks/decoder.py", *map(portable, _command(task, variant, seed, tune))],
        "experiment": {**trained.experiment.as_dict(), "data": None, "adapter": None},
        "versions": versions(),
        "hardware": hardware(),
    }


def trained_run(variant: str, own: dict[str, Any], seed: int, options: argparse.Namespace, data: str) -> Path:
    """Return the folder of a variant's run. If it is missing, train it, and first the run that it starts from."""
    tune = options.tune is not None
    output = options.runs / f"{'tune' if tune else options.task}-{variant}-seed{seed}"
    if (output / "result.json").is_file():
        return output
    settings = {**SETTINGS, **own, "task": options.task, "data": data, "seed": seed, "draws": 4 if tune else DRAWS}
    experiment = Experiment.from_dict(settings, where=variant)
    if experiment.method.start is not None:
        first = experiment.method.start.name
        adapter = trained_run(first, VARIANTS[first], seed, options, data)
        experiment = experiment.replace(adapter=str(adapter))
    run(experiment.replace(eval=False), output, overwrite=True, command=[], progress=True)
    return output


def _command(task: str, variant: str, seed: int, tune: bool) -> list[str]:
    which = ["--tune", variant] if tune else ["--task", task, "--variants", variant, "--seeds", str(seed)]
    return ["--data", "DIR", "--runs", "RUNS", *which]


def cut(name: str, data: str, seed: int, *, tune: bool = False) -> dict[str, list[AnyRow]]:
    """Return the rows by use; the seed chooses which of the first rows of the train split are trained on."""
    backbone = find_backbone("smollm2")
    asked = Experiment.from_dict({**SETTINGS, "task": name, "method": "mle"}, where="decoder")
    task = build_task(backbone, name, data, SETTINGS["max_tokens"], prompt=asked.asked_prompt())
    rows = usable(task, task.rows("train"))
    first, further = rows[: TRAINED + HELD_OUT], rows[TRAINED + HELD_OUT :]
    random.Random(derive_seed("decoder", seed)).shuffle(first)
    scored = further[:TUNED] if tune else usable(task, task.rows("dev"))[:SCORED]
    return {"train": first[:TRAINED], "held": first[TRAINED:], "scored": scored}


def write_rows(folder: Path, task: str, rows: Mapping[str, Sequence[AnyRow]]) -> None:
    """Write the rows as splits of a data set."""
    for split, several in rows.items():
        path = folder / task / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{row_json(row)}\n" for row in several), encoding="utf-8")


def scored(trained: Run, rows: dict[str, list[AnyRow]], seed: int) -> dict[str, Any]:
    """Return the scores of the mean and of all draws, without a temperature and with one fitted on held-out rows."""
    scores = {}
    trained.posterior.temperature = 1.0  # fitted below, in the same way for all variants
    for key, draws in trained.evaluations().items():
        held = trained.predict(rows["held"], draws=draws, seed=derive_seed("decoder", seed))
        found = trained.predict(rows["scored"], draws=draws, progress=True)
        temperature = fit_temperature(held.draw_log_probs, held.labels)
        warm = _tempered(trained, found, rows["scored"], temperature)
        scores[key] = {**evaluate(found).as_dict(), "spread": _spread(found)}
        scores[f"{key}_temperature"] = {
            **evaluate(warm).as_dict(),
            "spread": _spread(warm),
            "temperature": temperature,
        }
    return scores


def _tempered(trained: Run, found: Prediction, rows: Sequence[AnyRow], temperature: float) -> Prediction:
    return trained.task.prediction(
        found.draw_log_probs, rows, draws=found.draws, seed=found.seed, temperature=temperature
    )


def _spread(found: Prediction) -> dict[str, float] | None:
    """Return what the draws do to the answers; None for the mean."""
    return asdict(metrics.spread(found.draw_log_probs)) if found.draws > 1 else None


if __name__ == "__main__":
    main()
