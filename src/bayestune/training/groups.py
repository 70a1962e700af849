"""What the main optimizer trains."""

from collections.abc import Collection
from typing import Any

from torch import nn

from bayestune.adapters import GaussianLinear


def parameter_groups(
    model: nn.Module, layers: Collection[GaussianLinear], *, decayed: Collection[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Return groups of parameters for an optimizer: M, B and the trained heads, but not G, which the KL step moves.

    Args:
        model: the model.
        layers: its Gaussian layers.
        decayed: names of the parameters that weight decay applies to; it never applies to M, which has the prior.
        weight_decay: the decay of those.
    """
    means, rhos = {id(layer.weight) for layer in layers}, {id(layer.rho) for layer in layers}
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in rhos:
            groups[name in decayed and id(parameter) not in means].append(parameter)
    rates = {True: weight_decay, False: 0.0}
    return [{"params": group, "weight_decay": rates[decays]} for decays, group in groups.items() if group]
