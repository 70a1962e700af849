r"""Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2) of the average over draws."""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from scipy.optimize import minimize_scalar
from torch import Tensor

from bayestune.errors import BayestuneWarning, DataError
from bayestune.methods.base import Fitting, PointMethod
from bayestune.methods.mle import Mle
from bayestune.metrics import row_nll
from bayestune.sampling import Posterior
from bayestune.tasks import AnyPrediction, Prediction

_GRID = 65  # points in log T, with T = 1 in the middle; neighbors are a factor of 1.15 apart (1.54 for numbers)
_PRECISION = 1e-9  # of log T, where the search ends; rounding of the NLL hides a finer minimum


def fit_temperature(log_probs: Float[Tensor, "draws rows classes"], labels: Int[Tensor, " rows"] | None) -> float:
    r"""Fit the temperature T > 0 that minimizes the mean NLL of ``1/K sum_k softmax(logits_k / T)``, in nats.

    With one draw, T is that of Guo et al. (2017, section 4.2) and no answer changes. With several draws, the NLL is
    that of the average, so an answer may change. The NLL may then have several minima in log T, so the best point of a
    grid over [0.01, 100] is refined by Brent's bounded search. Warns if the minimum is at a bound, which happens if
    every answer is correct.

    Args:
        log_probs: log-probabilities of a prediction for validation rows at temperature 1
            (`Prediction.draw_log_probs`), made with another seed than the predictions that are scored. They serve as
            the logits, from which they differ by a constant per row. They may be -inf.
        labels: classes of the rows.

    Returns:
        The temperature; 1 if no other is better beyond rounding.

    Example:
        >>> fit_temperature(torch.tensor([[[0.9, 0.1]] * 4]).log(), torch.tensor([0, 0, 0, 1]))  # log 9 / log 3
        2.0000...

    Raises:
        DataError: there are no draws, rows or labels, the log-probabilities are invalid, a label is not a class, or a
            label has probability 0 in every draw, and so at every T.
    """
    if labels is None:
        raise DataError("fit_temperature: found rows without a label, expected one of the classes for every row.")
    if log_probs.ndim != 3 or len(log_probs) == 0:
        raise DataError(f"fit_temperature: log_probs {tuple(log_probs.shape)}, expected [draws, rows, classes].")
    for draw in log_probs:
        row_nll(draw, labels)  # raises an error for invalid log-probabilities or labels
    log_probs, ids = log_probs.detach().cpu().double(), tuple(map(str, range(len(labels))))
    given = Prediction(ids=ids, draw_log_probs=log_probs, labels=labels, draws=len(log_probs), seed=0, task="given")
    return temperature_of(given)


def temperature_of(prediction: AnyPrediction) -> float:
    r"""Fit the temperature T > 0 that minimizes the mean NLL of ``prediction.tempered(T)``, like `fit_temperature`.

    For numbers, T is from 1e-6 to 1e6 and multiplies every variance of the noise. With one draw and constant noise
    s^2, ``T = mean (y - mu)^2 / s^2``.

    Args:
        prediction: for validation rows, at temperature 1, with another seed than the predictions that are scored.

    Returns:
        The temperature; 1 if no other is better beyond rounding.

    Raises:
        DataError: a row has no label, or its label has probability 0 in every draw, and so at every T.
        TaskError: the task has no temperature.
    """
    impossible = prediction.row_nll().isposinf()
    if impossible.any():
        row = int(impossible.nonzero()[0, 0])
        raise DataError(f"fit_temperature: the label of row {row} has probability 0 at every temperature.")
    temperature = best_temperature(prediction)
    if temperature in prediction.temperatures:
        told = f"fit_temperature: stopped at the bound T = {temperature}: up to there the NLL does not rise."
        warnings.warn(told, BayestuneWarning, stacklevel=2)
    return temperature


def best_temperature(prediction: AnyPrediction) -> float:
    """Return what `temperature_of` returns, without its checks and warnings."""
    bounds = prediction.temperatures
    return _minimizer(lambda log_t: prediction.tempered(math.exp(log_t)).row_nll().mean().item(), *bounds)


def _minimizer(nll: Callable[[float], float], lowest: float, highest: float) -> float:
    """Return T = exp(x) for the minimizer x of `nll`, a function of log T; `highest` is 1 / `lowest`."""
    low, high = math.log(lowest), math.log(highest)
    step = (high - low) / (_GRID - 1)
    center = min((low + step * i for i in range(_GRID)), key=nll)
    bracket = (max(low, center - step), min(high, center + step))
    best: Any = minimize_scalar(nll, bounds=bracket, method="bounded", options={"xatol": _PRECISION})
    at_one = nll(0.0)
    if at_one - best.fun <= 8 * torch.finfo(torch.float64).eps * max(1.0, abs(at_one)):
        return 1.0
    for bound, value in ((low, lowest), (high, highest)):
        if bound in bracket and nll(bound) <= best.fun:
            return value
    return math.exp(best.x)


class Temperature(PointMethod):
    """Plain LoRA whose logits are divided by a temperature fitted on the rows of `temperature_split`."""

    name = "temperature"
    label = "Temperature"
    summary = "plain LoRA with a temperature fitted on held-out rows"
    paper = "Guo et al. 2017, arXiv 1706.04599"
    start = Mle
    needs = ("temperature_split",)

    def fit(self, model: PeftModel, run: Fitting) -> Posterior:
        return self.posterior(model.eval()) if run.started else super().fit(model, run)
