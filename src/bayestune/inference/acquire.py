"""`acquire`: choose which unlabeled rows to label next."""

import heapq
from collections.abc import Iterable, Sequence

from bayestune.errors import ConfigError
from bayestune.functional import derive_seed
from bayestune.tasks import Prediction

ACQUISITIONS = ("mutual_information", "entropy", "random")


def acquire(
    predictions: Iterable[Prediction | Sequence[str]], count: int, *, score: str = "mutual_information", seed: int = 0
) -> list[tuple[str, float]]:
    """Return the ids and scores of the `count` rows that are most worth labeling, best first.

    - "mutual_information" of label and weights, in nats: ``H[p(y|x)] - 1/K sum_k H[p(y|x, theta_k)]``. It is high
      where each draw is confident but the draws disagree, so that a label would decide between them.
    - "entropy" of the predictive distribution, in nats: ``H[p(y|x)]``. It is also high where no label would help.
    - "random": a uniform number per seed and id, which does not depend on the other rows.

    Each row is scored on its own, so the chosen rows may resemble each other. Rows with equal scores keep their order.

    Args:
        predictions: predictions of the rows, in any number of batches; only the best rows are kept in memory. For
            "random", a batch may also be the list of its ids.
        count: number of rows to return; all of them if there are fewer.
        score: one of the three above.
        seed: seed of "random".

    Raises:
        ConfigError: as `check_acquisition`, or `count` is less than 1.

    References:
        Houlsby et al. 2011, arXiv 1112.5745, equation 2.
    """
    if count < 1:
        raise ConfigError(f"acquire: count is {count}, expected at least 1")
    scored = (pair for prediction in predictions for pair in _scored(prediction, score, seed))
    return heapq.nlargest(count, scored, key=lambda pair: pair[1])


def check_acquisition(score: str, draws: int, *, classes: bool = True) -> None:
    """Raise an error unless `score` can rank rows that are predicted with `draws` draws, with or without `classes`.

    Raises:
        ConfigError: the score is unknown or needs classes, or it is the mutual information and there are fewer than
            two draws.
    """
    if score not in ACQUISITIONS:
        raise ConfigError(f"acquire: score is {score!r}, expected one of {', '.join(ACQUISITIONS)}")
    if score != "random" and not classes:
        raise ConfigError(f"acquire: found score {score!r} for a task without classes, expected 'random'")
    if score == "mutual_information" and draws < 2:
        raise ConfigError(
            f"acquire: found {draws} draws, of which the mutual information is 0 for every row, expected at least 2; "
            "use a posterior and more draws, or the score 'entropy'"
        )


def _scored(prediction: Prediction | Sequence[str], score: str, seed: int) -> list[tuple[str, float]]:
    known = isinstance(prediction, Prediction)
    check_acquisition(score, min(prediction.draws, len(prediction.draw_log_probs)) if known else 0)
    if score == "random":
        ids = prediction.ids if known else prediction
        return [(row, derive_seed("acquire", seed, row) / 2**63) for row in ids]
    if not known:
        raise ConfigError(f"acquire: found ids of rows for score {score!r}, expected predictions; predict the rows")
    values = prediction.epistemic if score == "mutual_information" else prediction.total
    return list(zip(prediction.ids, values.tolist(), strict=True))
