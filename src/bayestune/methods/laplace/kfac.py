"""K-FAC: the curvature of the log-likelihood in the weight of a linear layer, as a Kronecker product.

curvlinops, which computes the same factors, is not used here: it needs torchvision and weights that require
gradients, and it counts padding as data.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.errors import PosteriorError
from bayestune.methods.laplace.linears import factor_dtype
from bayestune.sampling.jacobian import Traced, full_precision
from bayestune.tasks import Task

ROUNDINGS = 1000
"""A gradient below this many machine epsilons, relative to the largest one of its row, counts as rounding error."""


class FactorSums:
    """The sums of K-FAC over a data set, for one layer with weights [m, n].

    Its block of the generalized Gauss-Newton matrix (the Fisher of "type 2", exact over the classes) becomes
    ``G (x) A``. Here ``G = sum_rows sum_t J_t^T Lambda J_t`` [m, m], where J_t is the Jacobian of a row's logits with
    respect to the output at position t and ``Lambda = diag(p) - p p^T``, and ``A = mean over positions of a a^T``
    [n, n], where a is the layer's input (Martens and Grosse, arXiv 1503.05671; "expand" of Eschenhagen et al., arXiv
    2311.00636, the default of laplace-torch). G is a sum over the data set, not a mean. For one row with one position
    the product is exact.

    A position that affects no logit (padding, the filler of an absent choice, tokens that the head does not read, the
    query of a token that sees only itself) is not data and is left out of A, so the factors do not depend on how rows
    are batched. laplace-torch counts such positions; without any, the factors are the same.
    """

    def __init__(self, linear: nn.Linear) -> None:
        kind = {"device": linear.weight.device, "dtype": factor_dtype(linear)}
        self.outputs = torch.zeros(linear.out_features, linear.out_features, **kind)
        self.inputs = torch.zeros(linear.in_features, linear.in_features, **kind)
        self.positions = 0

    def add_gradient(self, gradient: Float[Tensor, "positions m"]) -> None:
        self.outputs.addmm_(gradient.T, gradient)

    def add_inputs(self, inputs: Float[Tensor, "positions n"]) -> None:
        self.inputs.addmm_(inputs.T, inputs)
        self.positions += len(inputs)

    def decomposed(self) -> "KroneckerFactor":
        """Replace both factors with their eigenvectors and eigenvalues, one matrix at a time to save memory."""
        output_values, output_vectors = _eigen(self.outputs)
        del self.outputs
        input_values, input_vectors = _eigen(self.inputs.div_(max(self.positions, 1)))
        del self.inputs
        return KroneckerFactor(output_vectors, output_values, input_vectors, input_values)


@dataclass(frozen=True)
class KroneckerFactor:
    """The curvature of one layer, ``G (x) A``, as the eigenvectors U of G and V of A and their eigenvalues.

    With a prior N(0, 1 / precision) on every weight, the posterior of W [m, n] has the covariance
    ``(U (x) V) diag(1 / (curvature + precision)) (U (x) V)^T``, with curvature = outer(values of G, values of A).
    """

    output_vectors: Float[Tensor, "m m"]
    output_values: Float[Tensor, " m"]
    input_vectors: Float[Tensor, "n n"]
    input_values: Float[Tensor, " n"]

    def to(self, device: torch.device) -> "KroneckerFactor":
        """Return a copy on `device`."""
        return KroneckerFactor(*(getattr(self, field.name).to(device) for field in fields(self)))

    @property
    def curvature(self) -> Float[Tensor, "m n"]:
        """Eigenvalues of ``G (x) A``."""
        return torch.outer(self.output_values, self.input_values)

    def in_eigenbasis(self, weights: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch m n"]:
        """Return ``U^T W V``."""
        return self.output_vectors.T @ weights @ self.input_vectors

    def covariance_root(self, noise: Float[Tensor, "*batch m n"], precision: float) -> Float[Tensor, "*batch m n"]:
        """Multiply `noise` by the symmetric root of the covariance; the choice of eigenvectors does not matter."""
        with full_precision(noise):
            scaled = self.in_eigenbasis(noise) * (self.curvature + precision).rsqrt()
            return self.output_vectors @ scaled @ self.input_vectors.T


def add_batch(sums: Mapping[str, FactorSums], batch: Traced, task: Task) -> None:
    """Add one batch to the factors of its layers, with one backward pass per root (C - 1 roots for C classes).

    ``Lambda = sum_c v_c v_c^T`` with the v_c of `task.loss_roots`, so pass c adds the outer products of the gradients
    of ``v_c . outputs``.
    """
    largest: dict[int, Tensor] = {}
    with full_precision(batch.logits):
        for gradients in batch.gradients(task.loss_roots(batch.logits.detach())):
            for call, gradient in gradients:
                flat = gradient.reshape(-1, gradient.shape[-1]).to(sums[call.layer].outputs.dtype)
                sums[call.layer].add_gradient(flat)
                size = flat.abs().amax(1)
                largest[id(call)] = size.maximum(largest[id(call)]) if id(call) in largest else size
        for call in batch.calls:
            if id(call) in largest:
                layer = sums[call.layer]
                by_row = largest[id(call)].view(len(batch.logits), -1)
                rounding = ROUNDINGS * torch.finfo(by_row.dtype).eps * by_row.amax(1, keepdim=True)
                layer.add_inputs(call.positions(layer.inputs.dtype)[(by_row > rounding).flatten()])


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues, clamped to at least 0, and the eigenvectors of a positive semi-definite matrix."""
    if not matrix.isfinite().all():
        raise PosteriorError("the curvature is not finite: the adapter's weights are too large for this model.")
    values, vectors = torch.linalg.eigh(matrix)
    return values.clamp(min=0), vectors.contiguous()
