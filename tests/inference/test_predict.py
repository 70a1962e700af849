"""`predict` against loops written out: every draw, every row, every batch size, and when memory runs out."""

import hashlib
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bayestune.errors import ConfigError, DataError, DrawError
from bayestune.inference import Prediction, draw, evaluate, predict
from bayestune.inference.draws import evaluation_mode
from inference.cases import Fixed, Letters, Sequences, rows
from models import LLAMA, blob, llama
from probes import bayesian_sum, double_llama

Figure = Callable[..., None]
TESTS = Path(__file__).parent.parent


def one_by_one(model: nn.Module, task: Letters, count: int, draws: int, seed: int) -> Tensor:
    """Log-probabilities of single rows in single draws, in a loop."""
    parts = []
    for index in range(draws):
        with draw(model, index=index, seed=seed), torch.no_grad():
            single = [task.outputs(model, task.collate([task.example(row)])) for row in rows(count)]
        parts.append(torch.cat(single).double().log_softmax(-1))
    return torch.stack(parts)


def assert_close(found: Tensor, expected: Tensor, bound: float) -> None:
    """Probabilities within `bound`, and -inf in the same places."""
    assert torch.equal(found.isinf(), expected.isinf())
    assert (found.exp() - expected.exp()).abs().max() <= bound
    assert (found - expected).nan_to_num(0.0).abs().max() <= 10 * bound  # of the logarithms, too


def of_draws(log_probs: Tensor, labels: Tensor | None = None) -> Prediction:
    ids = tuple(str(i) for i in range(log_probs.shape[1]))
    return Prediction(ids=ids, draw_log_probs=log_probs, labels=labels, draws=len(log_probs), seed=0, task="none")


@pytest.mark.property("N07")
@pytest.mark.parametrize("task", [Letters(), Sequences()], ids=lambda task: task.name)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_stacked_draws_in_any_batch_equal_a_loop(
    task: Letters, dtype: torch.dtype, bound: float, figure: Figure
) -> None:
    model = double_llama().to(dtype)
    expected = one_by_one(model, task, 7, draws=5, seed=3)
    for batch_size in (1, 3, 16):
        task.forwards.clear()
        found = predict(model, task, rows(7), draws=5, seed=3, batch_size=batch_size)
        error = (found.draw_log_probs.exp() - expected.exp()).abs().max().item()
        figure(f"probabilities, stacked less one by one, {dtype}".replace("torch.", ""), error, at_most=bound)
        assert_close(found.draw_log_probs, expected, bound)
        assert found.ids == tuple(f"r{i}" for i in range(7))
        assert max(task.forwards) == 5 * min(7, batch_size)  # the draws did ride together
    assert (expected[0].exp() - expected[1].exp()).abs().max() > 1e-2


@pytest.mark.property("N07")
def test_a_row_does_not_depend_on_the_others() -> None:
    model, questions = double_llama(), rows(9)
    alone = predict(model, Letters(), questions[4:5], draws=3).draw_log_probs[:, 0]
    for chosen in ([4, 0], [3, 4, 5, 7], [8, 7, 4, 2, 1]):
        among = predict(model, Letters(), [questions[i] for i in chosen], draws=3)
        assert_close(among.draw_log_probs[:, chosen.index(4)], alone, 1e-12)


def test_more_draws_keep_the_first_ones() -> None:
    model = double_llama()
    few, many = (predict(model, Letters(), rows(4), draws=draws).draw_log_probs for draws in (2, 5))
    assert_close(many[:2], few, 1e-12)


def test_choices_flattened_into_rows_share_their_rows_draw() -> None:
    log_probs = predict(double_llama(), Sequences(), rows(4), draws=3).draw_log_probs
    assert (log_probs[..., 0] - log_probs[..., 1]).abs().max() <= 1e-12
    assert (log_probs[..., 0] - log_probs[..., 2]).abs().min() > 1e-6


