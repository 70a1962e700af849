"""`detection`: how well scores tell the rows of another data set from those that a run knows."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bayestune import metrics
from bayestune.experiment.fitting import autocast
from bayestune.experiment.trained import Run
from bayestune.inference import Prediction, evaluate, novelty
from bayestune.tasks import AnyRow, TokenizedTask

DETECTORS = {
    "auroc_total": "total entropy",
    "auroc_total_matched": "total entropy, pairs of equal length",
    "auroc_largest_probability": "1 - largest probability",
    "auroc_novelty": "distance to the training rows (frozen base)",
    "auroc_length": "length of the question (no model)",
    "auroc_epistemic": "epistemic: the draws' disagreement",
}


def detection(
    trained: Run, known: Prediction, known_rows: Sequence[AnyRow], task: TokenizedTask, rows: Sequence[AnyRow]
) -> dict[str, Any]:
    """Return the scores of a run on rows of another data set, and the AUROC of telling these from `known_rows`.

    Args:
        trained: the run.
        known: its prediction for `known_rows`, rows of its own data set; the others are predicted with its draws.
        task: the other data set, as `other_task` returns it.
        rows: its rows, labeled.

    Returns:
        The task's scores, "epistemic" (nats), and each of `DETECTORS`: above one half if the score is higher on
        `rows`. It is None where there are no pairs of equal length, or the run keeps no features of training rows.
    """

    def joined(of: Callable[[Prediction], Tensor]) -> Tensor:
        return torch.cat([of(known), of(prediction)])

    prediction = trained.predict(rows, draws=known.draws, seed=known.seed, task=task, progress=True)
    positive = torch.tensor([False] * len(known_rows) + [True] * len(rows))
    total = joined(lambda found: found.total)
    lengths = torch.tensor([len(row.texts[0][1]) for row in [*known_rows, *rows]])
    posterior, far = trained.posterior, None
    if posterior.known is not None:  # runs of older versions keep no features
        with autocast(trained.experiment):
            far = torch.cat([novelty(posterior, trained.task, known_rows), novelty(posterior, task, rows)])
    return {
        **evaluate(prediction).as_dict(),
        "epistemic": float(prediction.epistemic.mean()),
        "auroc_total": metrics.auroc(total, positive),
        "auroc_total_matched": metrics.matched_auroc(total, positive, lengths),
        "auroc_largest_probability": metrics.auroc(joined(lambda found: 1 - found.probs.amax(-1)), positive),
        "auroc_novelty": None if far is None else metrics.auroc(far, positive),
        "auroc_length": metrics.auroc(lengths, positive),
        "auroc_epistemic": metrics.auroc(joined(lambda found: found.epistemic), positive),
    }
