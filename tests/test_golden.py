"""Folders of every format that was released load, and answer as they did."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bayestune.methods import load_posterior
from bayestune.storage import manifest as posterior_manifest
from bayestune.training import checkpoint_files, last_complete
from golden.make import answers, base, trainer

GOLDEN = Path(__file__).parent / "golden"
FORMATS = sorted(path.name for path in GOLDEN.glob("format_*"))


def error(found: list[list[float]], expected: list[list[float]]) -> float:
    return (torch.tensor(found, dtype=torch.float64) - torch.tensor(expected, dtype=torch.float64)).abs().max().item()


def stored(name: str) -> dict[str, Any]:
    return json.loads((GOLDEN / name / "answers.json").read_text())


@pytest.mark.property("P12")
def test_every_format_has_a_folder() -> None:
    newest = max(posterior_manifest.FORMAT, checkpoint_files.FORMAT)
    assert [f"format_{number}" for number in range(1, newest + 1)] == FORMATS


@pytest.mark.property("P12")
@pytest.mark.parametrize("name", FORMATS)
def test_an_old_posterior_answers_as_it_did(name: str, figure: Callable[..., None]) -> None:
    model, expected = load_posterior(base(), GOLDEN / name / "posterior"), stored(name)
    figure("error of a probability at the mean", error(answers(model, 0), expected["mean"]), at_most=1e-6)
    figure("error of a probability over draws", error(answers(model, 4), expected["draws"]), at_most=1e-6)
    assert error(expected["mean"], expected["draws"]) > 1e-3


@pytest.mark.property("P12")
@pytest.mark.parametrize("name", FORMATS)
def test_an_old_checkpoint_is_resumed_as_it_was(name: str, tmp_path: Path, figure: Callable[..., None]) -> None:
    checkpoint, expected = last_complete(GOLDEN / name), stored(name)
    assert checkpoint == GOLDEN / name / "checkpoint-1"
    run = trainer(tmp_path)
    run.train(resume_from_checkpoint=str(checkpoint))
    figure("error of a probability after resuming", error(answers(run.model, 4), expected["trained"]), at_most=1e-6)
    assert error(expected["trained"], expected["draws"]) > 1e-4
