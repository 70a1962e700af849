"""The optimizer's parameter groups: G is in none of them, and no Gaussian mean is decayed."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from bayestune.adapters import GaussianLinear


def parameter_groups(
    model: nn.Module, gaussian: Iterable[GaussianLinear], decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Group the trainable parameters of `model` except G, which moves with the KL; M has the prior instead of decay.

    Args:
        model: the model in training.
        gaussian: its Gaussian layers.
        decayed: names of the parameters that weight decay applies to, if they are not a mean M.
        weight_decay: of the decayed group.
    """
    layers = list(gaussian)
    rhos, means = {id(layer.rho) for layer in layers}, {id(layer.weight) for layer in layers}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in rhos:
            groups[name in decayed and id(parameter) not in means].append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decay else 0.0}
        for decay, parameters in groups.items()
        if parameters
    ]
