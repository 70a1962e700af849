"""Compare plain LoRA (MLE) and BLoB on OpenBookQA and ARC-Easy with MiniLM, with the same rows and updates per seed.

    python benchmarks/real_data.py --data DIR                       # make every missing record in results/real
    python benchmarks/real_data.py --data DIR --tune                # compare settings on rows held out from train

Trains on the train split and scores dev and test together, as `bayestune train` does with the command that each record
names. After an interruption, the same command makes the missing records. `benchmarks/tables.py` makes the tables.
"""

import argparse
import gzip
import json
import shlex
import shutil
from pathlib import Path

import transformers
from options import parser

from bayestune.experiment import Experiment, run

RESULTS = Path(__file__).parent.parent / "results"
COMMON = {"model": "minilm", "batch_size": 32, "lora_alpha": 16, "learning_rate": 2e-3, "precision": "bf16"}
# Updates: about four and eight passes over the rows, so that plain LoRA is overconfident.
STEPS = {"openbookqa": (600, 1200), "arc_easy": (600,)}
# Compared by `--tune`: the learning rate of AdamW, and the KL weights and the learning rate of G.
TUNING = {
    "mle": [{"learning_rate": rate} for rate in (2e-3, 1e-3)],
    "blob": [
        {"kl_schedule": schedule, "kl_learning_rate": rate}
        for schedule, rate in (("paper", 0.002), ("elbo", 0.03), ("paper", 0.01), ("elbo", 0.01))
    ],
}
HELD_OUT = 400


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", required=True, help="folder with openbookqa/ and arc_easy/")
    made.add_argument("--runs", default="runs/real", help="folder for the trained posteriors")
    made.add_argument("--tasks", default=",".join(STEPS))
    made.add_argument("--methods", default="mle,blob")
    made.add_argument("--seeds", default="1,2,3")
    made.add_argument("--tune", action="store_true", help="compare settings on rows cut from train, seed 0")
    options = made.parse_args()
    transformers.logging.set_verbosity_error()
    for seed in [0] if options.tune else [int(seed) for seed in options.seeds.split(",")]:
        for task in options.tasks.split(","):
            for method in options.methods.split(","):
                if options.tune:
                    tune(task, method, options)
                    continue
                for steps in STEPS[task]:
                    settings = {**COMMON, "steps": steps, "task": task, "data": options.data, "method": method}
                    settings |= {"seed": seed, "eval_split": "dev+test"}
                    cell(settings, f"{task}-{method}-steps{steps}-seed{seed}", "real", options)


def tune(task: str, method: str, options: argparse.Namespace) -> None:
    """Train on all but the last rows of train, and score those; do not read dev and test."""
    folder = Path(options.runs) / "tuning-data" / f"{task}_tuning"
    if not folder.exists():
        folder.mkdir(parents=True)
        with gzip.open(Path(options.data) / task / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        for split, part in {"train": rows[:-HELD_OUT], "held_out": rows[-HELD_OUT:]}.items():
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    for changed in TUNING[method]:
        name = "-".join([task, method, *(f"{key}{value}" for key, value in changed.items())])
        settings = {**COMMON, "steps": max(STEPS[task]), **changed, "task": folder.name, "data": str(folder.parent)}
        cell({**settings, "method": method, "eval_split": "held_out"}, name, "tuning", options)


def cell(settings: dict, name: str, group: str, options: argparse.Namespace) -> None:
    """Train and score one cell unless its record exists."""
    record = RESULTS / group / f"{name}.json"
    if record.exists():
        return
    flags = [part for key, value in settings.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    output = Path(options.runs) / group / name
    command = ["bayestune", "train", *flags, "--output", str(output)]
    print(shlex.join(command), flush=True)
    result = run(Experiment.from_dict(settings, where=name), output, overwrite=True, command=command, progress=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(output / "result.json", record)
    print(
        {
            key: {m: round(v, 4) for m, v in s.as_dict().items() if m in ("accuracy", "nll", "ece")}
            for key, s in result.scores.items()
        },
        flush=True,
    )


if __name__ == "__main__":
    main()
