"""Bounds from the number of checks, and ways to look inside a forward."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import NormalDist
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from bayestune.adapters import BayesLoraConfig, gaussian_layers
from models import LLAMA, blob


def z_bound(checks: int) -> float:
    """Width in standard errors that `checks` two-sided checks at once leave with probability 1e-6 in all."""
    return NormalDist().inv_cdf(1 - 1e-6 / (2 * checks))


def departure(found: Tensor, expected: Tensor | float, error: Tensor | float) -> float:
    """The largest distance of an entry from what is expected of it, in its standard errors."""
    return ((found - expected).abs() / error).max().item()


def moments_departure(samples: Tensor) -> tuple[float, float]:
    """How far `samples` [draws, columns] are from standard normal and independent, and how far chance can take them.

    Of mean, variance and fourth moment of every column and the correlation of every two, in standard errors.
    """
    count, columns = samples.shape
    products = samples.T @ samples / count
    worst = max(
        departure(samples.mean(0), 0, 1 / math.sqrt(count)),
        departure(samples.var(0), 1, math.sqrt(2 / count)),
        departure((samples**4).mean(0), 3, math.sqrt(96 / count)),  # var(e^4) = 105 - 9
        departure(products - products.diagonal().diag(), 0, 1 / math.sqrt(count)),
    )
    return worst, z_bound(columns * (columns + 6) // 2)


class Sum(nn.Module):
    """Two linear layers side by side: the smallest base with two layers to adapt."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.left = nn.Linear(inputs, outputs, bias=False)
        self.right = nn.Linear(inputs, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


def bayesian_sum(base: nn.Module | None = None, **settings: Any) -> PeftModel:
    """`base`, or Sum(4, 3), in float64 with adapters of rank 2 whose M, G and B are random; in training mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {"r": 2, "lora_alpha": 3, "target_modules": ["left", "right"], **settings}
        model = get_peft_model(base or Sum(4, 3), BayesLoraConfig(**settings)).double()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
            for layer in gaussian_layers(model).values():
                layer.rho.uniform_(0.3, 1.2)
    return model.train()


def double_llama(**settings: Any) -> PeftModel:
    """A Bayesian Llama in float64, in evaluation mode; its draws differ visibly from the mean and from each other."""
    return blob(LLAMA, **settings).double().eval()


@contextmanager
def output_of(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of `layer`."""
    outputs: list[Tensor] = []
    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
    try:
        yield outputs
    finally:
        handle.remove()
