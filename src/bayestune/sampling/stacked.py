"""Several draws in one forward: rows are repeated, the draw outermost, and the base model runs once for all."""

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
"""Tokens of one stacked forward on a CPU; larger forwards leave the cache and are not faster."""


class StackedDraws(Sampler):
    """Draws given by their matrices, [slices, r, n] for each layer of `weights`; other layers use their mean."""

    def __init__(self, model: nn.Module, weights: Mapping[RandomLinear, Tensor], slices: int) -> None:
        self.model, self.weights, self.slices = model, weights, slices

    @classmethod
    def of(cls, model: nn.Module, *, draws: int, seed: int, antithetic: bool = False) -> "StackedDraws":
        """Return draws 0 to `draws` - 1 of every random layer of `model`.

        Args:
            model: the model; any model for ``draws=0``.
            draws: number of draws; 0 for the mean.
            seed: seed of the draws.
            antithetic: whether draw 2j has the noise of draw j, and draw 2j + 1 its negative.

        Raises:
            DrawError: draws were asked of a model without a random adapter, or with a merged one.
        """
        if not draws:
            return cls(model, {}, 1)
        return cls(model, stacked_weights(model, range(draws), seed, antithetic=antithetic), draws)

    def outputs(self, task: Task, batch: dict[str, Tensor], part: range) -> Float[Tensor, "draws rows classes"]:
        """Run one forward with the rows repeated for each draw of `part`."""
        count, first = len(part), part.start
        repeated = {key: value.repeat(count, *[1] * (value.dim() - 1)) for key, value in batch.items()}
        drawn = {
            layer: weight[first : first + count] if count > 1 else weight[first]
            for layer, weight in self.weights.items()
        }
        if count == 1:
            with drawn_weights(drawn):
                return task.outputs(self.model, repeated).unsqueeze(0)
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

    Args:
        model: model with a random adapter.
        indices: indices of the draws.
        seed: seed of the draws.
        antithetic: as in `StackedDraws.of`.

    Raises:
        DrawError: as `sampled_layers`.
    """
    weights = {}
    with torch.no_grad():
        for name, layer in _named(model):
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


def _named(model: nn.Module) -> list[tuple[str, RandomLinear]]:
    """Return every random layer with the name of its noise, including those of inactive adapters.

    An inactive adapter can be used inside a draw by `adapter_names=[...]` or `set_adapter`.
    """
    active = sampled_layers(model)
    seen = {id(layer) for layer in active.values()}
    others = [m for m in model.modules() if isinstance(m, RandomLinear) and id(m) not in seen]
    return [*active.items(), *((layer.name, layer) for layer in others)]