@pytest.mark.property("S16")
def test_the_predictive_is_the_mean_of_the_draws_probabilities(figure: Figure) -> None:
    found = predict(double_llama(), Letters(), rows(6), draws=7)
    assert found.draw_log_probs.dtype == torch.float64 and found.draw_log_probs.shape == (7, 6, 4)
    by_hand = found.draw_log_probs.exp().mean(0)
    figure("predictive less the mean of the draws", (found.probs - by_hand).abs().max().item(), at_most=1e-14)
    figure("sum of the probabilities less 1", (found.probs.sum(-1) - 1).abs().max().item(), at_most=1e-12)
    shuffled = of_draws(found.draw_log_probs[[3, 1, 6, 0, 5, 2, 4]])
    assert_close(shuffled.log_probs, found.log_probs, 1e-14)
    assert torch.equal(found.answer, by_hand.argmax(-1))
    entropy = -(by_hand * by_hand.log().nan_to_num(neginf=0.0)).sum(-1)
    assert (found.total - entropy).abs().max() <= 1e-12
    assert torch.allclose(found.total, found.aleatoric + found.epistemic, atol=1e-12) and found.epistemic.min() > 0


@pytest.mark.property("S16")
def test_one_draw_is_one_pass() -> None:
    model, task = double_llama(), Letters()
    found = predict(model, task, rows(3), draws=1, seed=5)
    assert torch.equal(found.log_probs, found.draw_log_probs[0])
    assert_close(found.draw_log_probs, one_by_one(model, task, 3, draws=1, seed=5), 1e-12)
    assert found.epistemic.abs().max() <= 1e-12


@pytest.mark.property("S16")
def test_averaging_lowers_the_expected_nll(figure: Figure) -> None:
    model, labels = blob(LLAMA).eval(), torch.tensor([row.target for row in rows(4)])
    for seed in range(50):
        found = predict(model, Letters(), rows(4), draws=10, seed=seed)
        together = -found.log_probs[range(4), labels].mean()
        apart = -found.draw_log_probs[:, range(4), labels].mean()
        figure("NLL of 10 draws less the mean NLL of one, nats", (together - apart).item(), at_most=1e-12)


@pytest.mark.property("S16")
def test_no_draws_is_the_mean() -> None:
    model, task = double_llama().train(), Letters()
    found = predict(model, task, rows(5), draws=0)
    with evaluation_mode(model), torch.no_grad():
        expected = task.outputs(model, task.collate([task.example(row) for row in rows(5)])).log_softmax(-1)
    assert_close(found.draw_log_probs, expected[None], 1e-12)
    assert (found.draws, found.epistemic.abs().max().item() <= 1e-12) == (0, True)


