"""Key-value caches remember the draw that filled them, so that no other draw reads them.

Compiled code skips both hooks, since it would be compiled again for each draw.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import Cache

from bayestune.adapters.random import current_draw
from bayestune.errors import DrawError


def check_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: refuse a cache that another draw, or the mean, has filled."""
    cache = kwargs.get("past_key_values")
    if torch.compiler.is_compiling() or not isinstance(cache, Cache) or not cache.get_seq_length():
        return
    filled, current = vars(cache).get("filled_in_draw"), current_draw()
    if filled != current:
        raise DrawError(
            f"past_key_values: found a cache of {_name(filled)}, expected one of {_name(current)}: start each draw "
            "from an empty cache."
        )


def mark_cache(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    """Forward hook of the base model: note the draw in the cache that the model returns."""
    if torch.compiler.is_compiling():
        return
    for value in output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ():
        if isinstance(value, Cache):
            vars(value)["filled_in_draw"] = current_draw()


def _name(draw: tuple[int, int] | None) -> str:
    return "the mean" if draw is None else f"draw {draw[1]} of seed {draw[0]}"
