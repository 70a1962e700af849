"""Regression through one Gaussian layer, whose posterior is known in closed form."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from bayestune.adapters import BayesLoraConfig, GaussianLinear, drawn_weights, gaussian_layers
from bayestune.functional import gaussian_kl, gaussian_kl_gradient

PRIOR_STD = 0.05  # as strong as the data: an error in either shows
NOISE_STD = 0.3
ROWS, INPUTS, OUTPUTS, RANK = 40, 4, 3, 2


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted_linear(base: Tensor, up: Tensor, *, estimator: str = "independent", alpha: int = 3) -> PeftModel:
    """y = (W0 + alpha / r B A) x in float64, A Gaussian and as it is made, B fixed to `up` [m, r]."""
    linear = nn.Linear(base.shape[1], base.shape[0], bias=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BayesLoraConfig(
            r=up.shape[1], lora_alpha=alpha, target_modules=["0"], prior_std=PRIOR_STD, estimator=estimator
        )
        model = get_peft_model(nn.Sequential(linear), config).double().train()
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.get_base_layer().weight.copy_(base)
        layer.lora_B["default"].weight.copy_(up)
    layer.lora_B["default"].weight.requires_grad_(False)
    return model


def only_layer(model: PeftModel) -> GaussianLinear:
    (layer,) = gaussian_layers(model).values()
    return layer


@dataclass
class Regression:
    """y = (W0 + c B A) x + e with e ~ N(0, s^2) and A ~ N(0, s_p^2): everything about A is known.

    With `orthogonal` x and B the entries of A are independent in the posterior too, so that mean field is exact.
    """

    estimator: str = "independent"
    orthogonal: bool = False

    def __post_init__(self) -> None:
        self.x, self.base, self.up = (
            randn(ROWS, INPUTS, seed=1),
            randn(OUTPUTS, INPUTS, seed=2),
            randn(OUTPUTS, RANK, seed=3),
        )
        if self.orthogonal:
            self.x, self.up = math.sqrt(ROWS) * torch.linalg.qr(self.x)[0], torch.linalg.qr(self.up)[0]
        self.scaling = 3 / RANK
        self.see(PRIOR_STD * randn(RANK, INPUTS, seed=4), NOISE_STD * randn(ROWS, OUTPUTS, seed=5))
        self.model = adapted_linear(self.base, self.up, estimator=self.estimator)
        self.layer = only_layer(self.model)

    def see(self, truth: Tensor, errors: Tensor) -> None:
        """Take as data what A = `truth` gives, with these errors [ROWS, OUTPUTS]."""
        self.y = self.x @ (self.base + self.scaling * self.up @ truth).T + errors

    @cached_property
    def precision(self) -> Tensor:
        """Of the exact posterior of vec(A), row-major; the same for all data."""
        data = torch.kron(self.up.T @ self.up, self.x.T @ self.x) * self.scaling**2 / NOISE_STD**2
        return data + torch.eye(RANK * INPUTS, dtype=torch.float64) / PRIOR_STD**2

    @property
    def mean(self) -> Tensor:
        residual = self.y - self.x @ self.base.T
        right = self.scaling / NOISE_STD**2 * (self.up.T @ residual.T @ self.x).flatten()
        return torch.linalg.solve(self.precision, right).view(RANK, INPUTS)

    @cached_property
    def deviation(self) -> Tensor:
        """Of the best mean-field Gaussian."""
        return self.precision.diagonal().rsqrt().view(RANK, INPUTS)

    @property
    def log_evidence(self) -> Tensor:
        design = self.scaling * torch.kron(self.up, self.x)  # vec(residual), one output after the other
        noise = NOISE_STD**2 * torch.eye(ROWS * OUTPUTS, dtype=torch.float64)
        marginal = MultivariateNormal(torch.zeros(ROWS * OUTPUTS).double(), noise + PRIOR_STD**2 * design @ design.T)
        return marginal.log_prob((self.y - self.x @ self.base.T).T.flatten())

    def nll(self, output: Tensor, target: Tensor) -> Tensor:
        """Per row, nats."""
        squared = ((output - target) / NOISE_STD).square() / 2
        return (squared + math.log(NOISE_STD) + math.log(2 * math.pi) / 2).sum(-1)

    def log_likelihoods(self, weights: Tensor) -> Tensor:
        """Of all data, for each A of `weights` [K, r, n], through the model."""
        count = len(weights)
        with drawn_weights({self.layer: weights}):
            output = self.model(self.x.repeat(count, 1))
        return -self.nll(output, self.y.repeat(count, 1)).view(count, -1).sum(1)

    def expected_nll(self) -> Tensor:
        """Through stacked draws at the points +-sqrt(D) e_d, whose average integrates any quadratic exactly."""
        size = RANK * INPUTS
        points = math.sqrt(size) * torch.eye(size, dtype=torch.float64)
        epsilon = torch.cat([points, -points]).view(2 * size, RANK, INPUTS)
        return -self.log_likelihoods(self.layer.drawn(epsilon)).mean()

    def exact_elbo(self) -> Tensor:
        return -self.expected_nll() - gaussian_kl(self.layer.weight, self.layer.rho, PRIOR_STD)

    def go_to_optimum(self) -> None:
        with torch.no_grad():
            self.layer.weight.copy_(self.mean)
            self.layer.rho.copy_(self.deviation.sqrt())

    def train_to_optimum(self) -> None:
        """One Newton step in the mean and one natural-gradient step in the variance, both exact on this model.

        Of the gradients that training takes: the NLL's through the model, the KL's in closed form.
        """
        mean, rho = self.layer.weight, self.layer.rho
        parts = zip(
            torch.autograd.grad(self.expected_nll(), (mean, rho)),
            gaussian_kl_gradient(mean.detach(), rho.detach(), PRIOR_STD),
            strict=True,
        )
        d_mean, d_rho = (nll + kl for nll, kl in parts)
        with torch.no_grad():
            mean.sub_(torch.linalg.solve(self.precision, d_mean.flatten()).view_as(mean))
            # With v = G^4: 1/v <- 1/v + 2 dL/dv, and dL/dG = 4 G^3 dL/dv.
            rho.copy_((rho**-4 + d_rho / (2 * rho**3)) ** -0.25)
