"""The algorithm of the released BLoB code, rewritten from its description as a baseline.

Noise is added to activations with random signs for every token (flipout); the KL is a float64 loss that autograd
differentiates; a second optimizer, plain SGD, moves G along NLL + KL; N draws are N full forwards, each with the
logits of the whole vocabulary at every position. The library does not use this code.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

PRIOR_STD, RHO = 0.2, 0.05


class PerTokenFlipout(nn.Module):
    """``M x + t * ((E * G^2)(u * x))``, E normal, one per forward pass; signs u [.., n] and t [.., r] per token."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.rho = nn.Parameter(torch.empty_like(linear.weight).uniform_(RHO / math.sqrt(2), RHO))

    def forward(self, x: Tensor) -> Tensor:
        mean = F.linear(x, self.weight)
        u = torch.empty_like(x).bernoulli_(0.5).mul_(2).sub_(1)
        t = torch.empty_like(mean).bernoulli_(0.5).mul_(2).sub_(1)
        noise = torch.randn_like(self.weight) * self.rho * self.rho
        return mean + F.linear(x * u, noise) * t

    def kl(self) -> Tensor:
        m, std = self.weight.double(), self.rho.double().square()
        return (math.log(PRIOR_STD) - std.log() + (std.square() + m.square()) / (2 * PRIOR_STD**2) - 0.5).sum()


def take_over(model: PeftModel) -> list[PerTokenFlipout]:
    """Replace every A matrix of a plain LoRA model with a `PerTokenFlipout`, and return these."""
    found = []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for name, linear in list(module.lora_A.items()):
                assert isinstance(linear, nn.Linear)
                module.lora_A[name] = PerTokenFlipout(linear)
                found.append(module.lora_A[name])
    return found


class ReferenceTraining:
    """Training steps of the released code: two losses, two backward passes, two optimizers."""

    def __init__(self, model: PeftModel, loss: Callable[[PeftModel], Tensor]) -> None:
        self.model, self.loss = model, loss
        self.layers = take_over(model)
        rhos = {id(layer.rho) for layer in self.layers}
        means = [p for p in model.parameters() if p.requires_grad and id(p) not in rhos]
        self.adam = torch.optim.AdamW(means, lr=1e-4, eps=1e-6, weight_decay=0.0)
        self.sgd = torch.optim.SGD([p for layer in self.layers for p in (layer.weight, layer.rho)], lr=0.01)

    def step(self, kl_weight: float) -> None:
        loss = self.loss(self.model)
        loss.backward()
        self.adam.step()
        for layer in self.layers:
            layer.weight.grad = None
        kl = torch.stack([layer.kl() for layer in self.layers]).sum() * kl_weight
        kl.backward()
        self.sgd.step()
        self.adam.zero_grad()
        self.sgd.zero_grad()


@torch.no_grad()
def looped(model: PeftModel, logits: Callable[[PeftModel], Tensor], draws: int) -> Tensor:
    """Return the log of the mean probabilities over `draws` forward passes."""
    found = torch.stack([logits(model).log_softmax(-1) for _ in range(draws)])
    return found.logsumexp(0) - math.log(draws)
