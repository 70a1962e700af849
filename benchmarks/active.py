"""Active learning: compare the scores that choose which rows to label, from 10 labeled rows to 210.

    python benchmarks/active.py --data DIR                      # make every missing record in results/active
    python benchmarks/active.py --data DIR --tasks openbookqa --seeds 1 --scores random
    python benchmarks/active.py --page                          # make docs/active.md and its picture; train nothing

MiniLM starts from 10 labeled rows. In each of 20 rounds, BLoB is trained on the labeled rows from the base model (a
cold start), scored on at most 300 rows of dev and test, and used to choose 10 more rows from a pool of at most 500:
by mutual information, by the entropy of the predictive, or at random. The last training uses all 210 rows. For each
seed, all scores have the same first rows, pool, initial weights and draws. Rows are chosen with other draws than those
that are scored. After an interruption, the same command makes the missing records.

This benchmark was not run yet. Estimated from two small rounds, the 18 records of two data sets and three seeds take
19 core hours.
"""

import dataclasses
import random
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import transformers
from options import parser, positive
from over_seeds import spread
from widths import SETTINGS, TASKS, Cell, usable

from bayestune import evaluate
from bayestune.experiment import Experiment
from bayestune.experiment.backbone import build_task, find_backbone
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.files import read_json, write_json, write_text
from bayestune.functional import derive_seed
from bayestune.inference import acquire
from bayestune.inference.acquire import ACQUISITIONS
from bayestune.methods import Posterior
from bayestune.tables.cells import portable
from bayestune.tasks import AnyRow

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "active"
START, ROUNDS, PER_ROUND, POOL, SCORED, DRAWS, UPDATES = 10, 20, 10, 500, 300, 5, 60
DATA_SETS, SEEDS = ("openbookqa", "arc_easy"), (1, 2, 3)
LABELS = {"mutual_information": "mutual information", "entropy": "entropy", "random": "random"}
METRICS = {"accuracy": "accuracy", "nll": "NLL, nats"}


def cell(task_name: str, seed: int, data: str) -> Cell:
    """Return the first rows (`train`), the pool (`held_out`) and the scored rows, without rows that are too long."""
    backbone = find_backbone("minilm")
    settings = {**SETTINGS, "steps": UPDATES, "method": "blob", "task": task_name, "seed": seed}
    experiment = Experiment(**settings).resolved(backbone.family)
    assert experiment.max_tokens is not None
    task = build_task(backbone, task_name, data, experiment.max_tokens)
    train_split, score_split = TASKS[task_name]
    assert score_split is not None
    rows = usable(task, task.rows(train_split))
    random.Random(derive_seed("active", seed)).shuffle(rows)
    return Cell(
        task=task,
        experiment=experiment,
        train=rows[:START],
        held_out=rows[START : START + POOL],
        scored=usable(task, task.rows(score_split))[:SCORED],
    )


def rounds(cell: Cell, score: str, count: int) -> list[dict[str, Any]]:
    """Train, score and choose rows `count` times, then train and score once more; return the record of each round."""
    seed, made = cell.experiment.seed, []
    for number in range(count + 1):
        posterior = cell.fitted(seed)
        scores = evaluate(cell.predicted(posterior, cell.scored, DRAWS, choosing=False)).as_dict()
        chosen = _chosen(cell, posterior, score, derive_seed("active", seed, number)) if number < count else {}
        made.append({"rows": len(cell.train), "scores": scores, "chosen": list(chosen)})
        left = [row for row in cell.held_out if row.id not in chosen]
        cell = dataclasses.replace(cell, train=[*cell.train, *chosen.values()], held_out=left)
    return made


def _chosen(cell: Cell, posterior: Posterior, score: str, seed: int) -> dict[str, AnyRow]:
    """Return rows of the pool by id, best first. A random choice needs no draws."""
    pool = {row.id: row for row in cell.held_out}
    prediction = cell.predicted(posterior, cell.held_out, 0 if score == "random" else DRAWS, choosing=True)
    return {row: pool[row] for row, _ in acquire([prediction], PER_ROUND, score=score, seed=seed)}


def record(cell: Cell, score: str, count: int) -> dict[str, Any]:
    started = time.monotonic()
    return {
        "rounds": rounds(cell, score, count),
        "rows": {"start": len(cell.train), "pool": len(cell.held_out), "scored": len(cell.scored)},
        "per_round": PER_ROUND,
        "draws": DRAWS,
        "seconds": round(time.monotonic() - started, 1),
        "command": ["python", "benchmarks/active.py", *map(portable, sys.argv[1:])],
        "experiment": cell.experiment.as_dict(),
        "sha256": {name: rows_sha256(getattr(cell, name)) for name in ("train", "held_out", "scored")},
        "versions": versions(),
        "hardware": hardware(),
    }


Curves = dict[str, dict[int, list[dict[str, Any]]]]
"""The rounds on one data set, by score and seed."""


def curves(folder: Path) -> dict[str, Curves]:
    """Return, by data set, the records of the seeds that have all scores."""
    found: dict[str, Curves] = {}
    for made in (read_json(path, "a record") for path in sorted(folder.glob("*.json"))):
        found.setdefault(made["task"], {}).setdefault(made["score"], {})[made["seed"]] = made["rounds"]
    whole = {}
    for task, by_score in found.items():
        seeds = set.intersection(*(set(by_score.get(score, {})) for score in ACQUISITIONS))
        if seeds:
            whole[task] = {score: {seed: by_score[score][seed] for seed in sorted(seeds)} for score in ACQUISITIONS}
    return whole


