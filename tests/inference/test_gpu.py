"""A GPU answers as the CPU does: the draws are the same weights on both."""

from collections.abc import Callable

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from bayestune.inference import predict
from inference.cases import Letters, rows
from models import GPT2, LLAMA, QWEN2, Architecture, scatter

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

DECODERS = pytest.mark.parametrize("architecture", [LLAMA, QWEN2, GPT2], ids=lambda architecture: architecture.name)
ROWS = rows(200)


def answers(architecture: Architecture, device: str, dtype: torch.dtype) -> Tensor:
    """The predictive probabilities of ten draws, of a base whose answers differ from row to row."""
    model = scatter(get_peft_model(architecture.build(initializer_range=0.08), architecture.config()))
    return predict(model.to(device, dtype), Letters(), ROWS, draws=10, seed=3).probs


@pytest.mark.property("N06")
@DECODERS
def test_float32_agrees_with_the_cpu(architecture: Architecture, figure: Callable[..., None]) -> None:
    assert torch.get_float32_matmul_precision() == "highest"  # no TF32, which is torch's default
    found = answers(architecture, "cuda", torch.float32)
    expected = answers(architecture, "cpu", torch.float32)
    figure("probabilities, GPU less CPU, float32", (found - expected).abs().max().item(), at_most=1e-5)


@pytest.mark.property("N06")
@DECODERS
def test_bf16_agrees_with_float32(architecture: Architecture, figure: Callable[..., None]) -> None:
    found = answers(architecture, "cuda", torch.bfloat16)
    expected = answers(architecture, "cpu", torch.float32)
    figure("probabilities, bf16 on the GPU less float32", (found - expected).abs().max().item(), at_most=0.02)
    best = expected.topk(2, dim=-1).values
    clear = best[:, 0] - best[:, 1] > 0.05
    agreeing = (found.argmax(-1) == expected.argmax(-1))[clear].double().mean().item()
    assert clear.sum() >= 50
    figure("share of clear answers that are the same in bf16", agreeing, at_least=0.99)
