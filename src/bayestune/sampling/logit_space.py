"""The predictive of a Gaussian adapter without sampling weights: outputs linearized about the mean are Gaussian."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.adapters import GaussianLinear, gaussian_layers
from bayestune.errors import DrawError
from bayestune.functional import prediction_noise, std
from bayestune.sampling.base import Sampler
from bayestune.sampling.jacobian import Traced, full_precision, traced
from bayestune.sampling.stacked import sampled_layers
from bayestune.tasks import Task


class LogitDraws(Sampler):
    r"""Draws of the logits: ``f(x) ~ N(f(x; M), J diag(Omega^2) J^T)``, J the Jacobian of the logits by A at M.

    This is exact for a model that is linear in A. If the outputs are logits of classes, only differences from the
    first class matter, so a batch takes one forward and C - 1 backward passes, and a draw takes C - 1 normal numbers.
    Other outputs take one backward pass and one number each. All rows share the normal numbers of a draw, which are
    keyed by the seed and the draw.
    """

    gradients = True

    def __init__(self, model: nn.Module, *, draws: int, seed: int) -> None:
        self.model, self.slices, self.seed = model, draws, seed
        self.layers = gaussian_layers(model)
        if self.layers.keys() != sampled_layers(model).keys():
            raise DrawError("the adapter is not Gaussian (dropout masks are not): draw from it instead.")

    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        forward = traced(self.model, self.layers, task, batch)
        with full_precision(forward.logits):
            mode = forward.logits.detach()
            covariance = difference_covariance if task.has_classes else output_covariance
            root = symmetric_root(covariance(forward, self.layers))
            shape = (root.shape[-1],)
            noise = torch.stack([prediction_noise(self.seed, k, "logits", shape) for k in part])
            spread = torch.einsum("kd,bcd->kbc", noise.to(root), root).to(mode)
            return mode + (F.pad(spread, (1, 0)) if task.has_classes else spread)


def difference_covariance(
    forward: Traced, layers: dict[str, GaussianLinear]
) -> Float[Tensor, "rows differences differences"]:
    """Return ``J diag(Omega^2) J^T`` of the differences ``f_c - f_0``, c = 1, ...; 0 for classes that a row lacks."""
    first, *others = forward.classes
    return _covariance(forward, layers, (vector - first * vector.sum(1, keepdim=True) for vector in others))


def output_covariance(forward: Traced, layers: dict[str, GaussianLinear]) -> Float[Tensor, "rows columns columns"]:
    """Return ``J diag(Omega^2) J^T`` of the outputs."""
    return _covariance(forward, layers, forward.classes)


def _covariance(forward: Traced, layers: dict[str, GaussianLinear], vectors: Iterable[Tensor]) -> Tensor:
    """Return the covariance of ``v . f`` for each pair of `vectors`, per row."""
    dtypes = {name: layer.weight.dtype for name, layer in layers.items()}
    widths = {name: std(layer.rho.detach()).flatten() for name, layer in layers.items()}
    scaled: dict[str, list[Tensor]] = {name: [] for name in layers}
    for jacobians in forward.row_jacobians(vectors, dtypes):
        for name, jacobian in jacobians:
            scaled[name].append(jacobian.flatten(1) * widths[name])
    stacked = [torch.stack(rows, 1) for rows in scaled.values() if rows]
    return torch.stack([(j @ j.transpose(1, 2)).to(forward.logits.device) for j in stacked]).sum(0)


def symmetric_root(covariance: Float[Tensor, "rows d d"]) -> Float[Tensor, "rows d d"]:
    """Return the symmetric R with ``R R = covariance``; the covariance may be singular.

    R is a continuous function of the covariance, so rounding errors stay small. A root made of eigenvectors alone
    would not be continuous, since their signs and bases are arbitrary.
    """
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)