@pytest.mark.property("N02")
@pytest.mark.parametrize("gap", [60.0, 110.0, 200.0, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_gaps_and_absent_choices_stay_finite(gap: float, dtype: torch.dtype, figure: Figure) -> None:
    table = torch.tensor([[0.0, gap, -math.inf], [gap, 0.0, -math.inf], [0.0, 0.0, -math.inf]], dtype=dtype)
    found = predict(blob(LLAMA).eval(), Fixed(table), [rows(1)[0].__class__(**vars_of(i)) for i in range(3)], draws=4)
    error = max(abs(found.log_probs[i, i].item() + gap) for i in (0, 1))
    figure("log-probability less the gap between the logits, nats", error, at_most=1e-5)
    assert (found.probs[:, 2] == 0).all() and not found.log_probs.isnan().any()
    for part in (found.total, found.aleatoric, found.epistemic):
        assert part.isfinite().all() and part.min() >= 0
    assert found.total[2].item() == pytest.approx(math.log(2))
    assert evaluate(found).nll == pytest.approx((gap + gap + math.log(2)) / 3, rel=1e-6)


def vars_of(index: int) -> dict[str, Any]:
    return {"id": str(index), "question": "q", "choices": ("a", "b"), "answer": min(index, 1)}


@pytest.mark.property("N02")
def test_draws_that_disagree_completely_are_averaged_exactly() -> None:
    sure = torch.tensor([[[0.0, 1e4]], [[1e4, 0.0]]], dtype=torch.float64).log_softmax(-1)
    found = of_draws(sure)
    assert found.log_probs.tolist() == [[-math.log(2), -math.log(2)]]
    assert found.epistemic.tolist() == [pytest.approx(math.log(2))] and found.aleatoric.tolist() == [0.0]


@pytest.mark.property("S14")
def test_with_b_at_zero_the_draws_agree(figure: Figure) -> None:
    found = predict(get_peft_model(llama(), LLAMA.config()), Letters(), rows(5), draws=6)
    error = (found.draw_log_probs.exp() - found.draw_log_probs[0].exp()).abs().max().item()
    figure("probabilities of draws with B = 0, difference", error, at_most=1e-7)
    assert found.epistemic.max() <= 1e-6


@pytest.mark.property("S15")
def test_a_disabled_adapter_answers_as_the_base() -> None:
    model, task = double_llama(), Letters()
    with model.disable_adapter():
        found = predict(model, task, rows(4), draws=3)
    expected = predict(llama().double(), task, rows(4), draws=0)
    assert_close(found.draw_log_probs, expected.draw_log_probs.expand(3, -1, -1), 1e-12)


@pytest.mark.property("S18")
def test_predict_leaves_no_trace() -> None:
    model = blob(LLAMA, lora_dropout=0.5)
    model.get_submodule("base_model.model.model.layers.1").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    predict(model, Letters(), rows(5), draws=3)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == numpy_state).all()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(
        parameter.requires_grad == (".rho" in name or "lora_" in name) for name, parameter in model.named_parameters()
    )
    loss = model(input_ids=torch.tensor([[5, 6]])).logits.sum()
    loss.backward()  # nothing of the inference mode stays behind


FRESH = """
import hashlib, random, sys
import numpy, torch
from bayestune.inference import predict
from inference.cases import Letters, rows
from probes import double_llama

torch.set_num_threads(1)
model = double_llama()
torch.manual_seed(int(sys.argv[1])), numpy.random.seed(1), random.seed(1)
before = torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate()
answer = predict(model, Letters(), rows(5), draws=3, seed=7)
model.train()(input_ids=torch.tensor([[5, 6]]))
assert before == (torch.get_rng_state().tolist(), numpy.random.get_state()[1].tolist(), random.getstate())
print(hashlib.sha256(answer.draw_log_probs.numpy().tobytes()).hexdigest())
"""


@pytest.mark.property("K04")
def test_a_fresh_process_gives_the_same_answer_and_no_global_state_moves() -> None:
    path = os.pathsep.join([str(TESTS), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    output = subprocess.run(
        [sys.executable, "-c", FRESH, "123"], env=environment, capture_output=True, text=True, check=False
    )
    assert output.returncode == 0, output.stderr
    here = predict(double_llama(), Letters(), rows(5), draws=3, seed=7).draw_log_probs
    assert output.stdout.split()[-1] == hashlib.sha256(here.numpy().tobytes()).hexdigest()
    other = predict(double_llama(), Letters(), rows(5), draws=3, seed=8).draw_log_probs
    assert (here.exp() - other.exp()).abs().max() > 1e-3


class Short(Letters):
    """Memory runs out in the forwards that `fails` says, given how many there were and the rows of this one."""

    def __init__(self, fails: Callable[[int, int], bool]) -> None:
        super().__init__()
        self.fails = fails

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        if self.fails(len(self.forwards) + 1, len(batch["input_ids"])):
            self.forwards.append(0)
            raise torch.OutOfMemoryError("on purpose")
        return super().outputs(model, batch)


@pytest.mark.property("R01")
@pytest.mark.parametrize("draws", [0, 1, 6])
@pytest.mark.parametrize(
    "fails",
    [
        lambda call, rows: call == 1,
        lambda call, rows: call in (1, 2),
        lambda call, rows: call == 3,
        lambda call, rows: rows > 2,
        lambda call, rows: rows > 1,
    ],
    ids=["first", "first two", "third", "more than two", "more than one"],
)
def test_answers_are_the_same_when_memory_runs_out(
    draws: int, fails: Callable[[int, int], bool], figure: Callable[..., None]
) -> None:
    model, task = double_llama(), Short(fails)
    expected = predict(model, Letters(), rows(10), draws=draws, batch_size=4)
    found = predict(model, task, rows(10), draws=draws, batch_size=4)
    assert_close(found.draw_log_probs, expected.draw_log_probs, 1e-12)
    worst = (found.draw_log_probs.exp() - expected.draw_log_probs.exp()).abs().max().item()
    figure("probabilities of predict, split where memory runs out, beside whole", worst, at_most=1e-12)
    assert found.ids == expected.ids and 0 in task.forwards


@pytest.mark.property("R01")
@pytest.mark.parametrize("draws", [0, 1, 6])
def test_when_one_row_at_one_draw_does_not_fit_predict_says_so(draws: int) -> None:
    model, task = double_llama().train(), Short(lambda call, rows: True)
    with pytest.raises(torch.OutOfMemoryError, match="one row at one draw does not fit into the memory of cpu"):
        predict(model, task, rows(7), draws=draws, batch_size=4)
    assert 0 < len(task.forwards) <= 9
    assert all(module.training for module in model.modules())


class Experts(nn.Module):
    """Token embeddings, of which half, in an order of their own, pass an expert; logits of the last token."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, 6)
        self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids)
        flat, out = hidden.flatten(0, 1), torch.zeros_like(hidden).flatten(0, 1)
        for place, expert in enumerate(self.experts):
            chosen = (input_ids.flatten() % 2 == place).nonzero()[:, 0].flip(0)
            out[chosen] = expert(flat[chosen])
        return (hidden + out.view_as(hidden)).cumsum(1)


class ExpertLetters(Letters):
    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        self.forwards.append(len(batch["input_ids"]))
        return model(batch["input_ids"])[:, -1, :4]


def test_routed_layers_are_not_stacked_and_share_one_draw() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: PeftModel = bayesian_sum(Experts(), target_modules=["experts.0", "experts.1"]).eval()
    task = ExpertLetters()
    # one row a batch: padding would be a token like any other here
    found = predict(model, task, rows(6), draws=4, batch_size=1)
    assert task.forwards == [1] * 24
    assert_close(found.draw_log_probs, one_by_one(model, task, 6, draws=4, seed=0), 1e-12)
    assert found.epistemic.min() > 1e-3


def test_rows_without_labels_are_answered() -> None:
    questions = [rows(2)[0], rows(2)[1].__class__(**{**vars_of(0), "answer": None})]
    found = predict(blob(LLAMA).eval(), Letters(), questions, draws=2)
    assert found.labels is None
    with pytest.raises(DataError, match="no label"):
        evaluate(found)


def test_wrong_requests_are_refused() -> None:
    model, plain = blob(LLAMA), get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    for settings in ({"draws": -1}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="expected at least 0 and 1"):
            predict(model, Letters(), rows(2), **settings)
    with pytest.raises(DataError, match="no rows"):
        predict(model, Letters(), [])
    with pytest.raises(DrawError, match="draws=0"):
        predict(plain, Letters(), rows(2), draws=1)
    assert predict(plain, Letters(), rows(2), draws=0).probs.shape == (2, 4)
    model.merge_adapter()
    with pytest.raises(DrawError, match="merged"):
        predict(model, Letters(), rows(2), draws=2)
    assert all(module.training for module in model.modules())
    mean = predict(model, Letters(), rows(2), draws=0)
    model.unmerge_adapter()
    assert_close(mean.probs.log(), predict(model, Letters(), rows(2), draws=0).probs.log(), 1e-5)
