"""Regression on real text: compare plain LoRA, an ensemble and BLoB on the readability of questions.

    python benchmarks/regression.py --data DIR [--seeds 1,2,3]    # make every missing record in results/regression

The target is the Flesch-Kincaid grade of the text of an ARC-Easy question, 0.39 x words per sentence + 11.8 x
syllables per word - 15.59. It stands for the US school year whose students should be able to read the text. The grade
is a formula, not a human judgment: a model that counts well could predict it without error. It is computed by
`textstat` 0.7.3, which counts syllables with the hyphenation of `pyphen`.

MiniLM is trained on 300 rows in 120 updates of 16. 100 further rows choose the scale of BLoB's standard deviation
(`fit_scale`) and the temperatures, with other draws than those that are scored; 500 rows of dev and test are scored.
The seed chooses the rows to train on, their order, the initial weights and the draws.
"""

import dataclasses
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from options import parser
from widths import DRAWS, HELD_OUT, MEMBERS, SCORED, SETTINGS, TRAINED, Cell, usable

from bayestune import evaluate
from bayestune.experiment import Experiment
from bayestune.experiment.backbone import build_task, find_backbone
from bayestune.experiment.record import hardware, row_json, rows_sha256, versions
from bayestune.files import write_json, write_text
from bayestune.functional import derive_seed
from bayestune.methods import Posterior, temperature_of
from bayestune.methods.scale import fit_scale
from bayestune.metrics import split_conformal_intervals
from bayestune.tables.cells import portable
from bayestune.tasks import NumberRow, RegressionPrediction, load_rows
from bayestune.tasks.data import check_together

RESULTS = Path(__file__).parent.parent / "results" / "regression"


def graded(split: str, data: str) -> list[NumberRow]:
    """Return the questions of a split of ARC-Easy with their grades."""
    import textstat  # pyright: ignore[reportMissingImports]

    rows = [
        NumberRow(id=row.id, text=row.question, target=float(textstat.flesch_kincaid_grade(row.question)))
        for row in load_rows("arc_easy", split, data)
    ]
    check_together(rows)
    return rows


def cell(method: str, seed: int, splits: dict[str, list[NumberRow]], folder: Path) -> Cell:
    backbone = find_backbone("minilm")
    experiment = Experiment(**SETTINGS | {"method": method, "task": "grades", "seed": seed}).resolved(backbone.family)
    assert experiment.max_tokens is not None
    for split, rows in splits.items():
        (folder / "grades").mkdir(exist_ok=True)
        write_text(folder / "grades" / f"{split}.jsonl", "".join(f"{row_json(row)}\n" for row in rows))
    task = build_task(backbone, "grades", folder, experiment.max_tokens)
    train, held_out, scored = (usable(task, task.rows(split)) for split in splits)
    return Cell(task=task, experiment=experiment, train=train, held_out=held_out, scored=scored)


def predicted(
    cell: Cell, posterior: Posterior, rows: list[Any], draws: int, *, choosing: bool
) -> RegressionPrediction:
    found: Any = cell.predicted(posterior, rows, draws, choosing=choosing)
    assert isinstance(found, RegressionPrediction)
    return found


def scores(cell: Cell, key: str, posterior: Posterior, draws: int) -> dict[str, Any]:
    """Return scores without and with a temperature, and of conformal intervals calibrated on half the scored rows."""
    plain = predicted(cell, posterior, cell.scored, draws, choosing=False)
    temperature = temperature_of(predicted(cell, posterior, cell.held_out, draws, choosing=True))
    assert plain.targets is not None
    mean, target, std = (values[:, 0] for values in (plain.mean, plain.targets, plain.total.sqrt()))
    return {
        key: evaluate(plain).as_dict(),
        f"{key}_temperature": {**evaluate(plain.tempered(temperature)).as_dict(), "temperature": temperature},
        f"{key}_conformal": dataclasses.asdict(split_conformal_intervals(mean, target, std)),
        f"{key}_conformal_absolute": dataclasses.asdict(split_conformal_intervals(mean, target)),
    }


def ensemble(cell: Cell, members: list[Posterior]) -> RegressionPrediction:
    found = [predicted(cell, member, cell.scored, 0, choosing=False) for member in members]
    parts = {name: torch.cat([getattr(each, name) for each in found]) for name in ("draw_means", "draw_variances")}
    return dataclasses.replace(found[0], **parts, draws=len(found))


def measured(point: Cell, blob: Cell) -> dict[str, Any]:
    """Train and score plain LoRA, the ensemble and BLoB with the seed of the cells."""
    seed = point.experiment.seed
    members = [point.fitted(seed + 3 * number) for number in range(MEMBERS)]
    found = scores(point, "mle", members[0], 0)
    found["ensemble"] = evaluate(ensemble(point, members)).as_dict()
    posterior = blob.fitted(seed)
    search = fit_scale(posterior, blob.task, blob.held_out, seed=seed)
    found |= scores(blob, "blob", posterior, DRAWS if search.scale else 0)
    found["blob_mean"] = evaluate(predicted(blob, posterior, blob.scored, 0, choosing=False)).as_dict()
    return {"scores": found, "scale": search.scale, "nll_by_scale": search.nll}


def record(seed: int, data: str) -> dict[str, Any]:
    started = time.monotonic()
    known, new = graded("train", data), graded("dev+test", data)
    random.Random(derive_seed("regression", seed)).shuffle(known)
    splits = {"train": known[:TRAINED], "held": known[TRAINED : TRAINED + HELD_OUT], "test": new[:SCORED]}
    with tempfile.TemporaryDirectory() as folder:
        point, blob = (cell(method, seed, splits, Path(folder)) for method in ("mle", "blob"))
    return {
        **measured(point, blob),
        "rows": {split: len(rows) for split, rows in splits.items()},
        "target_std": torch.tensor([row.target for row in splits["test"]], dtype=torch.float64).std().item(),
        "seconds": round(time.monotonic() - started, 1),
        "command": ["python", "benchmarks/regression.py", *map(portable, sys.argv[1:])],
        "experiments": [each.experiment.as_dict() | {"data": None} for each in (point, blob)],
        "sha256": {split: rows_sha256(rows) for split, rows in splits.items()},
        "versions": versions(),
        "hardware": hardware(),
    }


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--data", required=True, help="folder of the data sets")
    made.add_argument("--seeds", default="1,2,3")
    options = made.parse_args()
    transformers.logging.set_verbosity_error()
    RESULTS.mkdir(parents=True, exist_ok=True)
    for seed in map(int, options.seeds.split(",")):
        file = RESULTS / f"minilm-seed{seed}.json"
        if not file.exists():
            made_now = record(seed, options.data)
            write_json(file, {"task": "flesch_kincaid_grade", "seed": seed, **made_now})
            shown = {key: round(found["nll"], 4) for key, found in made_now["scores"].items() if "nll" in found}
            print(file.name, shown, made_now["scale"], made_now["seconds"], flush=True)


if __name__ == "__main__":
    main()