def page(whole: Mapping[str, Curves]) -> str:
    """Return the page as Markdown."""
    parts = [INTRODUCTION]
    for task, by_score in whole.items():
        seeds = sorted(by_score["random"])
        parts += [f"## {task}, seeds {', '.join(map(str, seeds))}\n"]
        last = by_score["random"][seeds[0]][-1]["rows"]
        heads = [f"{name} at {last} rows" for name in METRICS.values()]
        parts += [f"| chosen by | {' | '.join(heads)} | mean accuracy of all rounds | minus random's, by seed |"]
        parts += ["|---|---|---|---|---|"]
        control = {seed: _mean_accuracy(made) for seed, made in by_score["random"].items()}
        for score, by_seed in by_score.items():
            ends = [spread([made[-1]["scores"][name] for made in by_seed.values()]) for name in METRICS]
            means = {seed: _mean_accuracy(made) for seed, made in by_seed.items()}
            less = "-" if score == "random" else ", ".join(f"{means[seed] - control[seed]:+.3f}" for seed in seeds)
            parts += [f"| {LABELS[score]} | {' | '.join(ends)} | {spread(means.values())} | {less} |"]
        parts += [""]
    return "\n".join(parts)


def _mean_accuracy(made: list[dict[str, Any]]) -> float:
    return statistics.mean(one["scores"]["accuracy"] for one in made)


def plot(whole: Mapping[str, Curves], path: Path) -> None:
    """Plot each metric against the number of labeled rows: mean over seeds, and the range of the seeds as a band."""
    figure, axes = plt.subplots(
        len(METRICS), len(whole), figsize=(4.5 * len(whole), 6), layout="constrained", sharex=True, squeeze=False
    )
    for column, (task, by_score) in enumerate(whole.items()):
        for row, (name, label) in enumerate(METRICS.items()):
            axis = axes[row][column]
            for score, by_seed in by_score.items():
                values = [[one["scores"][name] for one in made] for made in by_seed.values()]
                rows = [one["rows"] for one in next(iter(by_seed.values()))]
                by_round = list(zip(*values, strict=True))
                [line] = axis.plot(rows, list(map(statistics.mean, by_round)), label=LABELS[score])
                ends = list(map(min, by_round)), list(map(max, by_round))
                axis.fill_between(rows, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
            axis.grid(color="0.92")
            if row == 0:
                axis.set_title(task)
            if column == 0:
                axis.set_ylabel(label)
        axes[-1][column].set_xlabel("labeled rows")
    axes[0][0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


INTRODUCTION = f"""# Active learning: which rows to label

This page compares the scores that choose which rows to label next. `python benchmarks/active.py --page` makes it from
the records in `results/active`: one per data set, score and seed, with its command.

MiniLM starts from {START} labeled rows. In each of {ROUNDS} rounds, {PER_ROUND} rows of a pool of at most {POOL:,} are
chosen by one score and labeled, and BLoB is trained again from the base model on all labeled rows, always in {UPDATES}
updates of {SETTINGS["batch_size"]} rows. At most {SCORED} rows of dev and test are scored with {DRAWS} draws. For each
seed, all scores have the same first rows, pool, initial weights and draws. Rows are chosen with other draws than those
that are scored. The posterior has its default std; there are too few rows to choose its scale on held-out ones.
Numbers are means, with the standard deviation over seeds if there are several.

![Accuracy and NLL by the number of labeled rows; lines are means over seeds, bands their range.](images/active.png)
"""


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", help="folder of the data sets")
    made.add_argument("--page", action="store_true", help="write docs/active.md and its picture from the records")
    made.add_argument("--tasks", default=",".join(DATA_SETS))
    made.add_argument("--scores", default=",".join(ACQUISITIONS))
    made.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    made.add_argument("--rounds", type=positive, default=ROUNDS)
    made.add_argument("--results", type=Path, default=RESULTS)
    made.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder for the page and images/active.png")
    options = made.parse_args()
    if options.page:
        whole = curves(options.results)
        if not whole:
            made.error(f"found no seed with all scores in {options.results}, expected one to make the page from")
        plot(whole, options.docs / "images" / "active.png")
        write_text(options.docs / "active.md", page(whole))
        return
    if options.data is None:
        made.error("expected --data DIR or --page")
    if options.rounds != ROUNDS and options.results == RESULTS:
        made.error(f"--rounds: found {options.rounds}, expected {ROUNDS} for the page, or another --results")
    unknown = set(options.scores.split(",")) - set(ACQUISITIONS)
    if unknown:
        made.error(f"--scores: found {min(unknown)}, expected some of {', '.join(ACQUISITIONS)}")
    transformers.logging.set_verbosity_error()
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds.split(","):
        for task in options.tasks.split(","):
            for score in options.scores.split(","):
                file = options.results / f"{task}-{score}-seed{seed}.json"
                if file.exists():
                    continue
                found = record(cell(task, int(seed), options.data), score, options.rounds)
                write_json(file, {"task": task, "score": score, "seed": int(seed), **found})
                accuracies = [round(one["scores"]["accuracy"], 3) for one in found["rounds"]]
                print(file.name, accuracies, found["seconds"], flush=True)


if __name__ == "__main__":
    main()
