"""Work that stacked draws have in common: blocks below the first random layer see each row once, not once a draw.

The K copies of a row enter the model together. In the blocks of a layer list that come before its first random layer
they are all alike, so only the first copy goes on, and the last of these blocks hands K copies of its output to the
rest of the model: the cost of draws is that of the blocks that have them.

That the copies are alike is checked, not assumed, where the blocks begin and again where they end: something below may
tell draws apart, such as a random layer in front of the blocks, blocks that are run through twice, or blocks that
write into what they are given. Only models of transformers itself are shared: the blocks of another may hand on more
than they return. A forward that fails may fail for the sharing, so who shares must be ready to do without.
"""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayestune.adapters import RandomLinear
from bayestune.adapters.random import sizes_kept, swap_sizes

Run = list[nn.Module]
"""Blocks one after the other."""


class CopiesDiffer(Exception):
    """The copies of a row are not alike where a block of `run` begins: nothing can be shared there."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.run = run


def shared_blocks(model: nn.Module, layers: Iterable[RandomLinear]) -> list[Run]:
    """For each layer list of `model` (the outermost `nn.ModuleList`s), its first blocks without any of `layers`.

    None of a compiled model, whose code does not look for hooks that come after it, nor of one that is not of
    transformers itself.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not type(base).__module__.startswith("transformers."):
        return []
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
    handles = [handle for run in runs for handle in _Narrowed(run, rows, copies, owner).hooks()]
    try:
        with sizes_kept():
            yield
    finally:
        for handle in handles:
            handle.remove()


class _Narrowed:
    """The passage of one forward through the blocks of a run: what was checked, and what has one copy already."""

    def __init__(self, run: Run, rows: int, copies: int, owner: int) -> None:
        self.run, self.rows, self.copies, self.owner = run, rows, copies, owner
        self._checked: list[Tensor] = []
        self._single: list[Tensor] = []
        self._sizes: frozenset[int] | None = None

    def hooks(self) -> Iterator[RemovableHandle]:
        for block in self.run:
            yield block.register_forward_pre_hook(self._enter, with_kwargs=True)
            yield block.register_forward_hook(self._leave)

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        if threading.get_ident() != self.owner:
            return None
        narrow = _mapped(self._first_copy, args), _mapped(self._first_copy, kwargs)
        self._sizes = swap_sizes(frozenset())  # a random layer in here, though not of this block, refuses
        return narrow

    def _leave(self, block: nn.Module, args: Any, output: Any) -> Any:
        if threading.get_ident() != self.owner:
            return None
        swap_sizes(self._sizes)
        if not self._checked:
            return None  # the block was not given copies
        if block is not self.run[-1]:
            return _mapped(self._remember, output)
        for tensor in self._checked:
            self._refuse_unlike(tensor)  # the block may have written into one of them
        widened = _mapped(self._all_copies, output)
        self._checked, self._single = [], []
        return widened

    def _first_copy(self, tensor: Tensor) -> Tensor:
        if any(tensor is one for one in self._single):
            return tensor
        if tensor.dim() < 2 or not len(tensor) or len(tensor) % (self.rows * self.copies):
            return tensor
        if not any(tensor is other for other in self._checked):
            self._refuse_unlike(tensor)
            self._checked.append(tensor)
        return self._remember(tensor[: len(tensor) // self.copies])

    def _refuse_unlike(self, tensor: Tensor) -> None:
        one = tensor[: len(tensor) // self.copies]
        if not torch.equal(tensor.unflatten(0, (self.copies, -1)), one.expand(self.copies, *one.shape)):
            raise CopiesDiffer(self.run)

    def _remember(self, tensor: Tensor) -> Tensor:
        self._single.append(tensor)
        return tensor

    def _all_copies(self, tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or len(tensor) % self.rows:
            return tensor
        return tensor.repeat(self.copies, *[1] * (tensor.dim() - 1))


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
