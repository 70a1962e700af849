"""Laplace-LoRA: a Gaussian around a finished plain LoRA adapter, with K-FAC curvature and linearized predictions.

Yang et al., "Bayesian low-rank adaptation for large language models", arXiv 2308.13111.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, get_args

import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayestune.errors import ConfigError, DataError, DrawError, PosteriorError
from bayestune.methods.laplace.kfac import FactorSums, KroneckerFactor, add_batch
from bayestune.methods.laplace.linearised import Factors, LinearisedDraws, Linears, ProbitAnswer, probit_logits
from bayestune.methods.laplace.linears import Layers, covered_linears, factor_dtype, refuse_if_too_large
from bayestune.methods.laplace.prior_precision import CANDIDATES, best_candidate, most_evident
from bayestune.sampling.base import Members, Posterior, Sampler, Tensors, Values, saved_settings
from bayestune.sampling.jacobian import Traced, traced
from bayestune.sampling.stacked import StackedDraws
from bayestune.settings import Settings
from bayestune.storage.state import active_adapter, describe, tensor_fault
from bayestune.tasks import AnyRow, Task

Predictive = Literal["mc", "probit"]
Batch = tuple[list[AnyRow], dict[str, Tensor]]
_PARTS = tuple(field.name for field in fields(KroneckerFactor))


class _Saved(Settings):
    layers: Layers
    precision: float = Field(gt=0)
    predictive: Predictive
    rows: int = Field(ge=1)
    names: Any


class LaplacePosterior(Posterior):
    """``q(theta) = N(theta*, (H + tau I)^-1)`` around a plain LoRA adapter theta*; H is its K-FAC curvature.

    Predictions are linear in the weights: draw k answers with ``f(x; theta*) + J(x) (theta_k - theta*)``, and
    ``draws=0`` with the logits at theta*. Weights that are not covered (biases, heads with ``layers="all"``) stay at
    theta*.

    Attributes:
        factors: the curvature of each covered layer, by name.
        layers: "all" or "last", as in `fit_laplace`.
        precision: tau, the precision of the prior N(0, 1 / tau) of every covered weight.
        rows: number of rows that H sums over.
        predictive: "mc" for draws, or "probit" for one slice in closed form, whatever the number of draws except 0.
    """

    kind = "laplace"
    default_draws = 10

    def __init__(
        self,
        model: PeftModel,
        factors: Mapping[str, KroneckerFactor],
        *,
        layers: str,
        precision: float,
        rows: int,
        predictive: str = "mc",
        temperature: float = 1.0,
    ) -> None:
        super().__init__(model, temperature=temperature)
        self.factors, self.layers, self.precision = dict(factors), layers, precision
        self.rows, self.predictive = rows, predictive
        self._linears = covered_linears(model, layers=layers)

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        linears = covered_linears(self.model, layers=self.layers)
        if any(linears.get(name) is not linear for name, linear in self._linears.items()):
            raise DrawError("the active adapter is not the one of this Laplace posterior: call set_adapter(name).")
        if draws == 0:
            return StackedDraws.of(self.model, draws=0, seed=seed)
        factors = {name: factor.to(linears[name].weight.device) for name, factor in self.factors.items()}
        if self.predictive == "probit":
            return ProbitAnswer(model=self.model, linears=linears, factors=factors, precision=self.precision)
        return LinearisedDraws.of(self.model, linears, factors, precision=self.precision, draws=draws, seed=seed)

    def settings(self) -> dict[str, Any]:
        return {
            "layers": self.layers,
            "precision": self.precision,
            "predictive": self.predictive,
            "rows": self.rows,
            "names": list(self.factors),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the eigenvectors and eigenvalues of both factors of each layer, as ``<name>.<part>``."""
        return {f"{name}.{part}": getattr(factor, part) for name, factor in self.factors.items() for part in _PARTS}

    @classmethod
    def from_saved(cls, model: PeftModel, settings: Values, tensors: Tensors, members: Members) -> "LaplacePosterior":
        saved = saved_settings(cls.kind, _Saved, settings)
        linears = covered_linears(model, layers=saved.layers)
        if saved.names != list(linears):
            raise PosteriorError(f"laplace: found the layers {saved.names}, expected {list(linears)[:3]} and so on.")
        expected: dict[str, list[Any]] = {}
        for name, linear in linears.items():
            m, n, dtype = linear.out_features, linear.in_features, str(factor_dtype(linear)).removeprefix("torch.")
            shapes = ([m, m], [m], [n, n], [n])
            expected |= {f"{name}.{part}": [shape, dtype] for part, shape in zip(_PARTS, shapes, strict=True)}
        fault = tensor_fault(expected, describe(tensors))
        if fault:
            raise PosteriorError(f"laplace: {fault}.")
        for key, tensor in tensors.items():
            if key.endswith("_values") and (tensor < 0).any():
                raise PosteriorError(f"laplace: tensor {key!r} holds negative eigenvalues.")
        factors = {
            name: KroneckerFactor(*(tensors[f"{name}.{part}"] for part in _PARTS)).to(linear.weight.device)
            for name, linear in linears.items()
        }
        return cls(model, factors, **saved.model_dump(exclude={"names"}))


