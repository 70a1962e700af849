"""Linearized predictions, ``f(x; theta) = f(x; theta*) + J(x) (theta - theta*)``, of a Gaussian around theta*."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.errors import DrawError
from bayestune.functional import prediction_noise
from bayestune.methods.laplace.kfac import KroneckerFactor
from bayestune.sampling.base import Sampler
from bayestune.sampling.jacobian import Traced, full_precision, traced
from bayestune.tasks import Task

Linears = Mapping[str, nn.Linear]
Factors = Mapping[str, KroneckerFactor]


@dataclass(kw_only=True)
class LinearisedDraws(Sampler):
    """Draws of the weights of the linearized model: ``f_k(x) = f(x; theta*) + J(x) (theta_k - theta*)``.

    ``theta_k - theta*`` is the symmetric root of the posterior covariance times standard normal noise keyed by
    (seed, k, layer). All draws share the backward passes of a batch, one per class.
    """

    gradients = True

    model: nn.Module
    linears: Linears
    steps: dict[str, Tensor]  # [draws, m, n] per layer
    slices: int

    @classmethod
    def of(
        cls, model: nn.Module, linears: Linears, factors: Factors, *, precision: float, draws: int, seed: int
    ) -> "LinearisedDraws":
        """Return draws 0 to `draws` - 1 of `seed`."""
        steps = {}
        for name, factor in factors.items():
            shape = tuple(factor.curvature.shape)
            noise = torch.stack([prediction_noise(seed, k, name, shape) for k in range(draws)])
            steps[name] = factor.covariance_root(noise.to(factor.input_values), precision)
        return cls(model=model, linears=linears, steps=steps, slices=draws)

    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        forward = traced(self.model, self.linears, task, batch)
        with full_precision(forward.logits):
            mode = forward.logits.detach()
            logits = mode.repeat(len(part), 1, 1)
            dtypes = {name: step.dtype for name, step in self.steps.items()}
            for c, jacobians in enumerate(forward.row_jacobians(forward.classes, dtypes)):
                for layer, jacobian in jacobians:
                    steps = self.steps[layer][part.start : part.stop]
                    logits[:, :, c] += (steps.flatten(1) @ jacobian.flatten(1).T).to(logits)
        return logits


@dataclass(kw_only=True)
class ProbitAnswer(Sampler):
    """The one slice of `probit_logits`: the average over all draws in closed form, without separate draws."""

    gradients = True
    slices = 1

    model: nn.Module
    linears: Linears
    factors: Factors
    precision: float

    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        if not task.has_classes:
            raise DrawError(f"probit: found task {task.name} without classes, expected classes; use predictive='mc'.")
        forward = traced(self.model, self.linears, task, batch)
        return probit_logits(forward, self.factors, [self.precision])


def probit_logits(
    forward: Traced, factors: Factors, precisions: Sequence[float]
) -> Float[Tensor, "precisions rows classes"]:
    r"""Return logits whose softmax approximates the average over the posterior, for each prior precision.

    ``kappa_c f_c`` with ``kappa_c = (1 + pi/8 v_c)^(-1/2)`` and ``v_c = (J Sigma J^T)_cc`` (MacKay 1992; Daxberger et
    al., arXiv 2106.14806). f and J are those of the logits minus their mean over the row's classes: logits are defined
    up to a constant per row, and without this the scaled logits would depend on it. Absent classes keep -inf.
    """
    with full_precision(forward.logits):
        logits, present = forward.logits.detach(), forward.present
        counts = present.sum(1, keepdim=True)
        centred = logits - logits.masked_fill(~present, 0.0).sum(1, keepdim=True) / counts
        variances = torch.zeros(len(precisions), *logits.shape, dtype=logits.dtype, device=logits.device)
        vectors = (vector - vector.sum(1, keepdim=True) * present / counts for vector in forward.classes)
        dtypes = {name: factor.input_values.dtype for name, factor in factors.items()}
        for c, jacobians in enumerate(forward.row_jacobians(vectors, dtypes)):
            for layer, jacobian in jacobians:
                curvature = factors[layer].curvature.flatten().unsqueeze(1)
                spreads = (curvature + curvature.new_tensor(precisions)).reciprocal()
                squares = factors[layer].in_eigenbasis(jacobian).flatten(1).square()
                variances[:, :, c] += (squares @ spreads).T.to(variances)
        return centred * (1 + math.pi / 8 * variances).rsqrt()
