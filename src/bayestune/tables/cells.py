"""Cells: what one trained run scored on one data set, as one JSON file with all that tables and reports need.

A cell is named by (table, method, task, eval_task, seed, draws): a run of `method` trained on `task` with `seed`,
asked about `eval_task` with `draws` draws. `cell_record` makes its JSON, `cell_path` says where it goes, and
`read_cells` reads a folder of them back. Their fields: `bayestune.tables.cell_fields.CELL`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayestune import metrics
from bayestune.errors import ConfigError, DataError
from bayestune.experiment.record import read_json
from bayestune.experiment.settings import methods_with
from bayestune.inference import Prediction, evaluate
from bayestune.tables.cell_fields import (
    BINS,
    COVERAGES,
    HISTOGRAM_BINS,
    HISTOGRAM_ENDS,
    KEY,
    TARGETS,
    Cell,
    check_cell,
)

SHARED = ("steps", "batch_size", "rank", "lora_alpha", "target_modules", "max_tokens", "precision", "train_split")
"""Settings that all methods of a table have in common on one training set."""

OWN = ("seed", "data", "draws", "method", "task", "checkpoint_steps", "eval_split", "model", "adapter")
"""Settings that may differ between the cells of a method: named elsewhere in the cell, or of no effect on it."""


def cell_record(
    prediction: Prediction,
    *,
    table: str,
    method: str,
    task: str,
    seed: int,
    steps: int,
    train_rows: int,
    seconds: float,
    experiment: Mapping[str, Any],
    sha256: Mapping[str, Any],
    versions: Mapping[str, Any],
    hardware: Mapping[str, Any],
    command: Sequence[str],
    known: Prediction | None = None,
) -> Cell:
    """The cell of `prediction`, answers about `prediction.task` of a run trained on `task` with `seed`.

    Args:
        known: answers of the same run about `task` itself; needed, and only used, where the two tasks differ.
        experiment: the run's settings. sha256: at least of "train_rows", and of "eval_rows", those predicted.
        seconds: wall-clock time of the run, without an adapter it started from; of its last part, if it was resumed.
        command: the command line that made it.

    Folders of the machine (absolute paths) in `experiment` and `command` are cut to their last part.

    Raises:
        DataError: a row without a label, or whose label was given probability zero.
        ConfigError: `known` is missing, or not of the same draws; or a value that no cell may have.
    """
    scores = evaluate(prediction, bins=BINS)
    if scores.nll == math.inf:
        rows = metrics.impossible_labels(prediction.log_probs, _labels(prediction))
        raise DataError(f"cell: found {rows} rows whose label has probability 0, expected a finite NLL.")
    record: Cell = {
        "table": table,
        "method": method,
        "task": task,
        "eval_task": prediction.task,
        "seed": seed,
        "draws": prediction.draws,
        "accuracy": scores.accuracy,
        "nll": scores.nll,
        "ece": scores.ece,
        "brier": scores.brier,
        "intervals": {name: list(ends) for name, ends in scores.intervals.items()},
        "rows": scores.rows,
        "train_rows": train_rows,
        **_curves(prediction),
        "uncertainty": _histograms(prediction),
        "steps": steps,
        "seconds": seconds,
        "command": [portable(part) for part in command],
        "experiment": {name: portable(value) for name, value in experiment.items()},
        "sha256": dict(sha256),
        "versions": dict(versions),
        "hardware": dict(hardware),
    }
    if prediction.task != task:
        if known is None or (known.task, known.draws) != (task, prediction.draws):
            found = "none" if known is None else f"answers about {known.task!r} with {known.draws} draws"
            raise ConfigError(
                f"cell: known is {found}, expected answers about {task!r} with {prediction.draws} draws."
            )
        record["detection"] = _detection(prediction, known)
        record["in_distribution"] = {"rows": len(known.ids), "uncertainty": _histograms(known)}
    check_cell(record, where="cell")
    return record


def cell_path(results: str | Path, record: Cell) -> Path:
    """Where a cell goes: `results/<table>/<task>/<eval_task>/<method>_n<draws>_seed<seed>.json`."""
    table, task, eval_task, method, draws, seed = (record[name] for name in KEY)
    return Path(results) / table / task / eval_task / f"{method}_n{draws}_seed{seed}.json"


def read_cells(*folders: str | Path) -> list[Cell]:
    """All cells under `folders` (every .json file in them), checked, sorted by `KEY`.

    What makes two cells comparable must be equal: of a table the model, of a (table, task) the training rows and the
    budget and size of an adapter (`SHARED`), of a (table, eval_task) the rows, of a (table, task, method) all settings
    but the seed and the places.

    Raises:
        ConfigError: no such folder, no cells in it; or a file that is no cell, twice the same cell, or a cell of
            another configuration, naming file and field.
    """
    places: dict[tuple[Any, ...], Path] = {}
    cells: dict[tuple[Any, ...], Cell] = {}
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
            raise ConfigError(f"{path}: the same {', '.join(KEY)} as {places[key]}; remove one of them.")
        places[key], cells[key] = path, cell
    _check_comparable(cells, places)
    return [cells[key] for key in sorted(cells)]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder, expected one with cells (.json).")
    found = sorted(folder.rglob("*.json"), key=lambda path: path.relative_to(folder).parts)
    if not found:
        raise ConfigError(f"{folder}: found no .json file, expected cells.")
    return found


def _check_comparable(cells: Mapping[tuple[Any, ...], Cell], places: Mapping[tuple[Any, ...], Path]) -> None:
    """Refuse the first cell that differs from an earlier one where both should agree."""
    seen: dict[tuple[Any, ...], tuple[Any, Path]] = {}
    for key, cell in cells.items():
        for group, field, value in _agreements(cell):
            before, place = seen.setdefault((*group, field), (value, places[key]))
            if value != before:
                found = f"field {field}: found {_short(value)}, expected {_short(before)} as in {place}"
                raise ConfigError(f"{places[key]}: {found}: cells of another configuration belong in another folder.")


def _agreements(cell: Cell) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """(group of cells, field, value): the value is the same in all cells of the group."""
    table, task, eval_task, method = (cell[name] for name in ("table", "task", "eval_task", "method"))
    settings, hashes = cell["experiment"], cell["sha256"]
    yield (table,), "experiment.model", settings["model"]
    yield (table,), "sha256.base", hashes.get("base")
    yield (table, "task", task), "sha256.train_rows", hashes["train_rows"]
    yield (table, "task", task), "train_rows", cell["train_rows"]
    yield (table, "eval_task", eval_task), "sha256.eval_rows", hashes["eval_rows"]
    yield (table, "eval_task", eval_task), "rows", cell["rows"]
    yield (table, "method", task, method), "steps", cell["steps"]
    for name, value in settings.items():
        if "method" in settings and methods_with(name) and settings["method"] not in methods_with(name):
            continue  # of no effect on this method
        if name in SHARED:
            yield (table, "task", task), f"experiment.{name}", value
        elif name not in OWN:
            yield (table, "method", task, method), f"experiment.{name}", value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def uncertainties(prediction: Prediction) -> dict[str, Tensor]:
    """The values behind the histograms, one a row: entropies in nats, and the probability of the answer."""
    return {
        "total": prediction.total,
        "epistemic": prediction.epistemic,
        "max_prob": prediction.probs.amax(-1),
    }


def _labels(prediction: Prediction) -> Tensor:
    assert prediction.labels is not None  # `evaluate` has looked
    return prediction.labels


def _curves(prediction: Prediction) -> dict[str, Any]:
    """Reliability, risk-coverage, its area, and the thresholds for the target errors."""
    log_probs, labels = prediction.log_probs, _labels(prediction)
    bins = metrics.reliability_bins(log_probs, labels, bins=BINS)
    confidence, correct = prediction.probs.amax(-1), prediction.answer == labels
    coverage, risk = metrics.risk_coverage(confidence, correct)
    # The point where the coverage first reaches k %, each one once.
    grid = torch.arange(1, COVERAGES + 1, dtype=torch.float64) / COVERAGES
    points = torch.searchsorted(coverage, grid).unique()
    thresholds = [metrics.threshold_for_error(confidence, correct, target) for target in TARGETS]
    return {
        "reliability": {
            "counts": bins.counts.tolist(),
            "confidence": _rounded(bins.confidence),
            "accuracy": _rounded(bins.accuracy),
        },
        "aurc": metrics.aurc(confidence, correct),
        "risk_coverage": {"coverage": _rounded(coverage[points]), "risk": _rounded(risk[points])},
        "selective": [{**vars(found), "interval": list(found.interval)} for found in thresholds],
    }


def _histograms(prediction: Prediction) -> dict[str, Any]:
    found = {}
    for name, values in uncertainties(prediction).items():
        end = HISTOGRAM_ENDS[name]
        where = (values / end * HISTOGRAM_BINS).long().clamp(0, HISTOGRAM_BINS - 1)
        found[name] = {"end": end, "counts": torch.bincount(where, minlength=HISTOGRAM_BINS).tolist()}
    return found


def _detection(prediction: Prediction, known: Prediction) -> dict[str, dict[str, float]]:
    """AUROC and average precision of finding the rows of `prediction` among those of `known`."""
    positive = torch.tensor([False] * len(known.ids) + [True] * len(prediction.ids))
    ours, others = uncertainties(known), uncertainties(prediction)
    found = {}
    for name in HISTOGRAM_ENDS:
        scores = torch.cat([ours[name], others[name]])
        if name == "max_prob":  # sure of what is known
            scores = -scores
        found[name] = {"auroc": metrics.auroc(scores, positive), "aupr": metrics.aupr(scores, positive)}
    return found


def _rounded(values: Tensor) -> list[float | None]:
    """Six decimals are more than a picture shows; null for NaN."""
    return [None if math.isnan(value) else round(value, 6) for value in values.tolist()]


def portable(value: Any) -> Any:
    """A text without the machine's folders: "/home/me/data" and "--data=/home/me/data" keep only "data"."""
    if not isinstance(value, str):
        return value
    name, equals, path = value.rpartition("=")
    if re.match(r"/|~|[A-Za-z]:[\\/]", path):
        path = re.split(r"[\\/]", path.rstrip("\\/"))[-1]
    return f"{name}{equals}{path}"
