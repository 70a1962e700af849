"""Preferences on real data: compare plain LoRA and BLoB on MiniLM on pairs of a right and a wrong choice of ARC-Easy.

    python benchmarks/preference.py --data DIR            # make every missing record in results/preference

The model trains on 300 questions, and 100 choose the scale of the standard deviation (`fit_scale`). The seed chooses
these questions, the wrong choice of each, the initial weights and the draws. For each of the first 300 questions of
dev and test, one pair is scored. For those with four choices, the best choice is selected by the mean reward and by
its lower bound (k = 1).
"""

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from options import parser
from widths import DRAWS, HELD_OUT, SETTINGS, TRAINED, VARIANTS, Cell, usable

from bayestune import best_of_n, evaluate, predict, rewards
from bayestune.experiment import Experiment
from bayestune.experiment.backbone import find_backbone
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.files import write_json
from bayestune.functional import derive_seed
from bayestune.methods import Point, Posterior
from bayestune.methods.scale import fit_scale
from bayestune.tables.cells import portable
from bayestune.tasks import DatasetSpec, Preference, PreferenceRow, Row, load_rows

RESULTS = Path(__file__).parent.parent / "results" / "preference"
SEEDS, SCORED, K = (1, 2, 3), 300, 1.0
METHODS = {"mle": "point", "blob": "default"}


def pair(row: Row, seed: int) -> PreferenceRow:
    """Return the pair of the right choice of a question and a wrong one that the seed chooses."""
    wrong = [choice for i, choice in enumerate(row.choices) if i != row.answer]
    assert row.answer is not None
    rejected = random.Random(derive_seed("preference", seed, row.id)).choice(wrong)
    return PreferenceRow(id=row.id, prompt=f"{row.question} ", chosen=row.choices[row.answer], rejected=rejected)


def cell(method: str, seed: int, data: str) -> tuple[Cell, list[Row]]:
    """Return the cell, and the questions of the pairs that it scores."""
    backbone = find_backbone("minilm")
    experiment = Experiment(**SETTINGS, **VARIANTS[METHODS[method]], task="arc_easy", seed=seed)
    experiment = experiment.resolved(backbone.family)
    assert experiment.max_tokens is not None
    spec = DatasetSpec(name="arc_easy_pairs", folder="arc_easy_pairs", row=PreferenceRow, classes=2)
    task = Preference(spec, backbone.tokenizer, data=None, max_tokens=experiment.max_tokens)
    first = load_rows("arc_easy", "train", data)[: TRAINED + HELD_OUT]
    random.Random(derive_seed("preference", seed)).shuffle(first)
    pairs = usable(task, [pair(row, seed) for row in first])
    questions = load_rows("arc_easy", "dev+test", data)[:SCORED]
    scored = [pair(row, seed) for row in questions]
    kept = {row.id for row in usable(task, list(scored))}
    made = Cell(
        task=task,
        experiment=experiment,
        train=pairs[:TRAINED],
        held_out=pairs[TRAINED:],
        scored=[row for row in scored if row.id in kept],
    )
    return made, [row for row in questions if row.id in kept]


def best_of_four(posterior: Posterior, task: Preference, questions: Sequence[Row], draws: int, seed: int) -> Any:
    """Return how often the best of four choices is right, by the mean reward and, with draws, by its lower bound."""
    four = [row for row in questions if len(row.choices) == 4]
    prompts = [f"{row.question} " for row in four for _ in range(4)]
    texts = [choice for row in four for choice in row.choices]
    found = rewards(posterior, task, prompts, texts, draws=draws, seed=seed, batch_size=32)
    by_question = list(zip(four, found.unflatten(1, (len(four), 4)).unbind(1), strict=True))
    ways = {"mean": 0.0, **({"lower_bound": K} if draws else {})}
    first = {way: [best_of_n(each, k=k)[0][0] for _, each in by_question] for way, k in ways.items()}
    shares = {
        way: sum(i == row.answer for i, row in zip(best, four, strict=True)) / len(four) for way, best in first.items()
    }
    changed = {"changed": sum(a != b for a, b in zip(*first.values(), strict=True))} if draws else {}
    return {**shares, **changed, "questions": len(four), "k": K}


def record(method: str, seed: int, data: str) -> dict[str, Any]:
    started = time.monotonic()
    made, questions = cell(method, seed, data)
    assert isinstance(made.task, Preference)
    posterior = made.fitted(seed)
    draws = 0 if isinstance(posterior, Point) else DRAWS
    scale = fit_scale(posterior, made.task, made.held_out, seed=seed).scale if draws else None
    prediction = predict(posterior, made.task, made.scored, draws=draws, seed=seed, batch_size=32)
    return {
        "method": method,
        "seed": seed,
        "scores": evaluate(prediction).as_dict(),
        "best_of_4": best_of_four(posterior, made.task, questions, draws, seed),
        "scale": scale,
        "rows": {"train": len(made.train), "held_out": len(made.held_out), "scored": len(made.scored)},
        "seconds": round(time.monotonic() - started, 1),
        "command": ["python", "benchmarks/preference.py", *map(portable, sys.argv[1:])],
        "experiment": made.experiment.as_dict(),
        "sha256": {name: rows_sha256(getattr(made, name)) for name in ("train", "held_out", "scored")},
        "versions": versions(),
        "hardware": hardware(),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", required=True, help="folder of the data sets")
    made.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    options = made.parse_args()
    transformers.logging.set_verbosity_error()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        for method in METHODS:
            file = RESULTS / f"arc_easy-{method}-seed{seed}.json"
            if not file.exists():
                found = record(method, seed, options.data)
                write_json(file, found)
                scores = {name: round(found["scores"][name], 4) for name in ("accuracy", "nll", "ece")}
                print(file.name, scores, found["best_of_4"], found["scale"], found["seconds"], flush=True)


if __name__ == "__main__":
    main()
