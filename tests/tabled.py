"""Predictions and cells made up for tests of tables and reports; nothing is trained."""

from pathlib import Path
from typing import Any

import torch

from bayestune.files import write_json
from bayestune.inference import Prediction
from bayestune.tables.cells import cell_path, cell_record


def answers(
    task: str = "openbookqa", *, rows: int = 200, draws: int = 10, classes: int = 4, sharp: float = 1.0, seed: int = 0
) -> Prediction:
    """Draws around common logits; the labels follow the latter, so `sharp` 1 is nearly calibrated, 3 overconfident."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn(max(1, draws), rows, classes, generator=generator, dtype=torch.float64)
    return Prediction(
        ids=tuple(f"{task}-{i}" for i in range(rows)),
        draw_log_probs=(sharp * common + (noise if draws else 0 * noise)).log_softmax(-1),
        labels=torch.multinomial(common.softmax(1), 1, generator=generator)[:, 0],
        draws=draws,
        seed=0,
        task=task,
    )


def record(prediction: Prediction, *, known: Prediction | None = None, **changes: Any) -> dict[str, Any]:
    """The cell of a prediction, of a run that never was; `settings` are more of its settings."""
    given: dict[str, Any] = {
        "table": "table1",
        "method": "blob",
        "task": "openbookqa",
        "seed": 1,
        "steps": 600,
        "train_rows": 4952,
        "seconds": 12.5,
        "sha256": {"base": {"model.safetensors": "ab12"}, "train_rows": "t", "eval_rows": prediction.task},
        "versions": {"python": "3.11.2", "torch": "2.13.0"},
        "hardware": {"machine": "x86_64", "device": "cpu"},
        "command": ["bayestune", "table", "table1", "--data", "/home/someone/data"],
        "known": known,
    } | {name: value for name, value in changes.items() if name != "settings"}
    experiment = {"model": "minilm", "seed": given["seed"], "steps": given["steps"], **changes.get("settings", {})}
    return cell_record(prediction, **{"experiment": experiment, **given})


def save(folder: Path, *records: dict[str, Any]) -> list[Path]:
    """Write cells where they belong."""
    paths = [cell_path(folder, cell) for cell in records]
    for path, cell in zip(paths, records, strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, cell)
    return paths
