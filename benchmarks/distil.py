"""Compare a distilled adapter with its teacher: BLoB on little data, answering further rows without labels.

    python benchmarks/distil.py --data DIR --runs RUNS --cells minilm:openbookqa,smollm2:arc_easy --seeds 1,2,3

For each base model, data set and seed, trains BLoB on some rows of train. The student is trained as by `bayestune
distil`, on those rows and further rows of train, whose labels it does not read, in as many passes. The teacher is
scored with other draws than those that the student learns from. `--runs` keeps the trained runs; after an
interruption, the same command makes the missing records in results/distil. In a record, "nll_ratio" is the student's
NLL divided by the teacher's, "ece_difference" the student's bias-corrected ECE minus the teacher's, and "teacher_mean"
has the scores of the teacher's mean, which also costs one forward pass.
"""

import random
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from decoder import write_rows
from options import parser
from pairs import header
from widths import usable

from bayestune import evaluate
from bayestune.experiment import Experiment, load_run, run
from bayestune.experiment.backbone import build_task, find_backbone
from bayestune.experiment.record import rows_sha256
from bayestune.files import write_json
from bayestune.functional import derive_seed
from bayestune.methods import Distilled
from bayestune.tasks import AnyRow

RESULTS = Path(__file__).parent.parent / "results" / "distil"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The numbers of rows, and the settings of the teacher, on one base model."""

    labelled: int
    unlabelled: int
    scored: int
    passes: int
    settings: dict[str, Any]


SETUPS = {
    "minilm": Setup(
        labelled=400,
        unlabelled=600,
        scored=500,
        passes=6,
        settings={
            "batch_size": 16,
            "learning_rate": 2e-3,
            "lora_alpha": 16,
            "max_tokens": 128,
            "target_modules": ["query", "value"],
        },
    ),
    "smollm2": Setup(
        labelled=200,
        unlabelled=200,
        scored=200,
        passes=3,
        settings={
            "batch_size": 4,
            "learning_rate": 1e-3,
            "lora_alpha": 16,
            "max_tokens": 160,
            "target_modules": ["q_proj", "v_proj"],
            "scoring": "text",
            "prompt": "paper",
        },
    ),
}
DRAWS = 10


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", required=True, help="folder of the data sets")
    made.add_argument("--runs", type=Path, required=True, help="folder for the trained runs")
    made.add_argument("--cells", default="minilm:openbookqa,minilm:arc_easy,smollm2:arc_easy")
    made.add_argument("--seeds", default="1")
    options = made.parse_args()
    transformers.logging.set_verbosity_error()
    for seed in map(int, options.seeds.split(",")):
        for model, task in (cell.split(":") for cell in options.cells.split(",")):
            name = f"{model}-{task}-seed{seed}"
            file = RESULTS / f"{name}.json"
            if not file.exists():
                found = record(model, task, seed, options.data, options.runs / name)
                file.parent.mkdir(parents=True, exist_ok=True)
                write_json(file, found | header("cpu"))
                print(name, {key: round(found[key], 4) for key in ("nll_ratio", "ece_difference")}, flush=True)


def record(model: str, task: str, seed: int, data: str, output: Path) -> dict[str, Any]:
    """Train teacher and student unless their runs exist, and return the scores of both."""
    setup, started = SETUPS[model], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        asked = {"model": model, "task": task, "method": "blob", "seed": seed, "draws": DRAWS, **setup.settings}
        asked |= {"data": folder, "eval": False, "eval_split": "scored", "steps": steps(setup, setup.labelled)}
        teacher = Experiment.from_dict(asked, where=f"{model}:{task}")
        rows = cut(teacher, data, setup)
        write_rows(Path(folder), task, rows)
        method = Distilled(
            teacher=str(output / "teacher"),
            teacher_draws=DRAWS,
            distil_rows=str(Path(folder) / task / "unlabelled.jsonl"),
        )
        student = teacher.replace(method=method, steps=steps(setup, setup.labelled + setup.unlabelled))
        for name, experiment in {"teacher": teacher, "student": student}.items():
            if not (output / name / "result.json").is_file():
                run(experiment, output / name, overwrite=True, command=[], progress=True)
        taught, learned = (load_run(output / name, data=folder) for name in ("teacher", "student"))
        scores = {
            "teacher": evaluate(taught.predict(rows["scored"], draws=DRAWS, seed=1, progress=True)).as_dict(),
            "teacher_mean": evaluate(taught.predict(rows["scored"], draws=0)).as_dict(),
            "student": evaluate(learned.predict(rows["scored"], draws=0)).as_dict(),
        }
    return {
        "nll_ratio": scores["student"]["nll"] / scores["teacher"]["nll"],
        "ece_difference": scores["student"]["ece_corrected"] - scores["teacher"]["ece_corrected"],
        "model": model,
        "task": task,
        "seed": seed,
        "draws": DRAWS,
        "scores": scores,
        "rows": {name: len(several) for name, several in rows.items()},
        "sha256": {name: rows_sha256(several) for name, several in rows.items()},
        "steps": {"teacher": teacher.steps, "student": student.steps},
        "seconds": round(time.monotonic() - started, 1),
    }


def steps(setup: Setup, rows: int) -> int:
    return rows * setup.passes // setup.settings["batch_size"]


def cut(experiment: Experiment, data: str, setup: Setup) -> dict[str, list[AnyRow]]:
    """Return the rows by use; the seed chooses which of the first rows of train have labels."""
    backbone = find_backbone(experiment.model)
    assert experiment.max_tokens is not None
    prompt = experiment.asked_prompt()
    task = build_task(backbone, experiment.task, data, experiment.max_tokens, prompt=prompt)
    train, dev = (usable(task, task.rows(split)) for split in ("train", "dev+test"))
    first = train[: setup.labelled + setup.unlabelled]
    random.Random(derive_seed("distil", experiment.seed)).shuffle(first)
    return {"train": first[: setup.labelled], "unlabelled": first[setup.labelled :], "scored": dev[: setup.scored]}


if __name__ == "__main__":
    main()
