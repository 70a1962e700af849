"""Log-probabilities of continuations: one forward per text and draw as the oracle, and a mixture worked by hand."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bayestune.errors import PosteriorError
from bayestune.inference import draw
from bayestune.inference.continuations import Continuation, continuation_log_probs
from bayestune.sampling import Sampler
from bayestune.sampling.stacked import StackedDraws
from models import LLAMA, blob

DRAWS, SEED = 3, 5
A, B, C = range(3)


def texts() -> list[Continuation]:
    """Texts of several lengths, not in order; the first three have the same inputs."""
    ids = torch.randint(3, 64, (6, 12), generator=torch.Generator().manual_seed(1)).tolist()
    cut = [(0, 8, 1), (0, 8, 3), (0, 8, 1), (1, 12, 4), (2, 3, 1), (3, 2, 1), (4, 10, 9), (5, 11, 2)]
    made = []
    for number, (row, length, targets) in enumerate(cut):
        text = [*ids[row][: length - 1], ids[row][length - 1] if number else 7]
        made.append(Continuation(inputs=tuple(text[:-1]), targets=tuple(text[-targets:])))
    return made


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_each_draw_gives_a_continuation_the_sum_of_its_own_tokens(batch_size: int) -> None:
    model = blob(LLAMA)
    expected = torch.empty(DRAWS, len(texts()), dtype=torch.float64)
    for k in range(DRAWS):
        with torch.no_grad(), draw(model, index=k, seed=SEED):
            for place, text in enumerate(texts()):
                log_probs = model(torch.tensor([text.inputs])).logits[0].double().log_softmax(-1)
                start = len(text.inputs) - len(text.targets)
                expected[k, place] = sum(log_probs[start + t, token] for t, token in enumerate(text.targets))
    sampler = StackedDraws.of(model, draws=DRAWS, seed=SEED)
    found, _ = continuation_log_probs(model, sampler, texts(), batch_size=batch_size)
    # Float32 logits of order 10 through two layers of sums of 48 terms; a batch changes the order of the sums.
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    assert len({round(value, 3) for value in found[:, 0].tolist()}) == DRAWS and model.training


class Chains(Sampler):
    """Draws that are Markov chains over three tokens: probs [draws, token before, token]."""

    def __init__(self, probs: Tensor) -> None:
        self.logits, self.slices = probs.log(), len(probs)

    def outputs(self, task: Any, batch: dict[str, Tensor], part: range) -> Tensor:
        return self.logits[part.start : part.stop, batch["input_ids"]]


def chains() -> Chains:
    """C is the context; the second draw never says B after A and B."""
    first = torch.tensor([[0.0, 0.6, 0.4], [0.3, 0.7, 0.0], [0.9, 0.1, 0.0]])
    second = torch.tensor([[0.0, 0.1, 0.9], [1.0, 0.0, 0.0], [0.2, 0.8, 0.0]])
    return Chains(torch.stack([first, second]).double())


def test_the_mixture_decodes_with_the_draws_that_foresaw_the_tokens_before() -> None:
    """After C, the draws give A 0.55 on average, and B 0.45.

    Then they count 0.9 to 0.2: B has (0.54 + 0.02) / 1.1 and C (0.36 + 0.18) / 1.1, though the mean of both draws is
    0.35 and 0.65, as it is where A belongs to the context. No draw but the first decodes A B.
    """
    texts = {
        ((C,), (A,)): True,
        ((C,), (B,)): False,
        ((C, A), (A, B)): True,
        ((C, A), (A, C)): False,
        ((C, A), (B,)): False,
        ((C, A), (C,)): True,
        ((C, A, B), (A, B, B)): True,
    }
    continuations = [Continuation(inputs=inputs, targets=targets) for inputs, targets in texts]
    model = nn.Linear(1, 1)  # only its device is asked for
    found, decoded = continuation_log_probs(model, chains(), continuations)
    assert found[0].exp().tolist() == pytest.approx([0.9, 0.1, 0.54, 0.36, 0.6, 0.4, 0.378])
    assert found[1].exp().tolist() == pytest.approx([0.2, 0.8, 0.02, 0.18, 0.1, 0.9, 0.0])
    assert decoded.tolist() == list(texts.values())
    assert not continuation_log_probs(model, chains(), continuations, greedy=False)[1].any()


def test_a_log_probability_that_is_not_a_number_is_refused() -> None:
    probs = torch.full((1, 3, 3), 1 / 3)
    probs[0, A] = torch.nan
    with pytest.raises(PosteriorError, match="found 1 texts whose log-probability is not a number"):
        texts = [Continuation(inputs=(token,), targets=(B,)) for token in (A, C)]
        continuation_log_probs(nn.Linear(1, 1), Chains(probs), texts)
