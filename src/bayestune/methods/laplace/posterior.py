"""Laplace-LoRA: a Gaussian around a finished plain LoRA adapter, with K-FAC curvature and linearised predictions.

Yang et al., "Bayesian low-rank adaptation for large language models", arXiv 2308.13111.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from bayestune.errors import ConfigError, DataError, DrawError, PosteriorError
from bayestune.methods.laplace.kfac import FactorSums, KroneckerFactor, add_batch
from bayestune.methods.laplace.linearised import LinearisedDraws, ProbitAnswer, probit_logits
from bayestune.methods.laplace.linears import covered_linears, plain_adapter, refuse_if_too_large
from bayestune.methods.laplace.prior_precision import CANDIDATES, best_candidate, most_evident
from bayestune.sampling.base import Posterior, Sampler, Settings
from bayestune.sampling.jacobian import Traced, traced
from bayestune.sampling.stacked import StackedDraws
from bayestune.tasks import AnyRow, Task

PREDICTIVES = ("mc", "probit")
_PARTS = tuple(field.name for field in fields(KroneckerFactor))


class LaplacePosterior(Posterior):
    """``q(theta) = N(theta*, (H + tau I)^-1)`` around a plain LoRA adapter theta*, H its K-FAC curvature.

    A prediction is linear in the weights: draw k answers with ``f(x; theta*) + J(x) (theta_k - theta*)``, and
    ``draws=0`` with the logits at theta*. Weights that are not covered (biases, heads with ``layers="all"``) stay at
    theta*.

    Attributes:
        factors: the curvature of each covered layer, by name.
        layers: "all" or "last", as in `fit_laplace`.
        precision: tau, the precision of the prior N(0, 1 / tau) of every covered weight.
        rows: how many rows H is a sum over.
        predictive: "mc", draws; or "probit", one slice in closed form for any number of draws but 0.
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
        _refuse_predictive(predictive)
        self.factors, self.layers, self.precision = dict(factors), layers, precision
        self.rows, self.predictive = rows, predictive
        self._linears = covered_linears(model, layers=layers)

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        linears = covered_linears(self.model, layers=self.layers)
        if any(linears.get(name) is not linear for name, linear in self._linears.items()):
            raise DrawError(
                "another adapter is active than the one of this Laplace posterior: call set_adapter(name)."
            )
        if draws == 0:
            return StackedDraws.of(self.model, draws=0, seed=seed)
        factors = {name: factor.to(linears[name].weight.device) for name, factor in self.factors.items()}
        if self.predictive == "probit":
            return ProbitAnswer(self.model, linears, factors, precision=self.precision)
        return LinearisedDraws(self.model, linears, factors, precision=self.precision, draws=draws, seed=seed)

    def settings(self) -> Settings:
        return {
            "layers": self.layers,
            "precision": self.precision,
            "predictive": self.predictive,
            "rows": self.rows,
            "names": list(self.factors),
        }

    def tensors(self) -> dict[str, Tensor]:
        """The eigenvectors and eigenvalues of both factors of each layer, ``<name>.<part>``."""
        return {f"{name}.{part}": getattr(factor, part) for name, factor in self.factors.items() for part in _PARTS}

    @classmethod
    def from_saved(
        cls,
        model: PeftModel,
        settings: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        members: Sequence[Mapping[str, Tensor]] = (),
    ) -> "LaplacePosterior":
        """What `settings` and `tensors` of a posterior of the same adapter gave.

        Raises:
            PosteriorError: a setting or tensor is missing, left over, or not one of this adapter.
            ConfigError: as `covered_linears`.
        """
        _check_settings(settings)
        linears = covered_linears(model, layers=settings["layers"])
        if settings["names"] != list(linears):
            raise PosteriorError(f"laplace: found layers {settings['names'][:3]}, expected {list(linears)[:3]}.")
        _check_tensors(tensors, linears)
        factors = {
            name: KroneckerFactor(*(tensors[f"{name}.{part}"] for part in _PARTS)).to(linear.weight.device)
            for name, linear in linears.items()
        }
        return cls(model, factors, **{key: settings[key] for key in ("layers", "precision", "rows", "predictive")})


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
    memory_limit: int | None = None,
    progress: bool = False,
) -> LaplacePosterior:
    """Fit a Laplace posterior to the finished, plain LoRA adapter of `model`.

    The curvature is the generalised Gauss-Newton matrix summed over `rows`, exact over the classes, so that labels are
    not needed; in K-FAC form, with weights shared over tokens as in "expand" (see `FactorSums`). The model is put in
    evaluation mode. Under ``torch.autocast`` the factors stay in float32, or float64 where the adapter is.

    Args:
        model: a PeftModel with one active LORA adapter. rows: what it was trained on, labelled or not.
        layers: "all", the A and B of every adapted layer; "last", the trained head, or the last adapted layer.
        precision: of the prior: "marglik" maximises the marginal likelihood; "validation" takes, of `CANDIDATES`, the
            one whose probit predictive has the smallest negative log-likelihood on the labelled `validation_rows`.
        predictive: as in `Laplace`. batch_size: rows of a forward, and of one backward pass a class.
        memory_limit: bytes that the factors may take up on a device; None for its free memory.

    Raises:
        ConfigError: a setting out of range, an adapter that cannot be covered, or factors that do not fit in memory
            (`factor_bytes`), which is found out before anything is allocated.
        DataError: no rows, or a row that cannot be used. PosteriorError: logits or curvature that are not finite.
    """
    linears = covered_linears(model, layers=layers)
    model, _ = plain_adapter(model)
    _check_fit(task, rows, precision, validation_rows, predictive, batch_size)
    refuse_if_too_large(model, layers=layers, memory_limit=memory_limit)
    model.eval()
    sums = {name: FactorSums(linear) for name, linear in linears.items()}
    for chosen, batch in _batches(model, task, rows, batch_size, progress):
        add_batch(sums, _finite(traced(model, linears, task, batch), chosen))
    factors = {name: sums.pop(name).decomposed() for name in linears}
    if precision == "marglik":
        tau = most_evident([factor.curvature for factor in factors.values()], _square_norm(linears))
    elif validation_rows is not None:
        batches = _batches(model, task, validation_rows, batch_size, progress)
        tau = _validated(model, linears, factors, task, batches)
    else:
        tau = float(precision)
    return LaplacePosterior(model, factors, layers=layers, precision=tau, rows=len(rows), predictive=predictive)


