"""Measure whether the uncertainty of SmolLM2-135M-Instruct's answers in words separates right from wrong ones.

    python benchmarks/answers.py --data DIR --runs RUNS                 # make every missing record in results/answers
    python benchmarks/answers.py --data DIR --runs RUNS --tasks openbookqa --methods blob --seeds 1

The prompt has the question and its choices, and the answer is the text of the right choice. The model trains on 400
rows of the train split, in 300 updates of 4 rows; for BLoB, 60 further rows choose the scale of the standard
deviation. The first 150 rows of dev are answered with at most 16 new tokens: by plain LoRA, and by 5 draws of BLoB,
averaged and each draw alone. An answer is right if it is equivalent to the right one (`same="normalized"`). The seed
chooses the rows to train on, their order, the initial weights and the draws. `--runs` keeps the trained runs. After an
interruption, the same command makes the missing records.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers
from decoder import HELD_OUT, TRAINED, write_rows
from decoder import SETTINGS as CHOICES
from options import parser
from task_results import RESULTS as ALL

import bayestune as bt
from bayestune.experiment import Experiment, load_run, run
from bayestune.experiment.backbone import find_backbone
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.experiment.trained import Run
from bayestune.files import write_json
from bayestune.functional import derive_seed
from bayestune.tables.cells import portable
from bayestune.tasks import AnyRow, DatasetSpec, Row, load_rows
from bayestune.tasks.generation import GenerationTask
from bayestune.tasks.prompted import PromptRow

RESULTS = ALL / "answers"
TASKS, METHODS, SEEDS = ("arc_easy", "openbookqa"), ("mle", "blob"), (1, 2, 3)
SCORED, DRAWS, NEW_TOKENS = 150, 5, 16
SETTINGS = {name: value for name, value in CHOICES.items() if name not in ("scoring", "prompt")} | {"draws": DRAWS}
OWN: dict[str, dict[str, Any]] = {"mle": {}, "blob": {"fit_split": "held"}}


def asked(row: Row) -> PromptRow:
    """Return the question with its choices as the prompt, and the right choice as the answer."""
    assert row.answer is not None
    prompt = f"Question: {row.question}\nChoices: {'; '.join(row.choices)}\nAnswer:"
    return PromptRow(id=row.id, prompt=prompt, answer=f" {row.choices[row.answer]}")


def cut(name: str, data: str, seed: int) -> dict[str, list[PromptRow]]:
    """Return the rows by use; the seed chooses which of the first rows of the train split are trained on."""
    spec = DatasetSpec(name=words(name), folder=words(name), row=PromptRow, classes=1)
    task = GenerationTask(spec, find_backbone("smollm2").tokenizer, data=None, max_tokens=SETTINGS["max_tokens"])

    def usable(split: str, count: int) -> list[PromptRow]:
        rows = [asked(row) for row in load_rows(name, split, data) if isinstance(row, Row)]
        return [row for row, fault in zip(rows, task.faults(rows), strict=True) if fault is None][:count]

    first = usable("train", TRAINED + HELD_OUT)
    random.Random(derive_seed("answers", seed)).shuffle(first)
    return {"train": first[:TRAINED], "held": first[TRAINED:], "scored": usable("dev", SCORED)}


def words(name: str) -> str:
    return f"{name}_words"


def record(name: str, method: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a method unless its run exists, let it answer, and return the scores of the answers."""
    started = time.monotonic()
    rows = cut(name, options.data, seed)
    output = options.runs / f"{words(name)}-{method}-seed{seed}"
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), words(name), rows)
        settings = {**SETTINGS, **OWN[method], "method": method, "task": words(name), "data": folder, "seed": seed}
        experiment = Experiment.from_dict(settings, where=method)
        if not (output / "result.json").is_file():
            run(experiment.replace(eval=False), output, overwrite=True, command=[], progress=True)
        trained = load_run(output, data=folder)
        draws = trained.default_draws
        likelihood = bt.evaluate(trained.predict(rows["scored"], draws=draws, progress=True))
        answered = written(trained, rows["scored"], draws)
    result = json.loads((output / "result.json").read_text())
    only = ["--tasks", name, "--methods", method, "--seeds", str(seed)]
    return {
        **{key: result[key] for key in ("posterior_std", "fitted", "kl") if key in result},
        "task": name,
        "method": method,
        "seed": seed,
        "draws": draws,
        "likelihood": likelihood.as_dict(),
        "answers": answered,
        "rows": {use: len(several) for use, several in rows.items()},
        "sha256": {use: rows_sha256(several) for use, several in rows.items()},
        "train_seconds": result["seconds"],
        "seconds": round(time.monotonic() - started, 1),
        "command": ["python", "benchmarks/answers.py", *map(portable, ["--data", "DIR", "--runs", "RUNS", *only])],
        "experiment": {**trained.experiment.as_dict(), "data": None},
        "versions": versions(),
        "hardware": hardware(),
    }


def written(trained: Run, rows: Sequence[AnyRow], draws: int) -> dict[str, Any]:
    """Return the scores of the answers by mode of decoding, with the first five texts."""
    prompts, answers = zip(*((row.prompt, row.answer) for row in rows if isinstance(row, PromptRow)), strict=True)
    found = {}
    for mode in ("averaged", "per_draw") if draws else ("averaged",):
        made = bt.generate(
            trained.posterior,
            trained.task.tokenizer,
            list(prompts),
            draws=draws,
            mode=mode,
            max_new_tokens=NEW_TOKENS,
            progress=True,
        )
        scores = bt.answer_scores(made, list(answers)).as_dict()
        found[mode] = {**scores, "finished": sum(made.finished), "first_texts": made.texts[:5]}
    return found


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", required=True, help="folder of the data sets")
    made.add_argument("--runs", type=Path, required=True, help="folder for the trained runs")
    made.add_argument("--tasks", default=",".join(TASKS))
    made.add_argument("--methods", default=",".join(METHODS))
    made.add_argument("--seeds", default=",".join(map(str, SEEDS)))
    options = made.parse_args()
    transformers.logging.set_verbosity_error()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in options.tasks.split(","):
        for seed in map(int, options.seeds.split(",")):
            for method in options.methods.split(","):
                file = RESULTS / f"{name}-{method}-seed{seed}.json"
                if not file.exists():
                    found = record(name, method, seed, options)
                    write_json(file, found)
                    shown = {mode: round(s["exact_match"], 3) for mode, s in found["answers"].items()}
                    print(file.name, shown, found["likelihood"]["nll"], found["seconds"], flush=True)


if __name__ == "__main__":
    main()
