"""Temperature: closed forms, recovery within the standard error, stationarity, and what is refused."""

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bayestune.errors import DataError
from bayestune.inference import predict
from bayestune.methods import Point, fit_temperature
from bayestune.metrics import accuracy, row_nll
from bayestune.tasks import Row
from inference.cases import Fixed
from models import llama
from probes import z_bound

ROWS = 4000


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(logits: Tensor, temperature: float) -> Tensor:
    """Probabilities [rows, classes] of the average over draws at a temperature, written out."""
    return (logits / temperature).softmax(-1).mean(0)


def mean_nll(logits: Tensor, labels: Tensor, temperature: float) -> float:
    return -mixture(logits, temperature)[torch.arange(len(labels)), labels].log().mean().item()


def labelled(logits: Tensor, temperature: float, seed: int = 1) -> Tensor:
    """Labels simulated from the average over draws at `temperature`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(mixture(logits, temperature), 1, generator=generator)[:, 0]


def standard_error(logits: Tensor, temperature: float) -> float:
    """Of log T: 1 / sqrt(rows x Fisher information), the information summed over the classes."""
    step = 1e-4
    up, down = (mixture(logits, temperature * math.exp(s)) for s in (step, -step))
    p = mixture(logits, temperature)
    slope = (up - down) / (2 * step)
    information = torch.where(p > 0, slope.square() / p, 0.0).sum(-1).sum().item()
    return 1 / math.sqrt(information)


@pytest.mark.parametrize(("draws", "temperature"), [(1, 0.3), (5, 1.7), (5, 6.0)])
def test_the_temperature_of_simulated_labels_is_recovered(draws: int, temperature: float) -> None:
    logits = 3 * normal(ROWS, 4) + 1.5 * normal(draws, ROWS, 4, seed=2)
    labels = labelled(logits, temperature)
    found = fit_temperature(logits.log_softmax(-1), labels)
    assert abs(math.log(found / temperature)) <= z_bound(8) * standard_error(logits, temperature)


@pytest.mark.parametrize("draws", [5])
def test_the_NLL_is_stationary_and_smallest(draws: int) -> None:
    logits = 3 * normal(300, 4) + 1.5 * normal(draws, 300, 4, seed=2)
    labels = labelled(logits, 2.0)
    found = fit_temperature(logits.log_softmax(-1), labels)
    step = 1e-4
    up, at, down = (mean_nll(logits, labels, found * math.exp(s)) for s in (step, 0.0, -step))
    curvature = (up - 2 * at + down) / step**2
    # A minimiser off by x has slope curvature x; the search ends within 2e-8, central differences add step^2.
    assert curvature > 0 and abs((up - down) / (2 * step)) <= curvature * (1e-7 + 10 * step**2)
    grid = torch.logspace(-2, 2, 2001, dtype=torch.float64)
    assert at <= min(mean_nll(logits, labels, t.item()) for t in grid)


@pytest.mark.parametrize(("right", "count"), [(3, 4), (60, 100), (999, 1000)])
@pytest.mark.parametrize("gap", [0.1, 2.0, 9.0])
def test_two_classes_and_one_gap(right: int, count: int, gap: float) -> None:
    """All rows have the same gap z, a share p is right: sigmoid(z / T) = p, so T = z / logit(p)."""
    log_probs = torch.tensor([gap, 0.0], dtype=torch.float64).log_softmax(-1).expand(1, count, 2)
    labels = (torch.arange(count) >= right).long()
    expected = gap / math.log(right / (count - right))
    assert fit_temperature(log_probs, labels) == pytest.approx(expected, rel=1e-6)


def test_a_temperature_close_to_one_is_not_taken_for_one() -> None:
    log_probs = torch.tensor([1.001 * math.log(3), 0.0], dtype=torch.float64).log_softmax(-1).expand(1, 4, 2)
    assert fit_temperature(log_probs, torch.tensor([0, 0, 0, 1])) == pytest.approx(1.001, rel=1e-6)


def test_the_NLL_of_the_average_is_fitted_not_the_average_of_NLLs() -> None:
    """Draws with gaps z and -z average to 1/2 at any T; a third with gap z leaves sigmoid(z / T) / 3 + 1/3 = p."""
    gap, p = 2.0, 0.55
    draws = torch.tensor([[gap, 0.0], [0.0, gap], [gap, 0.0]], dtype=torch.float64).log_softmax(-1)
    share = 3 * p - 1
    found = fit_temperature(draws[:, None].expand(3, 100, 2), (torch.arange(100) >= 100 * p).long())
    assert found == pytest.approx(gap / math.log(share / (1 - share)), rel=1e-6)


@pytest.mark.parametrize(("gaps", "counts"), [((8.0, 0.3), (21, 18, 1))])
def test_several_minima_give_the_lowest(gaps: tuple[float, float], counts: tuple[int, int, int]) -> None:
    """Draws that disagree have an NLL with two minima in T; a search from one end can miss the lower."""
    sharp, flat = gaps
    draws = torch.tensor([[[0.0, sharp, sharp / 4]], [[0.0, -flat, -flat]]], dtype=torch.float64)
    logits = draws.expand(2, 40, 3)
    labels = torch.arange(3).repeat_interleave(torch.tensor(counts))
    values = [mean_nll(logits, labels, t) for t in torch.logspace(-2, 2, 801, dtype=torch.float64).tolist()]
    minima = [i for i in range(1, 800) if values[i] < min(values[i - 1], values[i + 1])]
    assert len(minima) == 2
    found = fit_temperature(logits.log_softmax(-1), labels)
    assert mean_nll(logits, labels, found) <= min(values)


def test_logits_and_log_probabilities_of_any_dtype_agree() -> None:
    log_probs = (3 * normal(2, 50, 3)).log_softmax(-1)
    labels = labelled(log_probs, 2.0)
    single = fit_temperature(log_probs.float(), labels.int())
    assert single == pytest.approx(fit_temperature(log_probs, labels), rel=1e-5)


def test_absent_choices_play_no_part() -> None:
    logits = 3 * normal(2, 200, 3)
    labels = labelled(logits, 2.0)
    wider = torch.cat([logits, torch.full((2, 200, 1), -torch.inf, dtype=torch.float64)], -1)
    found = fit_temperature(wider.log_softmax(-1), labels)
    assert found == pytest.approx(fit_temperature(logits.log_softmax(-1), labels), rel=1e-7)
    one = wider.log_softmax(-1)
    one[0, 3] = torch.tensor([0.0, -torch.inf, -torch.inf, -torch.inf])
    one[0, 3] = one[0, 3].roll(int(labels[3]) + 1)  # one draw gives this row's label no chance, the other does
    assert 0.01 < fit_temperature(one, labels) < 100


def test_one_draw_keeps_every_answer() -> None:
    log_probs = (3 * normal(1, 200, 4)).log_softmax(-1)
    labels = labelled(log_probs, 3.0)
    found = fit_temperature(log_probs, labels)
    scaled = (log_probs[0] / found).log_softmax(-1)
    assert found > 1.5 and accuracy(scaled, labels) == accuracy(log_probs[0], labels)
    assert torch.equal(scaled.argmax(-1), log_probs[0].argmax(-1))


def test_predict_answers_at_the_temperature() -> None:
    """The NLL that `predict` gives with the temperature set is the one that was minimised."""
    table = 3 * normal(20, 4)
    labels = labelled(table[None], 3.0)
    questions = [Row(id=str(i), question="q", choices=("a", "b", "c", "d"), answer=int(labels[i])) for i in range(20)]
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    posterior = Point(get_peft_model(llama(), config))
    before = predict(posterior, Fixed(table), questions, draws=0)
    posterior.temperature = fit_temperature(before.draw_log_probs, before.labels)
    after = predict(posterior, Fixed(table), questions, draws=0)
    assert row_nll(after.log_probs, labels).mean() < row_nll(before.log_probs, labels).mean()
    again = fit_temperature(after.draw_log_probs, after.labels)
    assert again == pytest.approx(1.0, abs=1e-6)


def test_a_temperature_without_effect_is_one() -> None:
    draws = 3
    uniform = torch.full((draws, 7, 3), 1 / 3, dtype=torch.float64).log()
    assert fit_temperature(uniform, torch.arange(7) % 3) == 1.0
    certain = torch.tensor([0.0, -torch.inf, -torch.inf], dtype=torch.float64).expand(draws, 4, 3)
    assert fit_temperature(certain, torch.zeros(4, dtype=torch.long)) == 1.0


@pytest.mark.parametrize(("label", "bound"), [(0, 0.01), (1, 100.0)])
def test_a_minimum_at_a_bound_is_told(label: int, bound: float) -> None:
    """All answers right: sharper is better without end. All wrong: flatter is."""
    log_probs = torch.tensor([0.52, 0.48], dtype=torch.float64).log().expand(1, 10, 2)
    with pytest.warns(UserWarning, match=f"bound T = {bound}"):
        assert fit_temperature(log_probs, torch.full((10,), label)) == bound


HALVES = torch.full((2, 3, 2), 0.5).log()
IMPOSSIBLE = torch.tensor([[0.5, 0.5], [1.0, 0.0]]).log().expand(2, 2, 2)
BAD: dict[str, tuple[Tensor, Any, str]] = {
    "no labels": (HALVES, None, "without a label"),
    "no draws": (HALVES[:0], torch.zeros(3, dtype=torch.long), r"\[draws, rows, classes\]"),
    "foreign label": (HALVES, torch.tensor([0, 2, 1]), "label of row 1 is 2"),
    "nan": (HALVES * torch.nan, torch.zeros(3, dtype=torch.long), "row 0"),
    "impossible": (IMPOSSIBLE, torch.tensor([0, 1]), "row 1 has probability 0"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_fitted_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtyping.config.jaxtyping_disable", True)  # users have no run-time check of annotations
    log_probs, labels, word = BAD[name]
    with pytest.raises(DataError, match=word):
        fit_temperature(log_probs, labels)


def test_the_example_of_the_docstring() -> None:
    log_probs = torch.tensor([[[0.9, 0.1]] * 4]).log()
    assert fit_temperature(log_probs, torch.tensor([0, 0, 0, 1])) == pytest.approx(2.0, rel=1e-6)
