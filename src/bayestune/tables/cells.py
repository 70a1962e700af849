"""Cells: the scores of one trained run on one data set, as one JSON file with everything that tables and reports need.

A cell is named by (table, method, task, eval_task, seed, draws): a run of `method` trained on `task` with `seed`, and
evaluated on `eval_task` with `draws` draws. Its fields are `bayestune.tables.fields.CellFields`.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune import metrics
from bayestune.errors import ConfigError, DataError
from bayestune.experiment.settings import methods_with
from bayestune.files import read_json
from bayestune.inference import Prediction, evaluate
from bayestune.tables.fields import (
    ALPHA,
    BINS,
    COVERAGES,
    HISTOGRAM_BINS,
    HISTOGRAM_ENDS,
    KEY,
    TARGETS,
    Cell,
    check_cell,
)
from bayestune.tasks.rows import shown

SHARED = ("steps", "batch_size", "rank", "lora_alpha", "target_modules", "max_tokens", "precision", "train_split")
"""Settings that must be the same for all methods of a table on one training set."""

OWN = (
    *("seed", "data", "draws", "method", "task", "eval_split", "model", "adapter", "report_to"),
    *("checkpoint_steps", "activation_checkpointing"),
)
"""Settings that may differ between a method's cells: they are recorded elsewhere in the cell, or do not affect it."""


def cell_record(
    prediction: Prediction,
    *,
    table: str,
    method: str,
    task: str,
    seed: int,
    known: Prediction | None = None,
    **provenance: Any,
) -> Cell:
    """Make the cell of a prediction.

    Args:
        prediction: predictions for `prediction.task`.
        table, method: names of the table and of the line.
        task, seed: training set and seed of the run.
        known: predictions of the same run for `task`, with the same draws. Required if `prediction` is for a
            different task, and ignored otherwise.
        provenance: how the run was made: the remaining fields of a cell. Absolute paths in `experiment` and `command`
            are cut to their last part.

    Raises:
        DataError: a row has no label, or its label has probability zero.
        ConfigError: `known` is missing or has different draws, or a value is not allowed in a cell.
    """
    scores, labels = evaluate(prediction, bins=BINS), prediction.labels
    assert labels is not None  # checked by `evaluate`
    if scores.nll == math.inf:
        rows = metrics.impossible_labels(prediction.log_probs, labels)
        raise DataError(f"cell: found {rows} rows whose label has probability 0, expected a finite NLL.")
    record: Cell = dict(zip(KEY, (table, task, prediction.task, method, prediction.draws, seed), strict=True))
    record |= {name: getattr(scores, name) for name in ("accuracy", "nll", "ece", "brier", "rows")}
    record |= {"intervals": {name: list(scores.intervals[name]) for name in ("accuracy", "nll", "ece", "brier")}}
    record |= {**_curves(prediction, labels), "uncertainty": _histograms(prediction)}
    record |= {"row_scores": _row_scores(prediction, labels), **provenance}
    record["command"] = [portable(part) for part in provenance["command"]]
    record["experiment"] = {name: portable(value) for name, value in provenance["experiment"].items()}
    if prediction.task != task:
        if known is None or (known.task, known.draws) != (task, prediction.draws):
            found = "none" if known is None else f"predictions for {known.task!r} with {known.draws} draws"
            raise ConfigError(
                f"cell: known is {found}, expected predictions for {task!r} with {prediction.draws} draws."
            )
        record["detection"] = _detection(prediction, known)
        record["in_distribution"] = {"rows": len(known.ids), "uncertainty": _histograms(known)}
    check_cell(record, where="cell")
    return record


def cell_path(results: str | Path, record: Cell) -> Path:
    """Return where a cell goes: `results/<table>/<task>/<eval_task>/<method>_n<draws>_seed<seed>.json`."""
    table, task, eval_task, method, draws, seed = (record[name] for name in KEY)
    return Path(results) / table / task / eval_task / f"{method}_n{draws}_seed{seed}.json"


def read_cells(*folders: str | Path) -> list[Cell]:
    """Read and check all cells (.json files) under `folders`, sorted by `KEY`.

    Cells must be comparable. Within a table, they share the model. Within a (table, task), they share the training
    rows and the settings in `SHARED`. Within a (table, eval_task), they share the evaluated rows. Within a (table,
    task, method), they share all settings except `OWN`.

    Raises:
        ConfigError: a folder is missing or empty, a file is not a cell, or two cells are the same or not comparable;
            names the file and the field.
    """
    cells: dict[tuple[Any, ...], tuple[Cell, Path]] = {}
    seen: dict[tuple[str, ...], tuple[Any, Path]] = {}
    for path in [path for folder in folders for path in _files(Path(folder))]:
        cell = read_json(path, "a cell of a table")
        if "table" not in cell:
            raise ConfigError(
                f"{path}: found no field 'table', expected only cells of a table here, as in results/table1; the "
                "folder of a run or of a demo is not one."
            )
        check_cell(cell, where=str(path))
        key = tuple(cell[name] for name in KEY)
        if key in cells:
            raise ConfigError(f"{path}: the same {', '.join(KEY)} as {cells[key][1]}; remove one of them.")
        cells[key] = cell, path
        for group, field, value in _agreements(cell):
            before, place = seen.setdefault((*group, field), (value, path))
            if value != before:
                raise ConfigError(
                    f"{path}: field {field}: found {shown(value)}, expected {shown(before)} as in {place}: cells with "
                    "a different configuration belong in a different folder."
                )
    return [cells[key][0] for key in sorted(cells)]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder, expected one with cells (.json).")
    found = sorted(folder.rglob("*.json"), key=lambda path: path.relative_to(folder).parts)
    if not found:
        raise ConfigError(f"{folder}: found no .json file, expected cells.")
    return found


