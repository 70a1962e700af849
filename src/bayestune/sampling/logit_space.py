"""The predictive of a Gaussian adapter without drawing weights: logits linearised about the mean are Gaussian."""

import torch
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

    Exact for a model that is linear in A. Only the differences of the logits to those of the first class matter, so
    one forward and C - 1 backward passes give all of a batch; draws of C - 1 numbers a row then cost nothing. All
    rows share the normal numbers of a draw, which are keyed by the seed and the draw.
    """

    gradients = True

    def __init__(self, model: nn.Module, *, draws: int, seed: int) -> None:
        self.model, self.slices, self.seed = model, draws, seed
        self.layers = _gaussians(model)
        self._noise = torch.empty(0, 0)

    def at_once(self, batch: dict[str, Tensor]) -> int:
        """All: they share the backward passes."""
        return self.slices

    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        """The mean's logits plus normal noise of the covariance of each row."""
        forward = traced(self.model, self.layers, task, batch)
        with full_precision(forward.logits):
            mode = forward.logits.detach()
            root = symmetric_root(difference_covariance(forward, self.layers))
            noise = self._numbers(root.shape[-1])[part.start : part.stop].to(root)
            spread = torch.einsum("kd,bcd->kbc", noise, root).to(mode)
            return mode + torch.cat([torch.zeros_like(spread[..., :1]), spread], -1)

    def _numbers(self, size: int) -> Float[Tensor, "slices size"]:
        """Standard normal numbers, `size` for each draw."""
        if self._noise.shape != (self.slices, size):
            noise = [prediction_noise(self.seed, k, "logits", (size,)) for k in range(self.slices)]
            self._noise = torch.stack(noise)
        return self._noise


def difference_covariance(
    forward: Traced, layers: dict[str, GaussianLinear]
) -> Float[Tensor, "rows differences differences"]:
    """``J diag(Omega^2) J^T`` of the differences ``f_c - f_0``, c = 1, ...; 0 for a class that a row does not have."""
    first, *others = forward.classes
    vectors = (vector - first * vector.sum(1, keepdim=True) for vector in others)
    dtypes = {name: layer.weight.dtype for name, layer in layers.items()}
    widths = {name: std(layer.rho.detach()).flatten() for name, layer in layers.items()}
    scaled: dict[str, list[Tensor]] = {name: [] for name in layers}
    for jacobians in forward.row_jacobians(vectors, dtypes):
        for name, jacobian in jacobians:
            scaled[name].append(jacobian.flatten(1) * widths[name])
    stacked = [torch.stack(rows, 1) for rows in scaled.values() if rows]
    return torch.stack([j @ j.transpose(1, 2) for j in stacked]).sum(0)


def symmetric_root(covariance: Float[Tensor, "rows d d"]) -> Float[Tensor, "rows d d"]:
    """The symmetric R with ``R R = covariance``, which may be singular: a continuous function of it.

    So rounding of the covariance stays rounding of R, where signs and bases of its eigenvectors are anyone's guess.
    """
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.transpose(-1, -2)


def _gaussians(model: nn.Module) -> dict[str, GaussianLinear]:
    layers = sampled_layers(model)
    found = gaussian_layers(model)
    if found.keys() != layers.keys():
        raise DrawError("the adapter is not Gaussian (dropout masks are not): draw from it instead.")
    return found