def fit_laplace(
    model: nn.Module,
    task: Task,
    rows: Sequence[AnyRow],
    *,
    layers: str = "all",
    precision: str | float = "marglik",
    validation_rows: Sequence[AnyRow] | None = None,
    predictive: str = "mc",
    batch_size: int = 8,
    progress: bool = False,
) -> LaplacePosterior:
    """Fit a Laplace posterior to the finished, plain LoRA adapter of `model`.

    The curvature is the generalized Gauss-Newton matrix, summed over `rows` in K-FAC form, with weights shared over
    tokens as in "expand" (see `FactorSums`). It is exact over labels, so labels are not needed (`task.loss_roots`).
    The model is put in evaluation mode. Under ``torch.autocast`` the factors are float32 (float64 for such adapters).

    Args:
        rows: rows that the adapter was trained on, labeled or not.
        layers: "all": the A and B of every adapted layer; "last": the trained head, or the last adapted layer.
        precision: precision of the prior. "marglik" maximizes the marginal likelihood; "validation" takes the one of
            `CANDIDATES` whose probit predictive has the smallest NLL on the labeled `validation_rows`.
        predictive: "mc" or "probit", as in `LaplacePosterior`.
        batch_size: rows per forward pass, which is followed by one backward pass per class.

    Raises:
        ConfigError: a setting is out of range, the adapter cannot be covered, or the factors exceed the free memory.
        DataError: there are no rows, or a row cannot be used.
        PosteriorError: logits or curvature are not finite.
    """
    model, _, _ = active_adapter(model)
    linears = covered_linears(model, layers=layers)
    _check_settings(task, precision, validation_rows, predictive, batch_size)
    _check_rows(task, rows, validation_rows)
    refuse_if_too_large(model, layers=layers)
    model.eval()
    sums = {name: FactorSums(linear) for name, linear in linears.items()}
    for chosen, batch in _batches(model, task, rows, batch_size, progress):
        add_batch(sums, _finite(traced(model, linears, task, batch), chosen), task)
    factors = {name: sums.pop(name).decomposed() for name in linears}
    if precision == "marglik":
        square_norm = sum(linear.weight.detach().double().square().sum().item() for linear in linears.values())
        tau = most_evident([factor.curvature for factor in factors.values()], square_norm)
    elif validation_rows is not None:
        batches = _batches(model, task, validation_rows, batch_size, progress)
        tau = _validated(model, linears, factors, task, batches)
    else:
        tau = float(precision)
    return LaplacePosterior(model, factors, layers=layers, precision=tau, rows=len(rows), predictive=predictive)


