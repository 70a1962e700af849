"""N8: torch.compile, gradient checkpointing and the attention kernel do not change what a draw or a step computes."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from bayestune.adapters import drawn_weights, gaussian_layers, training_noise
from bayestune.inference.draws import draw
from bayestune.sampling.stacked import stacked_weights
from models import BERT, LLAMA, QWEN2, T5, Architecture, blob, logits, scatter


def in_a_new_thread(work: Callable[[], object]) -> None:
    """A thread in which no draw was ever active: what was compiled there first must still notice one."""
    with ThreadPoolExecutor(1) as pool:
        pool.submit(work).result()


def assert_compiled_follows(model: PeftModel, part: nn.Module, inputs: dict[str, Tensor], backend: str) -> None:
    """Compiled, `part` of `model` gives what it gives eagerly: the mean, any draw, and several draws at once."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(part, backend=counter, fullgraph=True)
    mean = part(**inputs)

    def check() -> Tensor:
        expected = part(**inputs)
        torch.testing.assert_close(compiled(**inputs), expected, rtol=1e-5, atol=1e-6)
        return expected

    with torch.no_grad():
        check()
        for index in range(3):
            with draw(model, index=index):
                assert not torch.allclose(check(), mean, atol=1e-3)
        torch.testing.assert_close(check(), mean, rtol=0, atol=0)
        assert counter.frame_count == 2  # one graph for the mean and one for all draws, none with a break
        with draw(model, index=1):
            in_a_new_thread(torch.no_grad()(check))
        with drawn_weights(stacked_weights(model, range(inputs[next(iter(inputs))].shape[0]), seed=0)):
            check()
    torch.compiler.reset()


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs).logits


@pytest.mark.property("N08")
def test_a_compiled_layer() -> None:
    model = blob(LLAMA).eval()
    layer = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")
    x = torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0))
    in_a_new_thread(lambda: assert_compiled_follows(model, layer, {"x": x}, "aot_eager"))


@pytest.mark.property("N08")
def test_a_compiled_model() -> None:
    model = scatter(get_peft_model(LLAMA.build(num_hidden_layers=1), LLAMA.config())).eval()
    in_a_new_thread(lambda: assert_compiled_follows(model, Logits(model), LLAMA.inputs(), "eager"))


def gradients(model: PeftModel, inputs: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    clock = training_noise(model)
    clock.seed, clock.step, clock.micro = 7, step, 0
    model.zero_grad()
    model(**inputs).logits.square().mean().backward()
    assert clock.micro == 1
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}


@pytest.mark.property("N08")
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("architecture", "reentrant", "estimator"),
    [
        (LLAMA, True, "independent"),
        (LLAMA, False, "flipout"),
        (LLAMA, True, "flipout_token"),
        (T5, False, "independent"),
        (BERT, True, "flipout"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_gradient_checkpointing(
    architecture: Architecture, reentrant: bool, estimator: str, figure: Callable[..., None]
) -> None:
    inputs = architecture.inputs()
    model = blob(architecture, estimator=estimator).double()
    expected = gradients(model, inputs, step=1)
    assert len(expected) >= 3 * architecture.layers
    other = gradients(model, inputs, step=2)
    assert not any(torch.allclose(other[name], expected[name]) for name in expected if ".lora_" in name)

    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    next(iter(gaussian_layers(model).values())).register_forward_hook(count)
    found = gradients(model, inputs, step=1)
    assert calls == 2  # the layer was in fact computed again
    assert found.keys() == expected.keys()
    error = max((gradient - expected[name]).abs().max().item() for name, gradient in found.items())
    figure("gradients with checkpointing less those without", error, at_most=1e-12)  # T5 adds in another order


@pytest.mark.property("N08")
@pytest.mark.parametrize("architecture", [LLAMA, QWEN2, BERT], ids=lambda a: a.name)
def test_the_attention_kernel(architecture: Architecture) -> None:
    inputs = architecture.inputs(rows=4, tokens=7)
    if architecture is not BERT:  # rows of several lengths, padded on the left, compared at their last token
        for row in range(4):
            inputs["attention_mask"][row, :row] = 0
    model = blob(architecture)
    clock = training_noise(model)
    results: dict[str, list[Tensor]] = {}
    for kernel in ("sdpa", "eager"):
        model.base_model.model.set_attn_implementation(kernel)
        assert model.base_model.model.config._attn_implementation == kernel
        model.train()
        clock.micro = 0
        found = [logits(model, inputs)]
        model.eval()
        found.append(logits(model, inputs))
        for index in range(3):
            with draw(model, index=index):
                found.append(logits(model, inputs))
        results[kernel] = [each if each.dim() == 2 else each[:, -1] for each in found]
    for one, other in zip(results["sdpa"], results["eager"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(results["sdpa"][1], results["sdpa"][2], atol=1e-3)
