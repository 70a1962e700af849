r"""TFB turns any finished LoRA adapter into a posterior, without gradients (Shi et al. 2024, arXiv 2412.05723).

With the singular value decomposition ``B = U diag(d) V^T`` of a layer's B, the same product is
``B' A' = (U diag(d)) (V^T A)``, and noise of standard deviation

    Omega_ij = sigma_q / d_i

on A'_ij gives every column of B'A' the covariance ``sigma_q^2 U U^T``: the same width in each direction that B can
move in, with one number sigma_q for the whole model. This is the covariance of BA before the scaling alpha / r.
sigma_q is the largest value whose loss on some anchor rows stays within a tolerance of the loss at the mean. The
result is an ordinary BAYES_LORA adapter with ``M = A'`` and ``G = sqrt(Omega)``.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import Field
from torch import Tensor
from tqdm.auto import tqdm

from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneWarning, ConfigError, DataError
from bayestune.functional import derive_seed
from bayestune.inference.predict import predict
from bayestune.methods.base import Fitting, PostHocMethod, plain_adapter
from bayestune.methods.mle import Mle
from bayestune.methods.search import SigmaSearch, search_sigma
from bayestune.sampling import Variational
from bayestune.settings import LARGEST_WHOLE
from bayestune.storage.state import (
    adapter_config,
    adapter_tensors,
    as_bayesian,
    check_values,
    config_fault,
    lora_layers,
)
from bayestune.tasks import AnyRow, Task

ITERATIONS = 8
"""Bisections of a search, which then knows log sigma to 1/256 of its range."""
NOTHING = 1e-18
"""A singular value below this counts as 0, so that no standard deviation overflows float32."""


def fit_tfb(
    model: PeftModel,
    loss: Callable[[PeftModel], float],
    *,
    tolerance: float = 0.003,
    low: float = 1e-4,
    high: float = 1.0,
    iterations: int = ITERATIONS,
) -> tuple[PeftModel, SigmaSearch]:
    """Turn a finished LoRA adapter into a posterior (module docstring); return it and the search for its width.

    The base model is not copied: `model` is taken apart, and the returned model, with the same base weights bit for
    bit, takes its place. If anything fails, `model` is restored. Scaling, ranks and `modules_to_save` are those of
    the adapter. A direction that B cannot move in (rank below r, or B = 0) gets no noise: a singular value within the
    rounding of B's entries counts as 0, and so does its column of B'. Its row of A' gets the width of the layer's
    largest singular value (sigma_q if B = 0), which then has no effect.

    Args:
        model: a PeftModel with one plain LoRA adapter that is not merged.
        loss: returns the loss of a BAYES_LORA model, such as `anchor_loss(task, rows)`; it is called with the same
            model at different widths, first at width 0.
        tolerance, low, high, iterations: as in `search_sigma`; the paper's tolerance on the mean NLL is 0.3 %.

    Returns:
        The model with a BAYES_LORA adapter named "default", frozen and in evaluation mode, and the search.

    Raises:
        ConfigError: `model` does not have exactly one plain LoRA adapter, a setting of the adapter cannot be used
            with a posterior, or as `search_sigma`.
        PosteriorError: the adapter contains NaN or infinities, or as `search_sigma`.
    """
    adapter = _convertible(model)
    with _put_back_on_failure(model):
        blob, singular = _converted(model, adapter)

        def loss_at(sigma: float) -> float:
            _set_width(blob, singular, sigma)
            return loss(blob)

        search = search_sigma(loss_at, tolerance=tolerance, low=low, high=high, iterations=iterations)
        _set_width(blob, singular, search.sigma)
    return blob, search


def anchor_loss(
    task: Task, rows: Sequence[AnyRow], *, draws: int = 10, seed: int = 0, batch_size: int = 8
) -> Callable[[PeftModel], float]:
    """Return a function that computes a model's mean NLL (nats per row) of its predictive over `rows`, for `fit_tfb`.

    Every call uses the same `draws` draws, so that losses at two widths differ only because of the widths. The draws
    depend on `seed`, but are not those of `predict` with the same seed.

    Raises:
        ConfigError: `draws` is below 1, or the task has no classes.
        DataError: a row has no label.
    """
    _check_task(task)
    if draws < 1:
        raise ConfigError(f"anchor_loss: found draws={draws}, expected at least 1.")
    for row in rows:
        if row.target is None:
            raise DataError(f"anchor_loss: row {row.id!r} has no label, expected labeled anchor rows.")

    noise = derive_seed("anchor", seed)

    def loss(model: PeftModel) -> float:
        return predict(model, task, rows, draws=draws, seed=noise, batch_size=batch_size).row_nll().mean().item()

    return loss


def _check_task(task: Task) -> None:
    """Raise a ConfigError for a density, because a relative change of its NLL depends on the unit of the target."""
    if not task.has_classes:
        raise ConfigError(
            f"tfb: found task {task.name} without classes, expected classes: the tolerance is a share of their NLL."
        )


def rotated(
    a: Float[Tensor, "r n"], b: Float[Tensor, "m r"]
) -> tuple[Float[Tensor, "r n"], Float[Tensor, "m r"], Float[Tensor, " r"]]:
    """Return ``A' = V^T A``, ``B' = U diag(d)`` and d for ``B = U diag(d) V^T``, in float64 on the CPU; ``B'A' = BA``.

    A singular value within the rounding of B's entries, ``eps ||B||_F`` with the eps of B's dtype (or within that of
    the decomposition itself, r eps of float64), is returned as 0.
    """
    m, r = b.shape
    wide = torch.cat([b.detach().cpu().double(), torch.zeros(max(r - m, 0), r, dtype=torch.float64)])
    u, d, v_t = torch.linalg.svd(wide, full_matrices=False)
    rounding = max(torch.finfo(b.dtype).eps, r * torch.finfo(torch.float64).eps)
    d = torch.where(d > max(rounding * d.norm().item(), NOTHING), d, 0.0)
    return v_t @ a.detach().cpu().double(), (u * d)[:m], d


def _convertible(model: PeftModel) -> str:
    """Return the name of the only adapter of `model`; raise an error if it cannot be made a posterior."""
    model, adapter = plain_adapter(model, by="tfb")
    if len(model.peft_config) > 1:
        raise ConfigError(f"tfb: found adapters {sorted(model.peft_config)}, expected one: delete_adapter the others.")
    fault = config_fault(adapter_config(model, adapter), "point")
    if fault:
        raise ConfigError(f"tfb: the adapter cannot be made a posterior: {fault}.")
    check_values(adapter_tensors(model, adapter))
    return adapter


@contextmanager
def _put_back_on_failure(model: PeftModel) -> Iterator[None]:
    """Put the adapted layers of `model` back in their places if an exception leaves this context."""
    base: Any = model.get_base_model()
    modes = [(module, module.training) for module in model.modules()]
    replaced = {
        path: module for path, module in base.named_modules() if isinstance(module, LoraLayer | ModulesToSaveWrapper)
    }
    try:
        yield
    except BaseException:
        for path, module in replaced.items():
            base.set_submodule(path, module)
        base.peft_config = model.peft_config
        for module, training in modes:
            module.training = training
        raise


@torch.no_grad()
def _converted(model: PeftModel, adapter: str) -> tuple[PeftModel, dict[str, Tensor]]:
    """Take `model` apart; return its base with the adapter as a BAYES_LORA one, and the singular values d by layer."""
    layers, plain = lora_layers(model, adapter), adapter_tensors(model, adapter)
    blob = as_bayesian(model, adapter)
    tensors, singular = adapter_tensors(blob, "default"), {}
    for path in layers:
        a, b = (f"base_model.model.{path}.lora_{matrix}.weight" for matrix in "AB")
        turned, scaled, singular[path] = rotated(plain[a], plain[b])
        tensors[a].copy_(turned)
        tensors[b].copy_(scaled)
    return blob, singular


@torch.no_grad()
def _set_width(blob: PeftModel, singular: dict[str, Tensor], sigma: float) -> None:
    """Set ``Omega_ij = sigma / d_i`` in every layer."""
    for name, layer in gaussian_layers(blob).items():
        d = singular[name]
        largest = d.max() if d.max() > 0 else torch.ones((), dtype=d.dtype)
        layer.rho.copy_((sigma / torch.where(d > 0, d, largest)).sqrt()[:, None].expand_as(layer.rho))


class Tfb(PostHocMethod):
    """The widest posterior whose NLL on `anchor_rows` sampled training rows stays within the tolerance."""

    name = "tfb"
    label = "TFB"
    summary = "training-free: the widest Gaussian over A that keeps the NLL of a finished adapter"
    paper = "Shi et al. 2024, arXiv 2412.05723"
    posterior = Variational
    start = Mle

    tolerance: float = Field(0.003, gt=0, description="Largest relative change of the NLL.")
    anchor_rows: int = Field(
        200, ge=1, le=LARGEST_WHOLE, description="Training rows to measure that change on, 11 times."
    )

    def check_task(self, task: Task) -> None:
        _check_task(task)

    def fit_to(self, model: PeftModel, run: Fitting) -> Variational:
        generator = torch.Generator().manual_seed(derive_seed("anchor rows", run.seed))
        chosen = torch.randperm(len(run.rows), generator=generator)[: self.anchor_rows].tolist()
        rows = [run.rows[i] for i in chosen]
        draws = run.draws or Variational.default_draws
        loss = anchor_loss(run.task, rows, draws=draws, seed=run.seed)
        passes = 3 + ITERATIONS  # 0 and both ends of the range come first
        with run.precision(), tqdm(total=passes, desc="tfb", unit="pass", disable=not run.progress) as bar:

            def counted(posterior: PeftModel) -> float:
                value = loss(posterior)
                bar.update()
                return value

            fitted, search = fit_tfb(model, counted, tolerance=self.tolerance, iterations=ITERATIONS)
        if search.at_high:
            warnings.warn(
                f"tfb: sigma_q = {search.sigma:g}, the upper end of the search, is within the tolerance: the "
                "posterior could be wider.",
                BayestuneWarning,
                stacklevel=2,
            )
        return Variational(fitted)
