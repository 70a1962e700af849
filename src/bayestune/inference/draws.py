"""`draw`: a context in which a Bayesian model is one deterministic function."""

import operator
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import SupportsIndex

from torch import nn

from bayestune.adapters import drawn_weights
from bayestune.errors import ConfigError
from bayestune.sampling.stacked import single_weights

_LOCK = threading.Lock()
_HELD: Counter[nn.Module] = Counter()  # modules to put back in training mode, and how many contexts hold each


@contextmanager
def draw(model: nn.Module, *, index: int = 0, seed: int = 0) -> Iterator[None]:
    """Context in which `model` uses draw (`seed`, `index`): a Gaussian A is ``M + G^2 * noise(seed, index, layer)``.

    The weights are fixed on entry, have no gradient, and are the same for every token, row, batch size, device and
    process. The model is in evaluation mode inside; on exit, also after an exception, its modes and its mean are
    restored. Only the current thread is affected, so threads may hold different draws of one model. A key-value cache
    (`past_key_values`) belongs to the draw that filled it: a forward of another draw, or of the mean, raises an error.
    Compiled code, caches passed by position, and calls of the inner base model are not checked.

    Raises:
        ConfigError: `index` or `seed` is not a whole number, or is below 0.
        DrawError: the model has no Gaussian or dropout adapter, or it is merged into the base weights; or, inside,
            the cache of a different draw is used, or the adapter is merged.
    """
    for name, value in {"index": index, "seed": seed}.items():
        if not isinstance(value, SupportsIndex) or operator.index(value) < 0:
            raise ConfigError(f"draw {name}: found {value!r}, expected a whole number, at least 0.")
    key = operator.index(seed), operator.index(index)
    with evaluation_mode(model), drawn_weights(single_weights(model, index, seed), key=key):
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context in which every module of `model` is in evaluation mode; the modes are restored on exit.

    If several threads are inside, the modes are restored when the last one leaves.
    """
    with _LOCK:
        held = [module for module in model.modules() if module.training or module in _HELD]
        _HELD.update(held)
        for module in held:
            module.training = False
    try:
        yield
    finally:
        with _LOCK:
            _HELD.subtract(held)
            for module in held:
                if _HELD[module] == 0:
                    del _HELD[module]
                    module.training = True
