"""Compare a distilled adapter with its teacher: BLoB on little data, answering further rows without labels.

    python benchmarks/distil.py --data DIR --runs RUNS --cells minilm:openbookqa,smollm2:arc_easy --seeds 1,2,3

For each base model, data set and seed, trains BLoB on some rows of train; held-out rows choose the scale of its
standard deviation and its temperature. The student learns the averaged and tempered answers to the same rows and to
further ones, whose labels are removed, in as many passes as the teacher. The teacher is scored with other draws than
those that the student learns from. The rival at the student's cost is the teacher's mean with a temperature fitted on
the held-out rows. `--runs` keeps the trained runs; remove them if a setting changes. After an interruption, the same
command makes the missing records in results/distil; `benchmarks/tables.py` makes the table of docs/serving.md.
"""

import dataclasses
import random
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from decoder import write_rows
from options import parser
from pairs import header
from widths import usable

from bayestune import Prediction, evaluate, metrics
from bayestune.experiment import Experiment, load_run, run
from bayestune.experiment.backbone import build_task, find_backbone
from bayestune.experiment.record import rows_sha256
from bayestune.experiment.trained import Run
from bayestune.files import read_json, write_json
from bayestune.functional import derive_seed
from bayestune.methods import Distilled, fit_temperature

RESULTS = Path(__file__).parent.parent / "results" / "distil"


@dataclass(frozen=True, kw_only=True)
class Setup:
    """The numbers of rows on one base model, and the settings of both runs."""

    labelled: int
    held: int
    unlabelled: int
    scored: int
    passes: int
    settings: dict[str, Any]


SETUPS = {
    "minilm": Setup(
        labelled=400,
        held=100,
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
        held=40,
        unlabelled=100,
        scored=150,
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
                write_json(file, found | header("cuda" if torch.cuda.is_available() else "cpu"))
                print(name, {who: round(scores["nll"], 4) for who, scores in found["scores"].items()}, flush=True)


def record(model: str, task: str, seed: int, data: str, output: Path) -> dict[str, Any]:
    """Train teacher and student unless their runs exist, and return the scores of both."""
    setup = SETUPS[model]
    with tempfile.TemporaryDirectory() as folder:
        asked = {"model": model, "task": task, "method": "blob", "seed": seed, "draws": DRAWS, **setup.settings}
        asked |= {"data": folder, "eval": False, "steps": steps(setup, setup.labelled)}
        asked |= {"fit_split": "held", "temperature_split": "held", "eval_split": "scored"}
        teacher = Experiment.from_dict(asked, where=f"{model}:{task}")
        rows = cut(teacher, data, setup)
        write_rows(Path(folder), task, rows)
        method = Distilled(
            teacher=str(output / "teacher"),
            teacher_draws=DRAWS,
            distil_rows=str(Path(folder) / task / "unlabelled.jsonl"),
        )
        count = steps(setup, setup.labelled + setup.unlabelled)
        student = teacher.replace(method=method, temperature_split=None, steps=count)
        for name, experiment in {"teacher": teacher, "student": student}.items():
            if not (output / name / "result.json").is_file():
                run(experiment, output / name, overwrite=True, command=[], progress=True)
        taught, learned = (load_run(output / name, data=folder) for name in ("teacher", "student"))
        found = {
            "teacher": taught.predict(rows["scored"], draws=DRAWS, seed=seed, progress=True),
            "student": learned.predict(rows["scored"], draws=0),
            "mean": tempered_mean(taught, rows),
        }
    nll = {who: prediction.row_nll()[None] for who, prediction in found.items()}
    return {
        "nll_ratio": (nll["student"].mean() / nll["teacher"].mean()).item(),
        "nll_difference": {
            who: asdict(metrics.paired_interval(nll["student"], nll[who])) for who in ("teacher", "mean")
        },
        "model": model,
        "task": task,
        "seed": seed,
        "draws": DRAWS,
        "scores": {who: evaluate(prediction).as_dict() for who, prediction in found.items()},
        "temperature": taught.posterior.temperature,
        "fitted": read_json(output / "teacher" / "result.json", "a result")["fitted"],
        "rows": {name: len(several) for name, several in rows.items()},
        "sha256": {name: rows_sha256(several) for name, several in rows.items()},
        "experiment": {
            "teacher": {**teacher.as_dict(), "data": None},
            "student": {"steps": student.steps, "learning_rate": student.learning_rate},
        },
    }


def tempered_mean(taught: Run, rows: dict[str, list[Any]]) -> Prediction:
    """Return the answers of the teacher's mean, with a temperature of its own on top of the teacher's."""
    held, scored = (taught.predict(rows[name], draws=0) for name in ("held", "scored"))
    return scored.tempered(fit_temperature(held.draw_log_probs, held.labels))


def steps(setup: Setup, rows: int) -> int:
    return rows * setup.passes // setup.settings["batch_size"]


def cut(experiment: Experiment, data: str, setup: Setup) -> dict[str, list[Any]]:
    """Return the rows by use; the seed chooses which of the first rows of train have labels."""
    backbone = find_backbone(experiment.model)
    assert experiment.max_tokens is not None
    prompt = experiment.asked_prompt()
    task = build_task(backbone, experiment.task, data, experiment.max_tokens, prompt=prompt)
    train: list[Any]
    train, dev = (usable(task, task.rows(split)) for split in ("train", "dev+test"))
    first = train[: setup.labelled + setup.held + setup.unlabelled]
    random.Random(derive_seed("distil", experiment.seed)).shuffle(first)
    own, further = first[: setup.labelled + setup.held], first[setup.labelled + setup.held :]
    return {
        "train": own[: setup.labelled],
        "held": own[setup.labelled :],
        "unlabelled": [dataclasses.replace(row, answer=None) for row in further],
        "scored": dev[: setup.scored],
    }


if __name__ == "__main__":
    main()
