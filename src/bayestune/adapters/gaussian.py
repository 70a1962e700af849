"""`GaussianLinear`: a Gaussian over one matrix of a LoRA pair."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.adapters.random import LayerNoise, RandomLinear
from bayestune.functional import derive_seed, gaussian_kl, std


class GaussianLinear(RandomLinear):
    """BLoB's layer: ``h = A x`` with independent ``A_ij ~ N(M_ij, G_ij^4)``.

    Attributes:
        weight: the mean M, [r, n].
        rho: G, [r, n]; the standard deviation is G * G.
        prior_std: s_p; the prior of each weight is N(0, s_p^2).

    References:
        BLoB: Wang et al. 2024, arXiv 2406.11675, section 3.
    """

    rho: nn.Parameter
    prior_std: float

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, name: str, prior_std: float, rho_init: float) -> "GaussianLinear":
        """Make a layer whose mean is a LoRA matrix, with ``G ~ U(rho_init / sqrt 2, rho_init)`` (as BLoB's code).

        G depends only on `name` and the shape. The global random state is neither read nor changed, so the mean starts
        exactly where plain LoRA with the same seed starts.

        Args:
            linear: the LoRA matrix, whose parameters the layer keeps.
            name: path of the adapted layer in the base model.
            prior_std: s_p, the standard deviation of the prior.
            rho_init: upper bound of the initial G.
        """
        layer = cls.named(linear, name)
        layer.prior_std = prior_std
        rho = torch.empty_like(layer.weight)
        if not rho.is_meta:
            generator = torch.Generator().manual_seed(derive_seed("rho", name))
            uniform = torch.rand(rho.shape, generator=generator, dtype=torch.float32)
            rho.copy_(rho_init * (0.5**0.5 + (1 - 0.5**0.5) * uniform))
        layer.rho = nn.Parameter(rho.detach(), requires_grad=layer.weight.requires_grad)
        return layer

    def kl(self) -> Float[Tensor, ""]:
        """Return ``KL(q || p)`` of this layer in nats, as float64."""
        return gaussian_kl(self.weight, self.rho, self.prior_std)

    def drawn(self, epsilon: Float[Tensor, "*draws r n"]) -> Float[Tensor, "*draws r n"]:
        """Return ``A = M + G^2 * epsilon``, for noise on any device and in any floating dtype."""
        return self.weight + std(self.rho) * epsilon.to(self.weight)

    def perturbed(self, x: Tensor, noise: LayerNoise) -> Tensor:
        if noise.token_seed is not None:
            return self._token_flipout(x, noise.epsilon[0], noise.token_seed)
        return super().perturbed(x, noise)

    def _token_flipout(self, x: Tensor, epsilon: Tensor, seed: int) -> Tensor:
        """Return ``M x + t * ((G^2 * E)(u * x))`` with signs u, t per token (BLoB's released code)."""
        generator = torch.Generator(x.device).manual_seed(seed)
        signs = [
            torch.randint(0, 2, (*x.shape[:-1], size), generator=generator, device=x.device).to(x.dtype) * 2 - 1
            for size in (self.in_features, self.out_features)
        ]
        return F.linear(x, self.weight) + F.linear(x * signs[0], std(self.rho) * epsilon) * signs[1]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, prior_std={self.prior_std}"
