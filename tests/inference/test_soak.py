"""Many calls: what a process holds stays as it was after the first ones, and so does the work of one call."""

import gc
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bayestune.inference import draw, predict
from bayestune.methods import load_posterior, save_posterior
from inference.cases import Letters, rows
from models import LLAMA, blob

MIB = 2**20
nightly = pytest.mark.nightly


def held(model: nn.Module) -> dict[str, int]:
    """What could pile up in this process, counted."""
    gc.collect()
    registries = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "tensors": sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()),
        "descriptors": psutil.Process().num_fds(),
        "threads": threading.active_count(),
        "children": len(psutil.Process().children(recursive=True)),
        "hooks": sum(len(vars(module)[name]) for module in model.modules() for name in registries),
    }


def soak(model: nn.Module, action: Callable[[int], object], *, warm: int, calls: int) -> float:
    """The growth of the process's memory, in MiB, from call `warm` to call `calls`; nothing else may have grown."""
    for number in range(warm):
        action(number)
    before, memory = held(model), psutil.Process().memory_info().rss
    for number in range(warm, calls):
        action(number)
    after = held(model)
    assert after == before
    return (psutil.Process().memory_info().rss - memory) / MIB


def answer(model: PeftModel, number: int) -> None:
    predict(model, Letters(), rows(4), draws=number % 4, seed=number)
    with draw(model, index=number), torch.no_grad():
        model(input_ids=torch.tensor([[5, 6]]))


@pytest.mark.property("K01")
@pytest.mark.parametrize(
    ("warm", "calls"), [(50, 300), pytest.param(500, 10_000, marks=nightly)], ids=["hundreds", "ten thousand"]
)
def test_predictions_pile_nothing_up(figure: Any, warm: int, calls: int) -> None:
    model = blob(LLAMA).eval()
    grown = soak(model, lambda number: answer(model, number), warm=warm, calls=calls)
    figure("memory grown by predictions (MiB)", grown, at_most=5.0)


@pytest.mark.property("K01")
@pytest.mark.parametrize(
    ("warm", "calls"), [(5, 20), pytest.param(50, 500, marks=nightly)], ids=["tens", "five hundred"]
)
def test_loading_and_unloading_piles_nothing_up(tmp_path: Path, figure: Any, warm: int, calls: int) -> None:
    save_posterior(blob(LLAMA), tmp_path / "posterior")
    base = LLAMA.build()
    grown = soak(base, lambda number: load_posterior(base, tmp_path / "posterior").unload(), warm=warm, calls=calls)
    figure("memory grown by loading (MiB)", grown, at_most=5.0)


@pytest.mark.property("K01")
@pytest.mark.parametrize(
    ("warm", "calls"), [(5, 20), pytest.param(50, 250, marks=nightly)], ids=["tens", "two hundred"]
)
def test_saving_piles_nothing_up(tmp_path: Path, figure: Any, warm: int, calls: int) -> None:
    model, folder = blob(LLAMA), tmp_path / "posterior"

    def save(number: int) -> None:
        if number % 3 == 0:
            shutil.rmtree(folder, ignore_errors=True)
        save_posterior(model, folder, overwrite=True)

    grown = soak(model, save, warm=warm, calls=calls)
    assert [path.name for path in tmp_path.iterdir()] == ["posterior"]
    figure("memory grown by saving (MiB)", grown, at_most=5.0)


class Counting(TorchDispatchMode):
    """Counts the operations that reach torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def work(action: Callable[[], object]) -> tuple[int, int]:
    """Operations of torch, and calls of Python functions, in one call of `action`."""
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event == "call"

    with Counting() as operations:
        action()
    gc.disable()  # finalisers of others' garbage would count
    sys.setprofile(count)
    try:
        action()
    finally:
        sys.setprofile(None)
        gc.enable()
    return operations.count, calls


@pytest.mark.property("K02")
@pytest.mark.parametrize("calls", [200, pytest.param(10_000, marks=nightly)])
def test_the_last_call_does_as_much_as_the_tenth(figure: Any, calls: int) -> None:
    """Operations and function calls are the same, so no list that is walked has grown."""
    model, task, questions = blob(LLAMA).eval(), Letters(), rows(4)
    task.forwards = []
    counts = {}
    for number in range(1, calls + 1):
        if number in (10, calls):
            counts[number] = work(lambda: predict(model, task, questions, draws=3, seed=1))
        else:
            predict(model, task, questions, draws=3, seed=number)
    (first, first_calls), (last, last_calls) = counts[10], counts[calls]
    assert first > 100 and first_calls > 1000
    figure("more operations in the last call", last - first, at_most=0)
    figure("more function calls in the last call", last_calls - first_calls, at_most=0)
