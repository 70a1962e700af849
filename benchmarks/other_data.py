"""Measure which scores separate other data from a run's own: entropy, distance to training rows, disagreement, length.

    python benchmarks/other_data.py --data DIR --run RUN --name smollm2-blob    # make a record in results/other_data
    python benchmarks/other_data.py --page                                      # make docs/other_data.md from records

RUN is the folder of a run on ARC-Easy or OpenBookQA; for a teacher of distil.py add --split dev. The first 200
usable rows of its evaluation split are compared with the first 100 of each other data set. For a causal model with
draws, one more score is the mutual information of the draws, averaged over the tokens of the prompt.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from options import parser
from widths import usable

from bayestune import metrics
from bayestune.errors import DrawError
from bayestune.experiment import Run, detection, load_run, novelty_of, other_task
from bayestune.experiment.detection import DETECTORS
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.files import read_json, write_json, write_text
from bayestune.inference import features, prompt_information
from bayestune.sampling import Point
from bayestune.tables.cells import portable
from bayestune.tasks import Row, TokenizedTask
from bayestune.tasks.causal import CausalChoice

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "other_data"
OTHERS = (
    "openbookqa:test",
    "arc_challenge:test",
    "mmlu_high_school_chemistry:test",
    "mmlu_high_school_physics:test",
    "mmlu_college_chemistry:test",
    "mmlu_college_physics:test",
)
OWN_ROWS, OTHER_ROWS = 200, 100
PROMPT = "auroc_prompt_information"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", help="folder of the data sets")
    made.add_argument("--run", type=Path, help="folder of the run")
    made.add_argument("--name", help="name of the record")
    made.add_argument("--split", help="rows of the run's data set; default: its evaluation split")
    made.add_argument("--page", action="store_true", help="write the page from the records")
    options = made.parse_args()
    if options.page:
        write_text(ROOT / "docs" / "other_data.md", page())
        return
    if None in (options.data, options.run, options.name):
        made.error("expected --data, --run and --name, or --page")
    RESULTS.mkdir(parents=True, exist_ok=True)
    write_json(RESULTS / f"{options.name}.json", record(options))


def record(options: argparse.Namespace) -> dict[str, Any]:
    """Return how well each score separates the rows of each other data set from the run's own."""
    started = time.monotonic()
    trained = load_run(options.run, data=options.data)
    task = trained.task
    if trained.posterior.known is None:
        known = usable(task, task.rows(trained.experiment.train_split))
        trained.posterior.known = features(trained.posterior, task, known[:1000])
    own = first_rows(task, options.split or str(trained.experiment.eval_split), OWN_ROWS)
    prediction = trained.predict(own, draws=trained.default_draws, progress=True)
    information, far = informed(trained, task, own), novelty_of(trained, task, own)
    others = {}
    for name in OTHERS:
        dataset, _, split = name.partition(":")
        if dataset == task.name:
            continue
        other = other_task(trained, dataset)
        rows = first_rows(other, split, OTHER_ROWS)
        others[name] = detection(trained, prediction, own, other, rows, known_novelty=far)
        others[name]["sha256"] = rows_sha256(rows)
        if information is not None:
            there = informed(trained, other, rows)
            assert there is not None
            both = torch.cat([information, there])
            others[name][PROMPT] = metrics.auroc(both, torch.tensor([False] * len(own) + [True] * len(rows)))
        found = {key: value for key, value in others[name].items() if key.startswith("auroc") and value is not None}
        print(name, {key: round(value, 3) for key, value in found.items()}, flush=True)
    return {
        "model": trained.experiment.model,
        "task": task.name,
        "method": trained.experiment.method.name,
        "seed": trained.experiment.seed,
        "draws": prediction.draws,
        "rows": len(own),
        "sha256": rows_sha256(own),
        "others": others,
        "seconds": round(time.monotonic() - started, 1),
        "command": ["python", "benchmarks/other_data.py", *map(portable, _command(options))],
        "experiment": {**trained.experiment.as_dict(), "data": None, "adapter": None},
        "versions": versions(),
        "hardware": hardware(),
    }


def _command(options: argparse.Namespace) -> list[str]:
    split = ["--split", options.split] if options.split else []
    return ["--data", "DIR", "--run", "RUN", "--name", options.name, *split]


def first_rows(task: TokenizedTask, split: str, count: int) -> list[Row]:
    """Return the first `count` rows of a split that the task can use."""
    return [row for row in usable(task, task.rows(split))[:count] if isinstance(row, Row)]


def informed(trained: Run, task: TokenizedTask, rows: Sequence[Row]) -> torch.Tensor | None:
    """Return `prompt_information` of each row; None if the model reads no prompt or the posterior draws no weights."""
    if not isinstance(task, CausalChoice) or isinstance(trained.posterior, Point):
        return None
    try:
        return prompt_information(trained.posterior, task, rows, draws=trained.default_draws, progress=True)
    except DrawError:
        return None


def page() -> str:
    """Return the page as Markdown."""
    headings = {**DETECTORS, PROMPT: "information of the prompt's tokens"}
    parts = [INTRODUCTION]
    for path in sorted(RESULTS.glob("*.json")):
        made = read_json(path, "a record")
        run, own = made["experiment"], made["task"]
        parts.append(
            f"\n## {path.stem}\n\nTrained in {run['steps']} updates of {run['batch_size']} rows of {own} with seed "
            f"{made['seed']}. {made['rows']} other rows of {own} against {OTHER_ROWS} of each data set (or all), "
            f"with {made['draws']} draws; each cell is an AUROC.\n"
        )
        parts += [f"| | {' | '.join(made['others'])} |", "|---" * (len(made["others"]) + 1) + "|"]
        for key, heading in headings.items():
            values = [found.get(key) for found in made["others"].values()]
            if any(value is not None for value in values):
                cells = ["" if value is None else f"{value:.3f}" for value in values]
                parts.append(f"| {heading} | {' | '.join(cells)} |")
    return "\n".join(parts) + "\n"


INTRODUCTION = """# Other data

This page shows how well a score separates the rows of other data sets from those of the data set that a run was
trained on. `python benchmarks/other_data.py --page` makes it from the records in `results/other_data`.

The AUROC is the probability that a row of the other data has a higher score than a row of the run's own data set;
0.5 is chance. **Below 0.5, the score is lower on the other data.** The mutual information of the draws
("epistemic") measures how much the draws disagree about an answer; it is not designed to detect other data. Compare
every score with the length of the question, which needs no model and can separate two data sets by itself.

Of each model one run was measured. On MiniLM, total uncertainty separates the data sets of MMLU from OpenBookQA, but
on two of five data sets the length of the question separates better. On SmolLM2, scored by the texts of the choices,
total uncertainty has AUROCs of 0.47 to 0.59. There the distance to the training rows and the information of the
prompt's tokens separate MMLU in part, and ARC-Challenge and OpenBookQA not at all.
"""


if __name__ == "__main__":
    main()
