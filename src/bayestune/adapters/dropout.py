"""`DropoutLinear`: the A matrix of a LoRA pair under dropout masks that belong to a draw."""

from statistics import NormalDist

from jaxtyping import Float
from torch import Tensor, nn

from bayestune.adapters.random import RandomLinear


class DropoutLinear(RandomLinear):
    """MC dropout: ``h = A x`` with ``A = M diag(z) / (1 - p)``, where z_j = 1 with probability 1 - p, else 0.

    LoRA's dropout of the inputs of A is read as a distribution over A. One mask belongs to one draw: it is shared by
    all tokens of a row and, in a prediction, by all rows. Ordinary dropout samples a new mask for every token.

    Attributes:
        weight: the mean M, [r, n].
        p: probability that an input is dropped, between 0 and 1.

    References:
        Gal and Ghahramani 2016, arXiv 1506.02142, section 3.
    """

    p: float

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str, p: float) -> "DropoutLinear":
        """Make a layer from the LoRA A matrix of the adapted layer `name`; it keeps the matrix's parameters."""
        layer = cls.named(linear, name)
        layer.p = p
        return layer

    def drawn(self, epsilon: Float[Tensor, "*draws r n"]) -> Float[Tensor, "*draws r n"]:
        """Return ``M diag(z) / (1 - p)``; z_j = 1 where the first row of `epsilon` is below the (1 - p) quantile."""
        kept = epsilon[..., :1, :].to(self.weight) < NormalDist().inv_cdf(1 - self.p)
        return self.weight * kept / (1 - self.p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
