"""Out-of-distribution detection: how well a run's uncertainties separate its own rows from another data set's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bayestune import metrics
from bayestune.errors import TaskError
from bayestune.experiment.fitting import autocast
from bayestune.experiment.trained import Run
from bayestune.inference import evaluate, novelty
from bayestune.tasks import AnyPrediction, AnyRow, TokenizedTask

DETECTORS = {
    "auroc_total": "total uncertainty",
    "auroc_total_matched": "total uncertainty, pairs of equal length",
    "auroc_largest_probability": "1 - largest probability",
    "auroc_novelty": "distance to the training rows (frozen base)",
    "auroc_length": "length of the question (no model)",
    "auroc_epistemic": "epistemic: the draws' disagreement",
}


def novelty_of(trained: Run, task: TokenizedTask, rows: Sequence[AnyRow]) -> Tensor | None:
    """Return the `novelty` of each row, [rows], in the run's precision; None if the run kept no features."""
    if trained.posterior.known is None:
        return None
    with autocast(trained.experiment):
        return novelty(trained.posterior, task, rows)


def detection(
    trained: Run,
    known: AnyPrediction,
    known_rows: Sequence[AnyRow],
    task: TokenizedTask,
    rows: Sequence[AnyRow],
    *,
    known_novelty: Tensor | None,
) -> dict[str, Any]:
    """Score a run on rows of another data set, and compute the AUROC of telling these from `known_rows`.

    Args:
        trained: the run.
        known: its prediction for `known_rows`; `rows` are predicted with the same number of draws and seed.
        known_rows: rows of its own data set.
        task: the task of the other data set, as `other_task` returns it.
        rows: labeled rows of the other data set.
        known_novelty: `novelty_of` the `known_rows`.

    Returns:
        The task's scores, the mean "epistemic" uncertainty, and the AUROC of each of the `DETECTORS` that the task
        has. An AUROC is above one half if the detector is higher on `rows`. It is None if there are no pairs of equal
        length, or if the run kept no features of its training rows.

    Raises:
        TaskError: the task has no uncertainty per row.
    """
    prediction = trained.predict(rows, draws=known.draws, seed=known.seed, task=task, progress=True)
    positive = torch.tensor([False] * len(known_rows) + [True] * len(rows))
    here, there = known.uncertainties(), prediction.uncertainties()
    if not there:
        raise TaskError(f"--ood: found task {task.name} without an uncertainty of a row, expected classes or numbers.")
    joined = {name: torch.cat([here[name], values]) for name, values in there.items()}
    lengths = torch.tensor([len(row.texts[0][1]) for row in [*known_rows, *rows]])
    far = novelty_of(trained, task, rows)
    both = None if far is None or known_novelty is None else torch.cat([known_novelty, far])
    return {
        **evaluate(prediction).as_dict(),
        "epistemic": float(there["epistemic"].mean()),
        **{f"auroc_{name}": metrics.auroc(values, positive) for name, values in joined.items()},
        "auroc_total_matched": metrics.matched_auroc(joined["total"], positive, lengths),
        "auroc_novelty": None if both is None else metrics.auroc(both, positive),
        "auroc_length": metrics.auroc(lengths, positive),
    }
