"""`DropoutLinear`: the A matrix of a LoRA pair under dropout masks, which are part of a draw."""

from statistics import NormalDist

from jaxtyping import Float
from torch import Tensor, nn

from bayestune.adapters.random import RandomLinear


class DropoutLinear(RandomLinear):
    """``h = A x`` with ``A = M diag(z) / (1 - p)``, z_j = 1 with probability 1 - p, else 0 (MC dropout).

    Dropout of the inputs of A, as LoRA has it, seen as a distribution over its weights (Gal and Ghahramani,
    arXiv 1506.02142, section 3). A mask belongs to a draw: it is the same for every token of a row, and in a
    prediction for every row, where dropout as usually written takes another one for every token.

    Attributes:
        weight: the mean M, [r, n].
        p: probability that an input is dropped, between 0 and 1.
    """

    p: float

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str, p: float) -> "DropoutLinear":
        """Take over a LoRA A matrix."""
        layer = cls.taking_over(linear)
        assert isinstance(layer, cls)
        layer.take_name(name)
        layer.p = p
        return layer

    def drawn(self, epsilon: Float[Tensor, "*draws r n"]) -> Float[Tensor, "*draws r n"]:
        """``M diag(z) / (1 - p)``, with ``z_j = 1`` where the first row of `epsilon` is below the (1 - p) quantile."""
        kept = epsilon[..., :1, :].to(self.weight) < NormalDist().inv_cdf(1 - self.p)
        return self.weight * kept / (1 - self.p)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, p={self.p}"
