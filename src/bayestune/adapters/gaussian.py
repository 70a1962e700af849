"""`GaussianLinear`: a matrix of a LoRA pair as a Gaussian instead of a point."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.adapters.random import LayerNoise, RandomLinear
from bayestune.functional import derive_seed, gaussian_kl, std


class GaussianLinear(RandomLinear):
    """``h = A x`` with ``A_ij ~ N(M_ij, G_ij^4)``, independent (BLoB, arXiv 2406.11675).

    Attributes:
        weight: the mean M, [r, n].
        rho: G, [r, n]; the standard deviation is G * G.
        prior_std: standard deviation of the prior N(0, prior_std^2) of each weight.
    """

    rho: nn.Parameter
    prior_std: float

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str, prior_std: float, rho_init: float) -> "GaussianLinear":
        """Take over a LoRA A matrix as the mean, with ``G ~ U(rho_init / sqrt 2, rho_init)`` (BLoB, released code).

        G is a fixed function of `name` and the shape: it neither reads nor moves the global random state, so the mean
        starts exactly where plain LoRA with the same seed starts.
        """
        layer = cls.taking_over(linear)
        assert isinstance(layer, cls)
        layer.take_name(name)
        layer.prior_std = prior_std
        rho = torch.empty_like(layer.weight)
        if not rho.is_meta:
            generator = torch.Generator().manual_seed(derive_seed("rho", name))
            uniform = torch.rand(rho.shape, generator=generator, dtype=torch.float32)
            rho.copy_(rho_init * (0.5**0.5 + (1 - 0.5**0.5) * uniform))
        layer.rho = nn.Parameter(rho.detach(), requires_grad=layer.weight.requires_grad)
        return layer

    def kl(self) -> Float[Tensor, ""]:
        """KL of this layer's posterior from its prior, in nats, float64."""
        return gaussian_kl(self.weight, self.rho, self.prior_std)

    def drawn(self, epsilon: Float[Tensor, "*draws r n"]) -> Float[Tensor, "*draws r n"]:
        """``A = M + G^2 * epsilon``, for noise on any device and in any floating dtype."""
        return self.weight + std(self.rho) * epsilon.to(self.weight)

    def perturbed(self, x: Tensor, noise: LayerNoise) -> Tensor:
        if noise.token_seed is not None:
            return self._token_flipout(x, noise.epsilon[0], noise.token_seed)
        return super().perturbed(x, noise)

    def _token_flipout(self, x: Tensor, epsilon: Tensor, seed: int) -> Tensor:
        """``M x + t * ((G^2 * E)(u * x))`` with signs u, t drawn for every token (the paper's released code)."""
        generator = torch.Generator(x.device).manual_seed(seed)
        signs = [
            torch.randint(0, 2, (*x.shape[:-1], size), generator=generator, device=x.device).to(x.dtype) * 2 - 1
            for size in (self.in_features, self.out_features)
        ]
        return F.linear(x, self.weight) + F.linear(x * signs[0], std(self.rho) * epsilon) * signs[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, prior_std={self.prior_std}"