def _validated(model: PeftModel, linears: Linears, factors: Factors, task: Task, batches: Iterator[Batch]) -> float:
    """Return the candidate with the smallest negative log-likelihood of the labels, from one pass over the rows."""
    log_probs, labels = [], []
    for rows, batch in batches:
        logits = probit_logits(_finite(traced(model, linears, task, batch), rows), factors, CANDIDATES)
        log_probs.append(logits.double().cpu().log_softmax(-1))
        labels += [task.target(row) for row in rows]
    return best_candidate(torch.cat(log_probs, 1), torch.tensor(labels))


def _batches(model: PeftModel, task: Task, rows: Sequence[AnyRow], batch_size: int, progress: bool) -> Iterator[Batch]:
    """Yield the rows and the tensors of each batch, longest rows first, so that memory runs out early or never."""
    device = next(model.parameters()).device
    examples = task.examples(rows, model)
    order = sorted(range(len(rows)), key=lambda i: -task.tokens(examples[i]))
    with tqdm(total=len(rows), desc="laplace", unit="row", disable=not progress) as bar:
        for start in range(0, len(rows), batch_size):
            places = order[start : start + batch_size]
            batch = task.collate([examples[i] for i in places])
            yield [rows[i] for i in places], {key: t.to(device) for key, t in batch.items()}
            bar.update(len(places))


def _finite(forward: Traced, rows: Sequence[AnyRow]) -> Traced:
    """Return `forward`, or raise an error that names the first row with unusable logits."""
    bad = (forward.logits.isnan() | forward.logits.isposinf()).any(1) | ~forward.present.any(1)
    if bad.any():
        raise PosteriorError(
            f"laplace: the logits of row {rows[int(bad.nonzero()[0, 0])].id!r} are not finite: the adapter's weights, "
            "or the precision, are too large or too small for this model."
        )
    return forward


def _check_settings(
    task: Task, precision: str | float, validation_rows: Sequence[AnyRow] | None, predictive: str, batch_size: int
) -> None:
    check_task(task, precision, predictive)
    if predictive not in get_args(Predictive):
        raise ConfigError(f"predictive: found {predictive!r}, expected one of {get_args(Predictive)}.")
    if batch_size < 1:
        raise ConfigError(f"fit_laplace: found batch_size={batch_size}, expected at least 1.")
    number = isinstance(precision, int | float) and 0 < precision < float("inf")
    if precision not in ("marglik", "validation") and not number:
        raise ConfigError(f"precision: found {precision!r}, expected 'marglik', 'validation' or a positive number.")
    if (precision == "validation") != (validation_rows is not None):
        found = "none" if validation_rows is None else f"{len(validation_rows)} of them"
        raise ConfigError(
            f"validation_rows: found {found} with precision={precision!r}, expected them with 'validation' only."
        )


def check_task(task: Task, precision: str | float, predictive: str) -> None:
    """Raise a ConfigError if the task has no curvature, or has no classes but is asked for what needs them."""
    if type(task).loss_roots is Task.loss_roots:
        raise ConfigError(
            f"laplace: found task {task.name}, whose likelihood has no curvature here, expected classes or numbers: "
            "choose another method, such as blob."
        )
    if not task.has_classes and (predictive == "probit" or precision == "validation"):
        found = "predictive 'probit'" if predictive == "probit" else "precision 'validation' (a fit_split)"
        raise ConfigError(
            f"laplace: found {found} for task {task.name} without classes, expected predictive 'mc' and precision "
            "'marglik' or a number: probit averages probabilities of classes."
        )


def _check_rows(task: Task, rows: Sequence[AnyRow], validation_rows: Sequence[AnyRow] | None) -> None:
    if not rows or validation_rows is not None and not validation_rows:
        raise DataError("fit_laplace: found no rows, expected at least one.")
    for row in validation_rows or ():
        if row.target is None:
            raise DataError(f"fit_laplace: validation row {row.id!r} has no label, expected one.")
    task.check([*rows, *(validation_rows or ())])
