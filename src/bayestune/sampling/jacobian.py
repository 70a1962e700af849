"""Gradients of logits with respect to the outputs of linear layers: one backward pass for a whole batch of rows.

Shape legend: n inputs and m outputs of a layer, weights [m, n]; positions are the tokens (or rows) that a layer sees.
"""

import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bayestune.adapters import row_major_sizes
from bayestune.errors import ConfigError
from bayestune.tasks import Task


@dataclass(frozen=True)
class Call:
    """One call of a linear layer in a forward: its input [..., n] and its output [..., m], which is in the graph."""

    layer: str
    inputs: Tensor
    outputs: Tensor

    def positions(self, dtype: torch.dtype) -> Float[Tensor, "positions n"]:
        """Return the inputs as a list of positions."""
        return self.inputs.reshape(-1, self.inputs.shape[-1]).to(dtype)

    def row_jacobian(self, gradient: Tensor, rows: int, dtype: torch.dtype) -> Float[Tensor, "rows m n"]:
        """Return ``sum_t g_t a_t^T`` over the positions t of each row, for the gradient g of the outputs."""
        inputs = self.positions(dtype).unflatten(0, (rows, -1))
        return gradient.reshape(rows, -1, gradient.shape[-1]).to(dtype).transpose(1, 2) @ inputs


@dataclass(frozen=True)
class Traced:
    """A forward of one batch: its logits, in the graph, and the recorded calls of layers."""

    logits: Tensor
    calls: list[Call]

    @property
    def present(self) -> Tensor:
        """Return which classes each row has, [rows, classes]; absent ones have logits of -inf."""
        return ~self.logits.detach().isneginf()

    @property
    def classes(self) -> Iterator[Float[Tensor, "rows classes"]]:
        """Yield the unit vector of each class, which is 0 in rows that lack it."""
        for c in range(self.logits.shape[1]):
            vector = torch.zeros_like(self.logits, requires_grad=False)
            vector[:, c] = self.present[:, c].to(vector)
            yield vector

    def gradients(self, vectors: Iterable[Tensor]) -> Iterator[list[tuple[Call, Tensor]]]:
        """Yield for each v the gradient of ``sum_rows v . logits`` by the outputs of each call, and keep the graph.

        Calls that do not affect the logits are left out.
        """
        outputs = [call.outputs for call in self.calls]
        for vector in vectors:
            gradients = torch.autograd.grad(self.logits, outputs, vector, retain_graph=True, allow_unused=True)
            yield [(call, g) for call, g in zip(self.calls, gradients, strict=True) if g is not None]

    def row_jacobians(
        self, vectors: Iterable[Float[Tensor, "rows classes"]], dtypes: Mapping[str, torch.dtype]
    ) -> Iterator[Iterator[tuple[str, Float[Tensor, "rows m n"]]]]:
        """Yield for each v the gradient of every row's ``v . logits`` by the weight of each layer.

        If a layer is called several times, its gradients are added up, since it has one weight.
        """
        for gradients in self.gradients(vectors):
            by_layer: dict[str, list[tuple[Call, Tensor]]] = defaultdict(list)
            for call, gradient in gradients:
                by_layer[call.layer].append((call, gradient))
            yield ((layer, self._row_jacobian(pairs, dtypes[layer])) for layer, pairs in by_layer.items())

    def _row_jacobian(self, pairs: Iterable[tuple[Call, Tensor]], dtype: torch.dtype) -> Tensor:
        return reduce(torch.add, (call.row_jacobian(g, len(self.logits), dtype) for call, g in pairs))


def traced(model: nn.Module, linears: Mapping[str, nn.Linear], task: Task, batch: dict[str, Tensor]) -> Traced:
    """Run a forward with gradients, even if no parameter requires them, and record the calls of `linears`.

    Calls from other threads are not recorded.

    Raises:
        ConfigError: the logits do not depend on any of `linears`, or a layer's input does not run over rows first.
    """
    calls: list[Call] = []
    handles = [_watch(linear, name, calls) for name, linear in linears.items()]
    try:
        with torch.enable_grad():
            logits = task.outputs(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if not calls or not logits.requires_grad:
        raise ConfigError(f"the logits of task {task.name!r} do not depend on any of the layers {list(linears)[:3]}.")
    shape = tuple(batch["input_ids"].shape)
    sizes = row_major_sizes(shape, shape[0])
    for call in calls:
        if call.inputs.shape[0] not in sizes:
            raise ConfigError(
                f"layer {call.layer!r}: found an input of shape {tuple(call.inputs.shape)} for a batch of {shape}, "
                "expected rows first: its rows cannot be told apart; leave it out of target_modules."
            )
    return Traced(logits, calls)


def full_precision(tensor: Tensor) -> torch.autocast:
    """Context without autocast, so that sums and roots of the curvature are not rounded to half precision."""
    return torch.autocast(tensor.device.type, enabled=False)


def _watch(linear: nn.Linear, name: str, calls: list[Call]) -> RemovableHandle:
    owner = threading.get_ident()

    def record(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if threading.get_ident() == owner:
            # A frozen adapter starts its graph here; no parameter's requires_grad is touched.
            calls.append(Call(name, inputs[0].detach(), output if output.requires_grad else output.requires_grad_()))

    return linear.register_forward_hook(record)
