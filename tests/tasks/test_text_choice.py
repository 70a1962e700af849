"""Scoring by the text of the choices: packed rows against brute force, prompts, and what is refused."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import normalizers
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from bayestune import BlobConfig, predict
from bayestune.errors import BayestuneWarning, ConfigError, DataError
from bayestune.tasks import Prompt, Row, multiple_choice, text_choice
from bayestune.tasks.text_choice import CausalTextChoice
from models import adapter_state, scatter

Tokenizers = dict[str, Callable[[], PreTrainedTokenizerFast]]
Build = Callable[..., PreTrainedModel]
CHAT = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }}\n{% endfor %}<assistant>"


def summed(model: PreTrainedModel, prompt: list[int], whole: list[int]) -> Tensor:
    """log p of the tokens of `whole` after `prompt`, one unpadded sequence."""
    log_probs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return log_probs[range(len(prompt) - 1, len(whole) - 1), whole[len(prompt) :]].sum()


def scores(task: CausalTextChoice, model: PreTrainedModel, rows: Sequence[Row]) -> Tensor:
    return task.outputs(model, task.collate(task.examples(rows, model)))


def model_of(name: str, build: Build, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
    if name != "qwen2":
        return build(name, dtype)
    sizes = build("llama").config.to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Qwen2Config(**{key: sizes[key] for key in kept}, num_key_value_heads=2, initializer_range=0.2)
        return Qwen2ForCausalLM(config).to(dtype).eval()


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize(
    ("attention", "dtype", "bound"),
    [("sdpa", torch.float64, 1e-12), ("sdpa", torch.float32, 1e-5), ("eager", torch.float32, 1e-5)],
)
def test_packed_rows_have_the_sums_of_separate_sequences(
    name: str,
    attention: str,
    dtype: torch.dtype,
    bound: float,
    build: Build,
    tokenizers: Tokenizers,
    questions: list[Row],
) -> None:
    model, tokenizer = model_of(name, build, dtype), tokenizers["lettered"]()
    model.set_attn_implementation(attention)
    task = text_choice("arc_easy", tokenizer, max_tokens=1000)
    found = scores(task, model, questions)
    assert task.packed
    for row, packed in zip(questions, found, strict=True):
        prompt = tokenizer(task.prompt_text(row))["input_ids"]
        wholes = [tokenizer(f"{task.prompt_text(row)} {choice}")["input_ids"] for choice in row.choices]
        expected = torch.stack([summed(model, prompt, whole) for whole in wholes])
        assert (packed[: len(expected)] - expected).abs().max() <= bound * expected.abs().max()
        assert packed[len(expected) :].isneginf().all()


def test_the_gradient_of_packed_rows_is_that_of_separate_sequences(
    build: Build, tokenizers: Tokenizers, questions: list[Row]
) -> None:
    task = text_choice("arc_easy", tokenizers["lettered"](), max_tokens=1000)
    model = build("gpt2")  # Llama's norm rounds to float32
    examples = task.examples(questions, model)
    gradients = []
    for batch in (task._collate_packed(examples), task._collate_apart(examples)):
        model.zero_grad()
        task.loss(model, batch).mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() <= 1e-12 * gradient.abs().max()


def test_stacked_draws_of_packed_rows_are_those_of_separate_sequences(
    build: Build, tokenizers: Tokenizers, questions: list[Row], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BlobConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rho_init=0.4)
    model = scatter(get_peft_model(build("llama"), config)).double()
    assert adapter_state(model)
    task = text_choice("arc_easy", tokenizers["lettered"](), max_tokens=1000)
    packed = predict(model, task, questions, draws=3)
    assert task.packed
    monkeypatch.setattr(CausalTextChoice, "_packs", lambda *_: False)
    apart = predict(model, task, questions, draws=3)
    assert not task.packed
    present = apart.draw_log_probs.isfinite()
    assert (packed.draw_log_probs - apart.draw_log_probs)[present].abs().max() <= 1e-12 * 100  # sums of about 100 nats
    assert apart.epistemic.max() > 1e-3  # the draws differ


def test_models_that_cannot_take_the_mask_get_one_sequence_per_choice(
    build: Build, tokenizers: Tokenizers, questions: list[Row]
) -> None:
    """Bloom counts positions from the mask; Mistral attends within a window, which the mask would lift."""
    tokenizer = tokenizers["lettered"]()
    size = {"vocab_size": len(tokenizer) + 1, "pad_token_id": 0}
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(**size, hidden_size=32, n_layer=2, n_head=2)).eval()
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    task = text_choice("arc_easy", tokenizer, max_tokens=1000)
    longest = max(map(task.tokens, map(task.example, questions)))
    for window, packed in ((longest, True), (longest - 1, False)):
        task = text_choice("arc_easy", tokenizer, max_tokens=1000)
        mistral = MistralForCausalLM(MistralConfig(**size, **wide, num_key_value_heads=2, sliding_window=window))
        task.examples(questions, mistral)
        assert task.packed is packed
        task.examples(questions[:1], mistral)
        assert task.packed is packed  # what one call found holds for the rows of all
    neo = GPTNeoConfig(**size, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["local"], 2]])
    neo.window_size, neo.max_position_embeddings = longest // 2, 1024
    local = GPTNeoForCausalLM(neo).eval()
    task = text_choice("arc_easy", tokenizer, max_tokens=1000)
    task.examples(questions, local)
    assert not task.packed
    task = text_choice("arc_easy", tokenizer, max_tokens=1000)
    task.examples(questions, bloom)
    assert not task.packed
    row = questions[0]
    prompt = tokenizer(task.prompt_text(row))["input_ids"]
    wholes = [tokenizer(f"{task.prompt_text(row)} {choice}")["input_ids"] for choice in row.choices]
    expected = torch.stack([summed(bloom, prompt, whole) for whole in wholes])
    assert (scores(task, bloom, questions)[0, :4] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_score_per_byte(build: Build, tokenizers: Tokenizers) -> None:
    model, tokenizer = build("llama"), tokenizers["lettered"]()
    rows = [
        Row(id="a", question="Which?", choices=("é", "old red barn", "b"), answer=0),
        Row(id="b", question="Why?", choices=("a", "bc"), answer=1),
    ]
    text = scores(text_choice("arc_easy", tokenizer), model, rows)
    per_byte = scores(text_choice("arc_easy", tokenizer, prompt=Prompt(scoring="text_per_byte")), model, rows)
    assert per_byte[0, :3].tolist() == pytest.approx((text[0, :3] / torch.tensor([2, 12, 1])).tolist())
    assert per_byte[1, :2].tolist() == pytest.approx((text[1, :2] / torch.tensor([1, 2])).tolist())


def test_a_choice_that_begins_another_is_scored_as_it_stands(build: Build, tokenizers: Tokenizers) -> None:
    """ARC-Easy asks for "organ" or "organ system": the longer text has the tokens of the shorter, and more."""
    row = Row(id="a", question="Which?", choices=("red", "red barn", "barn"), answer=0)
    found = scores(text_choice("arc_easy", tokenizers["lettered"]()), build("llama"), [row])[0]
    assert found[1] < found[0]


# Prompts.


def with_chat(tokenizers: Tokenizers) -> PreTrainedTokenizerFast:
    tokenizer = tokenizers["lettered"]()
    tokenizer.chat_template = CHAT
    return tokenizer


ROW = Row(id="r", question="Which {choices}?", choices=("x", "y"), answer=0, passage="It is so.")


@pytest.mark.parametrize(
    ("settings", "text", "answers"),
    [
        ({"scoring": "text"}, "Passage: It is so.\nQuestion: Which {choices}?\nAnswer:", [" x", " y"]),
        (
            {"scoring": "text", "style": "chat", "system": "Be brief."},
            "<system> Be brief.\n<user> Passage: It is so.\nQuestion: Which {choices}?\nAnswer:\n<assistant>",
            ["x", "y"],
        ),
        ({"scoring": "text", "style": "{passage} {question} ->"}, "It is so. Which {choices}? ->", [" x", " y"]),
        (
            {"style": '{ "a": 1 } {} {0} {question}', "scoring": "text"},
            '{ "a": 1 } {} {0} Which {choices}?',
            [" x", " y"],
        ),
        (
            {"style": "Q: {question}\n{choices}\nA:", "words": ("one", "two")},
            "Q: Which {choices}?\none) x\ntwo) y\nA:",
            [" one", " two"],
        ),
    ],
)
def test_a_prompt_and_its_answers(
    settings: dict[str, Any], text: str, answers: list[str], tokenizers: Tokenizers
) -> None:
    tokenizer, prompt = with_chat(tokenizers), Prompt(**settings)
    task = text_choice("arc_easy", tokenizer, prompt=prompt)
    assert task.prompt_text(ROW) == text
    assert task.answers(ROW) == answers


def test_a_chat_holds_its_special_tokens_once(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["sentencepiece"]()
    tokenizer.chat_template = "{{ bos_token }}" + CHAT
    task = text_choice("arc_easy", tokenizer, prompt=Prompt(scoring="text", style="chat"))
    context = task.example(ROW)["context"]
    assert context.count(tokenizer.bos_token_id) == 1 and context[0] == tokenizer.bos_token_id


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"style": "Say:"}, r"prompt: found 'Say:' without \{question\}"),
        ({"style": "{question}"}, r"without \{choices\}, .* as scoring letters needs"),
        (
            {"style": "{question} {chioces}"},
            r"found \{chioces\} in .*, expected \{question\}, \{choices\}, \{passage\}; ",
        ),
        ({"style": "{question} {subject}", "scoring": "text"}, r"write \{ subject \} for literal braces"),
        ({"system": "Be brief."}, "system: found one for prompt 'paper', expected prompt chat"),
        ({"scoring": "text", "words": ("one", "two")}, "label_words: found some for scoring text"),
        ({"words": ("one", "one")}, "label_words: found one, one, expected a different word"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prompt(**settings)


def test_a_template_that_refuses_a_system_message(tokenizers: Tokenizers) -> None:
    tokenizer = with_chat(tokenizers)
    tokenizer.chat_template = "{{ raise_exception('no system') if messages[0]['role'] == 'system' }}" + CHAT
    text_choice("arc_easy", tokenizer, prompt=Prompt(scoring="text", style="chat"))
    with pytest.raises(ConfigError, match="the chat template refuses these messages: .*no system; leave out --system"):
        text_choice("arc_easy", tokenizer, prompt=Prompt(scoring="text", style="chat", system="Be brief."))


def test_a_shot_of_another_data_set_keeps_its_own_choices(tokenizers: Tokenizers) -> None:
    shot = Row(id="s", question="Which?", choices=("x", "y", "z"), answer=2)
    asked = Row(id="r", question="Is it so?", choices=("False", "True"), answer=1)
    task = multiple_choice("boolq", tokenizers["lettered"](), prompt=Prompt(shots=(shot,)))
    first, second = task.prompt_text(asked).split("\n\n")
    assert first.endswith("A) x\nB) y\nC) z\nAnswer: C") and "False or True" in second


def test_choices_with_the_same_tokens_are_told(build: Build, tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["lettered"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    row = Row(id="same", question="Which?", choices=("Red", "red"), answer=0)
    with pytest.warns(BayestuneWarning, match="1 of 1 rows of arc_easy have different choices .* such as row 'same'"):
        text_choice("arc_easy", tokenizer).examples([row], build("llama"))


def test_a_chat_prompt_needs_a_chat_template(tokenizers: Tokenizers) -> None:
    with pytest.raises(ConfigError, match="the tokenizer has no chat template"):
        text_choice("arc_easy", tokenizers["lettered"](), prompt=Prompt(scoring="text", style="chat"))


def test_a_row_whose_choice_is_too_long_is_refused(tokenizers: Tokenizers, questions: list[Row]) -> None:
    task = text_choice("arc_easy", tokenizers["lettered"](), max_tokens=1000)
    row = questions[0]
    longest = task.tokens(task.example(row))
    text_choice("arc_easy", tokenizers["lettered"](), max_tokens=longest).check([row])
    with pytest.raises(DataError, match=f"found {longest} tokens with its prompt and answer"):
        text_choice("arc_easy", tokenizers["lettered"](), max_tokens=longest - 1).check([row])


@pytest.mark.parametrize("style", ["paper", "chat"])
def test_shots_that_are_too_long_are_not_the_fault_of_a_row(
    style: str, tokenizers: Tokenizers, questions: list[Row]
) -> None:
    tokenizer, row = with_chat(tokenizers), questions[0]

    def asked(shots: tuple[Row, ...], **limit: int) -> CausalTextChoice:
        return text_choice("arc_easy", tokenizer, prompt=Prompt(scoring="text", style=style, shots=shots), **limit)

    def longest(task: CausalTextChoice) -> int:
        return task.tokens(task.example(row))

    shots = tuple(questions[1:3])
    whole, own = longest(asked(shots, max_tokens=1000)), longest(asked((), max_tokens=1000))
    assert asked(shots, max_tokens=whole).shot_tokens == whole - own
    shown = whole - own
    with pytest.raises(DataError, match=f"{whole} tokens with its prompt and answer, {shown} of them of the 2 shots"):
        asked(shots, max_tokens=whole - 1).check([row])
    asked(shots, max_tokens=shown + 1)
    with pytest.raises(ConfigError, match=f"shots: found 2 with {shown} tokens.* fewer than {shown} .* raise"):
        asked(shots, max_tokens=shown)


@pytest.mark.parametrize("bound", [False, True])
def test_a_model_that_does_not_bind_labels_is_pointed_to_texts(
    bound: bool, build: Build, tokenizers: Tokenizers
) -> None:
    """Random weights answer 50 rows at chance. Labels that are the model's own answers are bound."""
    model, task = build("llama"), multiple_choice("arc_easy", tokenizers["lettered"](), max_tokens=1000)
    rows = [Row(id=f"{i}", question=f"Why {i}?", choices=("a", "b", "c", "d"), answer=i % 4) for i in range(50)]
    if bound:
        answers = predict(model, task, rows, draws=0).answer.tolist()
        rows = [dataclasses.replace(row, answer=answer) for row, answer in zip(rows, answers, strict=True)]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        task.advise(model, rows)
        task.advise(model, rows[:49])
    assert ["--scoring text" in str(each.message) for each in told] == ([] if bound else [True])