def _agreements(cell: Cell) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Yield (group, field, value): all cells of a group must have the same value."""
    table, task, eval_task, method = (cell[name] for name in ("table", "task", "eval_task", "method"))
    settings, hashes = cell["experiment"], cell["sha256"]
    training, scored, line = (table, "task", task), (table, "eval_task", eval_task), (table, "method", task, method)
    yield (table,), "experiment.model", settings["model"]
    yield (table,), "sha256.base", hashes.get("base")
    yield training, "sha256.train_rows", hashes["train_rows"]
    yield training, "train_rows", cell["train_rows"]
    yield scored, "sha256.eval_rows", hashes["eval_rows"]
    yield scored, "rows", cell["rows"]
    yield line, "steps", cell["steps"]
    for name, value in settings.items():
        if "method" in settings and methods_with(name) and settings["method"] not in methods_with(name):
            continue  # of no effect on this method
        if name in SHARED:
            yield training, f"experiment.{name}", value
        elif name not in OWN:
            yield line, f"experiment.{name}", value


def _uncertainties(prediction: Prediction) -> dict[str, Tensor]:
    """Return, per row, the entropies in nats and the probability of the answer."""
    return {"total": prediction.total, "epistemic": prediction.epistemic, "max_prob": prediction.probs.amax(-1)}


def _curves(prediction: Prediction, labels: Tensor) -> dict[str, Any]:
    """Return reliability, risk-coverage curve, its area, the thresholds for the target errors, and prediction sets."""
    bins = metrics.reliability_bins(prediction.log_probs, labels, bins=BINS)
    confidence, correct = prediction.probs.amax(-1), prediction.answer == labels
    coverage, risk = metrics.risk_coverage(confidence, correct)
    # The points where the coverage first reaches k %, without repeats.
    grid = torch.arange(1, COVERAGES + 1, dtype=torch.float64) / COVERAGES
    points = torch.searchsorted(coverage, grid).unique()
    thresholds = [metrics.threshold_for_error(confidence, correct, target) for target in TARGETS]
    means = {"confidence": _rounded(bins.confidence), "accuracy": _rounded(bins.accuracy)}
    return {
        "reliability": {"counts": bins.counts.tolist(), **means},
        "aurc": metrics.aurc(confidence, correct),
        "risk_coverage": {"coverage": _rounded(coverage[points]), "risk": _rounded(risk[points])},
        "selective": [{**vars(found), "interval": list(found.interval)} for found in thresholds],
        "conformal": _prediction_sets(prediction, labels),
    }


def _row_scores(prediction: Prediction, labels: Tensor) -> dict[str, list[Any]]:
    """Return the scores of each row, which pair the cells of two methods."""
    log_probs = prediction.log_probs
    return {
        "nll": _rounded(metrics.row_nll(log_probs, labels)),
        "correct": metrics.row_accuracy(log_probs, labels).int().tolist(),
    }


def _prediction_sets(prediction: Prediction, labels: Tensor) -> dict[str, Any] | None:
    """Return the scores of the sets by each conformal score, or None if half of the rows are too few to calibrate."""
    if len(labels) // 2 < metrics.smallest_calibration(ALPHA):
        return None
    log_probs = prediction.log_probs
    return {name: vars(metrics.split_conformal(log_probs, labels, alpha=ALPHA, score=name)) for name in ("lac", "aps")}


def _histograms(prediction: Prediction) -> dict[str, Any]:
    found = {}
    for name, values in _uncertainties(prediction).items():
        end = HISTOGRAM_ENDS[name]
        where = (values / end * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
        found[name] = {"end": end, "counts": torch.bincount(where, minlength=HISTOGRAM_BINS).tolist()}
    return found


def _detection(prediction: Prediction, known: Prediction) -> dict[str, dict[str, float]]:
    """Return AUROC and average precision for separating the rows of `prediction` from those of `known`."""
    positive = torch.tensor([False] * len(known.ids) + [True] * len(prediction.ids))
    ours, others = _uncertainties(known), _uncertainties(prediction)
    found = {}
    for name in HISTOGRAM_ENDS:
        scores = torch.cat([ours[name], others[name]])
        if name == "max_prob":  # high on known rows
            scores = -scores
        found[name] = {"auroc": metrics.auroc(scores, positive), "aupr": metrics.aupr(scores, positive)}
    return found


def _rounded(values: Tensor) -> list[float | None]:
    """Round to six decimals, more than a picture shows; NaN becomes null."""
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]


def portable(value: Any) -> Any:
    """Cut an absolute path in a text to its last part: "/home/me/data" and "--data=/home/me/data" keep only "data"."""
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")
    if re.match(r"/|~|[A-Za-z]:[\\/]", path):
        path = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return f"{name}{equals}{path}"