def _square_norm(linears: Mapping[str, nn.Linear]) -> float:
    return sum(linear.weight.detach().double().square().sum().item() for linear in linears.values())


def _validated(
    model: PeftModel,
    linears: Mapping[str, nn.Linear],
    factors: Mapping[str, KroneckerFactor],
    task: Task,
    batches: Iterator[tuple[list[AnyRow], dict[str, Tensor]]],
) -> float:
    """The candidate that gives the labels of all rows the smallest negative log-likelihood; all in one pass."""
    log_probs, labels = [], []
    for rows, batch in batches:
        logits = probit_logits(_finite(traced(model, linears, task, batch), rows), factors, CANDIDATES)
        log_probs.append(logits.double().cpu().log_softmax(-1))
        labels += [row.target for row in rows]
    return best_candidate(torch.cat(log_probs, 1), torch.tensor(labels))


def _batches(
    model: PeftModel, task: Task, rows: Sequence[AnyRow], batch_size: int, progress: bool
) -> Iterator[tuple[list[AnyRow], dict[str, Tensor]]]:
    """The rows and the tensors of each batch: long rows first, so that memory runs out at once or never."""
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
    """The same, or an error that names the first row whose logits are of no use."""
    bad = (forward.logits.isnan() | forward.logits.isposinf()).any(1) | ~forward.present.any(1)
    if bad.any():
        raise PosteriorError(
            f"laplace: the logits of row {rows[int(bad.nonzero()[0, 0])].id!r} are not finite: the adapter's weights, "
            "or the precision, are too large or too small for this model."
        )
    return forward


def _check_fit(
    task: Task,
    rows: Sequence[AnyRow],
    precision: str | float,
    validation_rows: Sequence[AnyRow] | None,
    predictive: str,
    batch_size: int,
) -> None:
    _refuse_predictive(predictive)
    if batch_size < 1:
        raise ConfigError(f"fit_laplace: found batch_size={batch_size}, expected at least 1.")
    if precision not in ("marglik", "validation") and not _is_precision(precision):
        raise ConfigError(f"precision: found {precision!r}, expected 'marglik', 'validation' or a positive number.")
    if (precision == "validation") != (validation_rows is not None):
        found = "none" if validation_rows is None else f"{len(validation_rows)} of them"
        raise ConfigError(
            f"validation_rows: found {found} with precision={precision!r}, expected them with 'validation' only."
        )
    if not rows or validation_rows is not None and not validation_rows:
        raise DataError("fit_laplace: found no rows, expected at least one.")
    for row in validation_rows or ():
        if row.target is None:
            raise DataError(f"fit_laplace: validation row {row.id!r} has no label, expected one.")
    task.check([*rows, *(validation_rows or ())])


def _is_precision(value: object) -> bool:
    return type(value) in (int, float) and isinstance(value, int | float) and 0 < value < math.inf


def _refuse_predictive(predictive: object) -> None:
    if predictive not in PREDICTIVES:
        raise ConfigError(f"predictive: found {predictive!r}, expected one of {PREDICTIVES}.")


def _check_settings(settings: Mapping[str, Any]) -> None:
    expected = {"layers": str, "precision": float, "predictive": str, "rows": int, "names": list}
    if settings.keys() != expected.keys():
        raise PosteriorError(f"laplace: found settings {sorted(settings)}, expected {sorted(expected)}.")
    for key, kind in expected.items():
        if type(settings[key]) is not kind:
            raise PosteriorError(f"laplace: {key}: found {settings[key]!r}, expected a {kind.__name__}.")
    if not _is_precision(settings["precision"]) or settings["rows"] < 1 or settings["predictive"] not in PREDICTIVES:
        raise PosteriorError(f"laplace: found settings {settings} of no fit, expected what `settings` gave.")


def _check_tensors(tensors: Mapping[str, Tensor], linears: Mapping[str, nn.Linear]) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for name, linear in linears.items():
        m, n = linear.out_features, linear.in_features
        expected |= {f"{name}.{part}": shape for part, shape in zip(_PARTS, ((m, m), (m,), (n, n), (n,)), strict=True)}
    if tensors.keys() != expected.keys():
        first = sorted(tensors.keys() ^ expected.keys())[0]
        raise PosteriorError(f"laplace: tensor {first!r} is missing, or not one that the adapter asks for.")
    for key, shape in expected.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != shape or tensor.dtype not in (torch.float32, torch.float64):
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise PosteriorError(f"laplace: tensor {key!r}: found {found}, expected {shape} in float32 or float64.")
        if not tensor.isfinite().all() or key.endswith("_values") and (tensor < 0).any():
            raise PosteriorError(f"laplace: tensor {key!r} holds NaN, infinities or negative eigenvalues.")
