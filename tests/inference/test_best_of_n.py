"""Rewards of single texts, and the ranking of candidates by their lower bound."""

import copy
import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BertForSequenceClassification

import bayestune as bt
from bayestune.errors import ConfigError, DataError, DrawError
from bayestune.methods import LaplacePosterior, Variational
from bayestune.tasks import DatasetSpec, Preference, PreferenceRow
from models import scatter
from toys import bert_config, byte_tokenizer

SPEC = DatasetSpec(name="pairs", folder="pairs", row=PreferenceRow, classes=2)
PROMPT, TEXTS = "Which is a metal? ", ["iron", "oak, of course", "wool", "a stone that has been in the rain"]


@pytest.fixture(scope="module")
def task() -> Preference:
    return Preference(SPEC, byte_tokenizer(), data=None, max_tokens=60)


@pytest.fixture(scope="module")
def posterior() -> Variational:
    tokenizer = byte_tokenizer()
    config = bert_config(len(tokenizer))
    config.num_labels, config.initializer_range = 1, 0.2
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BertForSequenceClassification(config)
    blob = bt.BlobConfig(r=4, lora_alpha=32, target_modules=["query", "value"], rho_init=0.4)
    model = scatter(get_peft_model(base, blob)).double().eval()
    return Variational(model)


def test_the_rewards_are_those_of_the_prediction(task: Preference, posterior: Variational) -> None:
    """sigmoid(r_a - r_b), averaged over the same draws, is p(a better than b), with the posterior's temperature."""
    posterior = Variational(posterior.model, temperature=2.5)
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    rows = [PreferenceRow(id=f"{a}{b}", prompt=PROMPT, chosen=TEXTS[a], rejected=TEXTS[b]) for a, b in pairs]
    for draws in (0, 6):
        expected = bt.predict(posterior, task, rows, draws=draws, seed=3)
        found = bt.rewards(posterior, task, PROMPT, TEXTS, draws=draws, seed=3, batch_size=3)
        assert found.shape == (max(1, draws), 4)
        difference = torch.stack([found[:, a] - found[:, b] for a, b in pairs], 1)
        assert (difference.sigmoid() - expected.draw_log_probs[..., 0].exp()).abs().max() <= 1e-12
        assert difference.abs().min() > 1e-4
    assert found.std(0).min() > 1e-3


def test_rewards_without_draws_of_weights(task: Preference, posterior: Variational) -> None:
    """Linearized draws of rewards have the mean's rewards as their mean; the probit answer needs classes."""
    found = bt.rewards(posterior.with_predictive("linearised"), task, PROMPT, TEXTS, draws=4000)
    mode = bt.rewards(posterior, task, PROMPT, TEXTS, draws=0)
    assert ((found.mean(0) - mode[0]).abs() < 5 * found.std(0) / math.sqrt(4000)).all() and found.std(0).min() > 1e-3
    point = get_peft_model(copy.deepcopy(posterior.model).unload(), LoraConfig(r=2, target_modules=["query"]))
    factors: Any = {}
    probit = LaplacePosterior(point, factors, layers="all", precision=1.0, rows=1, predictive="probit")
    with pytest.raises(DrawError, match="probit: found task pairs without classes"):
        bt.rewards(probit, task, PROMPT, TEXTS, draws=1)


def test_each_text_has_its_own_prompt(task: Preference, posterior: Variational) -> None:
    prompts = ["", "Why? ", "When? "]
    together = bt.rewards(posterior, task, prompts, TEXTS[:3], draws=2)
    alone = [
        bt.rewards(posterior, task, prompt, [text], draws=2) for prompt, text in zip(prompts, TEXTS, strict=False)
    ]
    assert (together - torch.cat(alone, 1)).abs().max() <= 1e-12
    with pytest.raises(ConfigError, match="rewards: found 2 prompts for 3 texts, expected one for each, or one"):
        bt.rewards(posterior, task, prompts[:2], TEXTS[:3])


def test_a_text_that_cannot_be_used_is_named(task: Preference, posterior: Variational) -> None:
    with pytest.raises(DataError, match=r"\(id 1\): field 'text': found empty text"):
        bt.rewards(posterior, task, PROMPT, ["iron", ""])
    with pytest.raises(DataError, match=r"\(id 2\): field 'text': found 98 tokens .* at most 60"):
        bt.rewards(posterior, task, PROMPT, ["iron", "oak", "x" * 80])


def ranked(rewards: torch.Tensor, k: float) -> list[int]:
    return [index for index, _ in bt.best_of_n(rewards, k=k)]


def test_the_bound_is_the_mean_less_k_stds_of_what_a_draw_says_beyond_its_mean() -> None:
    """Rewards (d, -d, 0) less their mean, 0: the bound of d is its mean less k of its std, with K - 1."""
    d = torch.tensor([1.0, 2.0, 6.0])
    rewards = torch.stack([d, -d, 0 * d], 1)
    std = 7**0.5  # (4 + 1 + 9) / 2 of 1, 2, 6 around 3
    found = bt.best_of_n(rewards, k=2.0)
    expected = [(2, 0.0), (0, 3 - 2 * std), (1, -3 - 2 * std)]
    assert [index for index, _ in found] == [index for index, _ in expected]
    assert all(abs(one - other) <= 1e-12 for (_, one), (_, other) in zip(found, expected, strict=True))
    assert bt.best_of_n(rewards, k=0.0) == [(0, 3.0), (2, 0.0), (1, -3.0)] == bt.best_of_n(rewards[1:2] * 1.5, k=0.0)
    assert ranked(rewards, -1.0) == [0, 2, 1]


def test_a_constant_added_to_all_rewards_of_a_draw_changes_nothing() -> None:
    """Neither ranking nor bounds, though the raw std of each candidate is then mostly the constants'."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    shifts = 100 * torch.randn(10, 1, generator=generator, dtype=torch.float64)
    one, other = bt.best_of_n(rewards), bt.best_of_n(rewards + shifts)
    assert [index for index, _ in one] == [index for index, _ in other]
    eps = 2**-52 * shifts.abs().max().item()
    assert all(abs(a - b) <= 16 * eps for (_, a), (_, b) in zip(one, other, strict=True))
    assert (rewards + shifts).std(0).min() > 10 * rewards.std(0).max()


def test_two_candidates_are_ranked_by_the_mean_whatever_k_is() -> None:
    rewards = torch.tensor([[0.0, 5.0], [1.0, 0.0], [3.0, 1.0]])
    assert [ranked(rewards, k) for k in (0.0, 1.0, 50.0)] == [[1, 0]] * 3


@pytest.mark.parametrize(
    ("shape", "k"), [((1, 3), 1.0), ((0, 3), 0.0), ((4, 0), 1.0), ((4, 3), float("nan")), ((4, 3), float("inf"))]
)
def test_what_cannot_be_ranked_is_refused(shape: tuple[int, int], k: float) -> None:
    with pytest.raises(ConfigError, match=f"best_of_n: found {shape[0]} draws of {shape[1]} candidates with k={k}"):
        bt.best_of_n(torch.zeros(shape), k=k)
