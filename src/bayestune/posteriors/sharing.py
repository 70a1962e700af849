"""Work that stacked draws have in common: blocks below the first random layer see each row once, not once a draw.

The K copies of a row enter the model together. In the blocks of a layer list that come before its first random layer
they are all alike, so only the first copy goes on, and the last of these blocks hands K copies of its output to the
rest of the model: the cost of draws is that of the blocks that have them.

That the copies are alike is checked, not assumed: something below may tell draws apart, such as a random layer in
front of the blocks, or blocks that are run through twice. Some models carry more from block to block than what a block
returns, such as the keys of earlier layers: there, one copy meets all of them, and unless it broadcasts, which is
right, the forward fails. So who shares must be ready to do without.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bayestune.adapters import RandomLinear

Run = list[nn.Module]
"""Blocks one after the other."""


class CopiesDiffer(Exception):
    """The copies of a row are not alike where a block of `run` begins: nothing can be shared there."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run


def shared_blocks(model: nn.Module, layers: Iterable[RandomLinear]) -> list[Run]:
    """For each layer list of `model` (the outermost `nn.ModuleList`s), its first blocks without any of `layers`.

    None of a compiled model, whose code does not look for hooks that come after it.
    """
    if any("_orig_mod" in module._modules or module._compiled_call_impl is not None for module in model.modules()):
        return []
    random = {id(layer) for layer in layers}
    runs = [
        list(itertools.takewhile(lambda block: not any(id(m) in random for m in block.modules()), blocks))
        for blocks in _outermost_lists(model)
    ]
    return [run for run in runs if run]


@contextmanager
def sharing(runs: Sequence[Run], *, rows: int, copies: int) -> Iterator[None]:
    """Inside, a forward of this thread sends one of the `copies` of each of the `rows` through the blocks of `runs`.

    The copy is the outermost index of dimension 0 of what the model is given. What a block gets is taken to run over
    rows where its dimension 0 is a multiple of their number (choices, heads); a vector never is.

    Raises:
        CopiesDiffer: from the forward.
    """
    owner = threading.get_ident()
    checked: list[Tensor] = []

    def first_copy(tensor: Tensor, run: Run) -> Tensor:
        if tensor.dim() < 2 or not len(tensor) or tensor.shape[0] % (rows * copies):
            return tensor
        one = tensor[: tensor.shape[0] // copies]
        if not any(tensor is other for other in checked):
            if not torch.equal(tensor.unflatten(0, (copies, -1)), one.expand(copies, *one.shape)):
                raise CopiesDiffer(run)
            checked.append(tensor)
        return one

    def all_copies(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or tensor.shape[0] % rows:
            return tensor
        return tensor.repeat(copies, *[1] * (tensor.dim() - 1))

    def narrowing(run: Run) -> Callable[..., tuple[Any, Any] | None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
            if threading.get_ident() != owner:
                return None
            return _mapped(lambda t: first_copy(t, run), args), _mapped(lambda t: first_copy(t, run), kwargs)

        return hook

    def widen(_: nn.Module, __: Any, output: Any) -> Any:
        return _mapped(all_copies, output) if threading.get_ident() == owner else None

    handles = [b.register_forward_pre_hook(narrowing(run), with_kwargs=True) for run in runs for b in run]
    handles += [run[-1].register_forward_hook(widen) for run in runs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from _outermost_lists(child)


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` of each tensor in its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if type(value) in (tuple, list):
        return type(value)(_mapped(function, part) for part in value)
    if type(value) is dict:
        return {key: _mapped(function, part) for key, part in value.items()}
    return value
