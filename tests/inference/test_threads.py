"""Threads that share a model: each has its own draw, and none disturbs another."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from bayestune.inference import draw, evaluate, predict
from inference.cases import Letters, rows
from models import LLAMA, blob, scatter

IDS = LLAMA.inputs(rows=2, tokens=6)["input_ids"]


def logits(model: PeftModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def drawn(model: PeftModel, index: int) -> Tensor:
    with draw(model, index=index):
        return logits(model)


def in_threads(*actions: Callable[[], object]) -> list[object]:
    """Results of `actions`, run at once; an exception of any is raised here."""
    with ThreadPoolExecutor(len(actions)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(action) for action in actions]]


@pytest.mark.property("K03")
@pytest.mark.parametrize("training", [True, False])
def test_eight_threads_with_draws_of_their_own(training: bool) -> None:
    model = blob(LLAMA).train(training)
    serial = [drawn(model, index) for index in range(8)]
    start = threading.Barrier(8)

    def repeated(index: int) -> list[Tensor]:
        start.wait(timeout=60)
        return [drawn(model, index) for _ in range(10)]

    for index, found in enumerate(in_threads(*[lambda k=k: repeated(k) for k in range(8)])):
        assert isinstance(found, list)
        assert all(torch.equal(answer, serial[index]) for answer in found)
    assert all(module.training is training for module in model.modules())


@pytest.mark.property("K03")
def test_a_draw_lasts_while_another_thread_leaves_its_own() -> None:
    """Both enter, one leaves, the other still answers: it must neither lose its draw nor fall back into training."""
    model = blob(LLAMA, lora_dropout=0.5).train()
    serial = drawn(model, 1)
    entered, left = threading.Event(), threading.Event()

    def short() -> None:
        with draw(model, index=0):
            entered.set()
            assert both.wait(timeout=60)
        left.set()

    def long() -> Tensor:
        assert entered.wait(timeout=60)
        with draw(model, index=1):
            both.set()
            assert left.wait(timeout=60)
            assert not any(module.training for module in model.modules())
            return logits(model)

    both = threading.Event()
    found = in_threads(short, long)[1]
    assert isinstance(found, Tensor) and torch.equal(found, serial)
    assert all(module.training for module in model.modules())


@pytest.mark.property("K03")
def test_an_exception_in_one_thread_stays_there() -> None:
    model = blob(LLAMA).train()
    serial = drawn(model, 1)
    both, failed = threading.Barrier(2), threading.Event()

    def failing() -> None:
        try:
            with draw(model, index=0):
                both.wait(timeout=60)
                raise ValueError("on purpose")
        finally:
            failed.set()

    def answering() -> Tensor:
        with draw(model, index=1):
            both.wait(timeout=60)
            assert failed.wait(timeout=60)
            return logits(model)

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(failing), pool.submit(answering)
        with pytest.raises(ValueError, match="on purpose"):
            first.result(timeout=60)
        assert torch.equal(second.result(timeout=60), serial)
    assert all(module.training for module in model.modules())


@pytest.mark.property("K03")
def test_predict_in_one_thread_while_others_draw_and_use_the_mean() -> None:
    model, questions = blob(LLAMA).eval(), rows(6)
    expected = predict(model, Letters(), questions, draws=3, seed=2).draw_log_probs
    mean, single = logits(model), drawn(model, 5)
    start = threading.Barrier(4)

    def predicting(seed: int) -> list[Tensor]:
        start.wait(timeout=60)
        return [predict(model, Letters(), questions, draws=3, seed=seed).draw_log_probs for _ in range(5)]

    def answering(answer: Callable[[], Tensor]) -> list[Tensor]:
        start.wait(timeout=60)
        return [answer() for _ in range(20)]

    first, second, means, singles = in_threads(
        lambda: predicting(2),
        lambda: predicting(3),
        lambda: answering(lambda: logits(model)),
        lambda: answering(lambda: drawn(model, 5)),
    )
    for found, value in ((first, expected), (means, mean), (singles, single)):
        assert isinstance(found, list) and all(torch.equal(answer, value) for answer in found)
    assert isinstance(second, list) and not torch.equal(second[0], expected)
    assert torch.equal(second[0], predict(model, Letters(), questions, draws=3, seed=3).draw_log_probs)


@pytest.mark.property("K03")
def test_a_draw_is_seen_by_its_own_thread_only() -> None:
    model = blob(LLAMA).eval()
    mean = logits(model)
    with draw(model, index=3):
        assert not torch.equal(logits(model), mean)
        (seen,) = in_threads(lambda: logits(model))
    assert isinstance(seen, Tensor) and torch.equal(seen, mean)


@pytest.mark.property("K03")
@pytest.mark.parametrize("repeats", [3, pytest.param(50, marks=pytest.mark.nightly)])
def test_two_adapters_while_another_thread_evaluates(repeats: int) -> None:
    """Draws of both adapters at once, each thread with a seed of its own, and scores computed beside them."""
    model, questions = blob(LLAMA), rows(6)
    model.add_adapter("second", LLAMA.config())
    scatter(model, seed=1, adapter="second")
    model.base_model.set_adapter(["default", "second"])
    model.eval()

    def scores(seed: int) -> dict[str, object]:
        return evaluate(predict(model, Letters(), questions, draws=3, seed=seed)).as_dict()

    drawn_alone, scored_alone = [drawn(model, k) for k in range(4)], [scores(k) for k in range(4)]
    assert not torch.equal(drawn_alone[0], drawn_alone[1])
    start = threading.Barrier(8)

    def drawing(index: int) -> list[Tensor]:
        start.wait(timeout=60)
        return [drawn(model, index) for _ in range(repeats)]

    def scoring(seed: int) -> list[dict[str, object]]:
        start.wait(timeout=60)
        return [scores(seed) for _ in range(repeats)]

    found = in_threads(*[lambda k=k: drawing(k) for k in range(4)], *[lambda k=k: scoring(k) for k in range(4)])
    for index, answers in enumerate(found[:4]):
        assert isinstance(answers, list) and all(torch.equal(answer, drawn_alone[index]) for answer in answers)
    for seed, answers in enumerate(found[4:]):
        assert answers == [scored_alone[seed]] * repeats
