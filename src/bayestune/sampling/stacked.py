"""Several draws in one forward: the rows are repeated for each draw, and the base model runs once for all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bayestune.adapters import RandomLinear, drawn_weights, is_merged, random_layers, row_major_sizes
from bayestune.errors import DrawError
from bayestune.functional import prediction_noise
from bayestune.sampling.base import Sampler
from bayestune.tasks import Task

CPU_TOKENS = 2048
"""Most tokens of a stacked forward on a CPU; larger forwards do not fit in the cache and are not faster."""


class StackedDraws(Sampler):
    """Draws as stacked matrices, [slices, r, n] for each layer of `weights`; other layers use their mean."""

    def __init__(self, model: nn.Module, weights: Mapping[RandomLinear, Tensor], slices: int) -> None:
        self.model, self.weights, self.slices = model, weights, slices

    @classmethod
    def of(cls, model: nn.Module, *, draws: int, seed: int, antithetic: bool = False) -> "StackedDraws":
        """Return draws 0 to `draws` - 1 of every random layer, as `stacked_weights`; the mean for ``draws=0``."""
        if not draws:
            return cls(model, {}, 1)
        return cls(model, stacked_weights(model, range(draws), seed, antithetic=antithetic), draws)

    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        count, first = len(part), part.start
        repeated = {key: value.repeat(count, *[1] * (value.dim() - 1)) for key, value in batch.items()}
        if count == 1:
            with drawn_weights({layer: weight[first] for layer, weight in self.weights.items()}):
                return task.outputs(self.model, repeated).unsqueeze(0)
        drawn = {layer: weight[first : first + count] for layer, weight in self.weights.items()}
        shape = tuple(repeated["input_ids"].shape)
        with drawn_weights(drawn, sizes=row_major_sizes(shape, count)):
            return task.outputs(self.model, repeated).unflatten(0, (count, -1))

    def at_once(self, batch: dict[str, Tensor]) -> int:
        """Return how many draws fit a quarter of the free memory (CPU: `CPU_TOKENS`); 1 if a layer is in an expert."""
        if any(layer.routed for layer in self.weights):
            return 1
        tokens = batch["input_ids"].numel()
        device = batch["input_ids"].device
        if device.type != "cuda":
            return max(1, CPU_TOKENS // tokens)
        free, _ = torch.cuda.mem_get_info(device)
        config: Any = self.model.config
        hidden = config.get_text_config().hidden_size
        # Activations of one layer at a time: about 24 hidden vectors per token (attention, the widest MLP, copies).
        return max(1, int(free / 4 / (24 * hidden * 4 * tokens)))


def sampled_layers(model: nn.Module) -> dict[str, RandomLinear]:
    """Return the active random layers of `model`, by name.

    Raises:
        DrawError: there are none, or the adapter is merged.
    """
    layers = random_layers(model)
    if not layers:
        raise DrawError(
            "the model has no active Gaussian adapter to draw from: use draws=0, or train one with BlobConfig."
        )
    if is_merged(model):
        raise DrawError("the adapter is merged into the base weights, where a draw cannot reach it: unmerge it first.")
    return layers


def stacked_weights(
    model: nn.Module, indices: Sequence[int], seed: int, *, antithetic: bool = False
) -> dict[RandomLinear, Tensor]:
    """Return the matrices of several draws for `drawn_weights`, [len(indices), r, n] per layer.

    Layers of inactive adapters are included: `adapter_names=[...]` or `set_adapter` can use them inside a draw.

    Args:
        model: model with a random adapter.
        indices: indices of the draws.
        seed: seed of the draws.
        antithetic: whether draw 2j has the noise of draw j, and draw 2j + 1 its negative.

    Raises:
        DrawError: as `sampled_layers`.
    """
    named = {layer: name for name, layer in sampled_layers(model).items()}
    for module in model.modules():
        if isinstance(module, RandomLinear):
            named.setdefault(module, module.name)
    weights = {}
    with torch.no_grad():
        for layer, name in named.items():
            shape = tuple(layer.weight.shape)
            if antithetic:
                noise = [(-1) ** k * prediction_noise(seed, k // 2, name, shape) for k in indices]
            else:
                noise = [prediction_noise(seed, k, name, shape) for k in indices]
            weights[layer] = layer.drawn(torch.stack(noise))
    return weights


def single_weights(model: nn.Module, index: int, seed: int) -> dict[RandomLinear, Tensor]:
    """Return the matrices of draw `index` for `drawn_weights`, [r, n] per layer.

    Raises:
        DrawError: as `sampled_layers`.
    """
    return {layer: weight[0] for layer, weight in stacked_weights(model, [index], seed).items()}
