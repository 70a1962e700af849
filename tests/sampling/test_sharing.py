"""Blocks below the first random layer see each row once: the same draws, and what cannot be shared is not."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMultipleChoice,
    BloomConfig,
    BloomForCausalLM,
    ElectraConfig,
    ElectraForSequenceClassification,
    PreTrainedModel,
)

from bayestune import BlobConfig
from bayestune.adapters import TrainingNoise, random_layers
from bayestune.errors import DrawError
from bayestune.sampling.sharing import CopiesDiffer, shared_blocks, sharing
from bayestune.sampling.stacked import StackedDraws
from inference.cases import Letters
from models import BERT, GPT2, HIDDEN, LLAMA, QWEN2, T5, VOCABULARY, scatter, seeded

DRAWS = 4
Figure = Callable[..., None]
_ENCODER = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_attention_heads": 4}


class Whole(Letters):
    """The logits of the last position, or of the head."""

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**batch).logits
        return logits[:, -1] if logits.dim() == 3 else logits


def multiple_choice() -> PreTrainedModel:
    return seeded(lambda: BertForMultipleChoice(BertConfig(**_ENCODER, num_hidden_layers=4)), 0)


def bloom() -> PreTrainedModel:
    config = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": 4, "n_head": 4}
    return seeded(lambda: BloomForCausalLM(BloomConfig(**config)), 0)


def electra() -> PreTrainedModel:
    """It has a projection in front of its blocks."""
    config = ElectraConfig(**_ENCODER, num_hidden_layers=4, embedding_size=16)
    return seeded(lambda: ElectraForSequenceClassification(config), 0)


def adapted(base: PreTrainedModel, **settings: Any) -> PeftModel:
    config = BlobConfig(r=4, lora_alpha=8, rho_init=0.4, **settings)
    model = get_peft_model(base.double(), config)
    assert isinstance(model, PeftModel)
    return scatter(model).eval()


UPPER = {"layers_to_transform": [2, 3]}
CASES: dict[str, tuple[Callable[[], PeftModel], int]] = {
    "llama": (lambda: adapted(LLAMA.build(num_hidden_layers=4), target_modules=["q_proj", "v_proj"], **UPPER), 2),
    "llama, head alone": (lambda: adapted(LLAMA.build(num_hidden_layers=4), target_modules=["lm_head"]), 4),
    "llama, a hole": (
        lambda: adapted(LLAMA.build(num_hidden_layers=4), target_modules=["q_proj"], layers_to_transform=[1, 3]),
        1,
    ),
    "qwen2": (lambda: adapted(QWEN2.build(num_hidden_layers=4), target_modules=["down_proj"], **UPPER), 2),
    "gpt2": (lambda: adapted(GPT2.build(n_layer=4), target_modules=["c_attn"], fan_in_fan_out=True, **UPPER), 2),
    "bloom": (lambda: adapted(bloom(), target_modules=["query_key_value"], **UPPER), 2),
    "bert": (lambda: adapted(BERT.build(num_hidden_layers=4), target_modules=["query", "value"], **UPPER), 2),
    "bert, 2 choices": (lambda: adapted(multiple_choice(), target_modules=["query", "value"], **UPPER), 2),
    "bert, as many choices as draws": (
        lambda: adapted(multiple_choice(), target_modules=["query", "value"], **UPPER),
        2,
    ),
    "t5, decoder alone": (lambda: adapted(T5.build(), target_modules=r"decoder\.block\.1\..*\.(q|v)"), 3),
}
CHOICES = {"bert, 2 choices": 2, "bert, as many choices as draws": DRAWS}
INPUTS = {"gpt2": GPT2, "bert": BERT, "t5, decoder alone": T5}


def inputs(case: str, rows: int) -> dict[str, Tensor]:
    found = INPUTS.get(case, LLAMA).inputs(rows)
    if case != "gpt2" and case != "bloom" and rows > 1:
        found["attention_mask"][0, :2] = 0  # a mask of its own for each row
    if "choices" in case:
        turned = [torch.stack([value.roll(i, 1) for i in range(CHOICES[case])], 1) for value in found.values()]
        return dict(zip(found, turned, strict=True))
    return found


def hooked(model: nn.Module) -> list[str]:
    """The modules with a hook, but for the clock of the training noise."""
    hooks = {name: (*m._forward_pre_hooks.values(), *m._forward_hooks.values()) for name, m in model.named_modules()}
    return [name for name, found in hooks.items() if any(not isinstance(hook, TrainingNoise) for hook in found)]


def one_by_one(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return torch.cat([answered(model, batch, range(k, k + 1))[0] for k in range(DRAWS)])


def together(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, StackedDraws]:
    return answered(model, batch, range(DRAWS))


def answered(model: nn.Module, batch: dict[str, Tensor], part: range) -> tuple[Tensor, StackedDraws]:
    sampler = StackedDraws.of(model, draws=DRAWS, seed=0)
    with torch.inference_mode():
        return sampler.logits(Whole(), batch, part), sampler


@pytest.mark.parametrize("rows", [1, 3, DRAWS])
@pytest.mark.parametrize("case", CASES)
def test_N07_shared_blocks_leave_the_draws_as_they_are(case: str, rows: int, figure: Figure) -> None:
    make, count = CASES[case]
    model, batch = make(), inputs(case, rows)
    expected = one_by_one(model, batch)
    found, sampler = together(model, batch)
    assert sum(map(len, shared_blocks(model, random_layers(model).values()))) == count
    assert sum(map(len, sampler._shared)) == count  # no copies differed
    figure("logits, shared blocks less one draw at a time", (found - expected).abs().max().item(), at_most=1e-12)
    assert (expected[0] - expected[1]).abs().max() > 1e-6
    assert not hooked(model)


def test_shared_blocks_see_each_row_once() -> None:
    model, batch = CASES["llama"][0](), inputs("llama", 3)
    seen: list[int] = []
    handles = [
        block.self_attn.register_forward_hook(lambda _, __, output: seen.append(len(output[0])))
        for block in model.get_base_model().model.layers
    ]
    together(model, batch)
    for handle in handles:
        handle.remove()
    assert seen == [3, 3, 3 * DRAWS, 3 * DRAWS]


def test_nothing_is_shared_above_a_random_layer_in_front_of_the_blocks() -> None:
    model = adapted(electra(), target_modules=r".*(embeddings_project|layer\.3\.attention\.self\.query)")
    batch = BERT.inputs(3)
    assert len(shared_blocks(model, random_layers(model).values())) == 1
    found, sampler = together(model, batch)
    assert sampler._shared == []
    assert (found - one_by_one(model, batch)).abs().max() <= 1e-12


def test_a_list_is_shared_though_another_cannot_be() -> None:
    """T5 with a random layer in the last block of the encoder: every block of the decoder sees other memories."""
    model, batch = adapted(T5.build(), target_modules=r".*(encoder|decoder)\.block\.1\..*\.q"), T5.inputs(3)
    assert [len(run) for run in shared_blocks(model, random_layers(model).values())] == [1, 1]
    found, sampler = together(model, batch)
    assert [len(run) for run in sampler._shared] == [1]
    assert (found - one_by_one(model, batch)).abs().max() <= 1e-12


def test_blocks_that_run_twice_are_not_shared_the_second_time() -> None:
    layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)]).double()
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[:2].repeat(3, 1)
    noise = torch.arange(6, dtype=torch.float64)[:, None]
    run = [layers[0]]
    with sharing([run], rows=2, copies=3):
        once = layers[1](layers[0](x)) + noise
        with pytest.raises(CopiesDiffer) as raised:
            layers[0](once)
    assert raised.value.run is run
    assert torch.equal(once, layers[1](layers[0](x)) + noise)
    assert not hooked(layers)


def hooked_blocks(*hooks: tuple[int, Callable[..., Any]]) -> PeftModel:
    """A Llama with forward hooks on some of its blocks, random layers in the last two."""
    model = CASES["llama"][0]()
    for block, hook in hooks:
        model.get_base_model().model.layers[block].register_forward_hook(hook)
    return model


@pytest.mark.parametrize("rows", [1, 3, DRAWS])
def test_what_goes_past_the_blocks_is_right_or_not_shared(rows: int) -> None:
    """As in models that share keys between layers."""
    kept: list[Tensor] = []
    model = hooked_blocks((0, lambda _, __, out: kept.append(out)), (3, lambda _, __, out: out + kept.pop()))
    batch = inputs("llama", rows)
    expected = one_by_one(model, batch)
    found, sampler = together(model, batch)
    assert (found - expected).abs().max() <= 1e-12
    assert len(sampler._shared) == (rows == 1)  # one row broadcasts to all copies


@pytest.mark.parametrize("rows", [1, 3, DRAWS])
@pytest.mark.parametrize("how", ["a random layer of another block", "writes into its input", "another error"])
def test_blocks_that_do_more_than_blocks_do_are_not_shared(how: str, rows: int) -> None:
    def borrow(block: nn.Module, args: Any, out: Tensor) -> Tensor:
        return out + model.get_base_model().model.layers[3].self_attn.q_proj(out)

    def write(block: nn.Module, args: Any, out: Tensor) -> None:
        args[0].add_(1.0)

    def fail(block: nn.Module, args: Any, out: Tensor) -> None:
        if len(out) < rows * DRAWS and narrowed:
            raise ValueError("found too few rows")

    narrowed: list[bool] = []
    hooks = {"a random layer of another block": borrow, "writes into its input": write, "another error": fail}
    model, batch = hooked_blocks((0, hooks[how])), inputs("llama", rows)
    expected = one_by_one(model, batch)
    narrowed.append(True)
    found, sampler = together(model, batch)
    assert sampler._shared == []
    assert (found - expected).abs().max() <= 1e-12


class OneByOne(Whole):
    """A forward for each row of the batch."""

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        rows = range(len(batch["input_ids"]))
        return torch.cat(
            [super(OneByOne, self).logits(model, {k: v[i : i + 1] for k, v in batch.items()}) for i in rows]
        )


@pytest.mark.parametrize("rows", [1, 3])
def test_a_task_that_looks_at_one_row_at_a_time_is_refused_as_ever(rows: int) -> None:
    """Its stacked draws cannot be told apart: `predict` then loops over the draws."""
    model, batch = CASES["llama"][0](), inputs("llama", rows)
    sampler = StackedDraws.of(model, draws=DRAWS, seed=0)
    with torch.inference_mode(), pytest.raises(DrawError):
        sampler.logits(OneByOne(), batch, range(DRAWS))


class Shallow(Whole):
    """Logits that the upper blocks have no part in."""

    def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        found: list[Tensor] = []
        handle = model.get_base_model().model.layers[0].register_forward_hook(lambda _, __, out: found.append(out))
        model(**batch)
        handle.remove()
        return found[0][:, -1, :3]


def test_logits_from_below_the_draws_are_not_shared() -> None:
    model, batch = CASES["llama"][0](), inputs("llama", DRAWS)
    sampler = StackedDraws.of(model, draws=DRAWS, seed=0)
    with torch.inference_mode():
        found = sampler.logits(Shallow(), batch, range(DRAWS))
        one = sampler.logits(Shallow(), batch, range(1))
    assert sampler._shared == []
    assert (found - one).abs().max() <= 1e-12


def test_memory_that_runs_out_is_not_taken_for_a_model_that_cannot_share() -> None:
    model, batch = CASES["llama"][0](), inputs("llama", 2)
    sampler = StackedDraws.of(model, draws=DRAWS, seed=0)

    class Full(Whole):
        def logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        sampler.logits(Full(), batch, range(DRAWS))
    assert len(sampler._shared) == 1 and not hooked(model)


def test_an_error_in_the_forward_leaves_no_hook() -> None:
    model, batch = CASES["llama"][0](), inputs("llama", 2)
    with pytest.raises(IndexError):
        together(model, {**batch, "input_ids": batch["input_ids"] + 10 * VOCABULARY})
    assert not hooked(model)


def test_N07_another_thread_meanwhile_sees_the_whole_model() -> None:
    model, batch = CASES["llama"][0](), inputs("llama", 4)
    found: list[Tensor] = []
    blocks = shared_blocks(model, random_layers(model).values())

    def forward() -> None:
        with torch.no_grad():
            found.append(model(**batch).logits)

    forward()
    with sharing(blocks, rows=2, copies=2):
        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
    assert torch.equal(*found)


@pytest.mark.parametrize("how", ["a block", "the model"])
def test_compiled_models_are_not_shared(how: str) -> None:
    model, batch = CASES["llama"][0](), inputs("llama", 3)
    expected = one_by_one(model, batch)
    if how == "a block":
        model.get_base_model().model.layers[0].compile(backend="eager")
        compiled: Any = model
    else:
        compiled = torch.compile(model, backend="eager")
    found, sampler = together(compiled, batch)
    assert sampler._shared == []
    assert (found - expected).abs().max() <= 1e-12
