"""Tokenizers with a pad that is the EOS, none at all, a chat template, a doubled BOS, or tokens of no model."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tokenizers import processors
from transformers import (
    BertConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from bayestune.errors import ConfigError, DataError, TaskError
from bayestune.experiment.backbone import Backbone, build_task
from bayestune.inference import predict
from bayestune.tasks import Row, TextRow, classification, encoder_multiple_choice, multiple_choice
from bayestune.training import BayesTrainer
from models import BERT, LLAMA, Architecture
from training.toys import arguments

Tokenizers = dict[str, Callable[[], PreTrainedTokenizerFast]]
Build = Callable[..., PreTrainedModel]


@pytest.mark.property("D10")
@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece with EOS"])
def test_a_pad_that_is_the_EOS_changes_nothing(
    tokenizers: Tokenizers, questions: list[Row], build: Build, figure: Callable[..., None], name: str
) -> None:
    plain, padded = tokenizers[name](), tokenizers[name]()
    padded.pad_token = "</s>"
    assert (plain.pad_token_id, padded.pad_token_id) == (None, padded.eos_token_id)
    model, found = build("llama"), []
    for tokenizer in (plain, padded):
        task = multiple_choice("arc_easy", tokenizer, max_tokens=1000)
        examples = [task.example(row) for row in questions]
        batches = [task.collate(examples), *(task.collate([example]) for example in examples)]
        with torch.inference_mode():
            singles = torch.cat([task.outputs(model, batch) for batch in batches[1:]])
            found += [task.outputs(model, batches[0]), singles]
    worst = max((logits.softmax(-1) - found[1].softmax(-1)).abs().max().item() for logits in found)
    figure("probabilities, pad = EOS and no pad, in a batch and alone", worst, at_most=1e-12)


@dataclass(frozen=True)
class Decoder:
    """A Llama with a classification head, and logits read from its last token of a row alone."""

    model: LlamaForSequenceClassification

    def at_the_end(self, ids: list[int]) -> torch.Tensor:
        hidden = self.model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return self.model.score(hidden[0, -1])


@pytest.fixture
def decoder() -> Decoder:
    config = LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_labels=2, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Decoder(LlamaForSequenceClassification(config).double().eval())


@pytest.mark.property("D10")
@pytest.mark.parametrize("pad", [None, "</s>"])
def test_a_decoder_without_a_pad_of_its_own_is_read_at_the_last_token(
    tokenizers: Tokenizers, decoder: Decoder, figure: Callable[..., None], pad: str | None
) -> None:
    """Also where the last token has the id 0."""
    tokenizer = tokenizers["plain bytes"]()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    tokenizer.pad_token = pad
    rows = [TextRow(id=str(i), text=text, label=0) for i, text in enumerate(["Go!", "Go", "They went to sea!!", "!"])]
    task = classification("rte", tokenizer)
    assert task.pad_id == tokenizer.eos_token_id and tokenizer("!")["input_ids"] == [0]
    decoder.model.config.pad_token_id = task.pad_id
    batch = task.collate([task.example(row) for row in rows])
    with torch.inference_mode():
        found = task.outputs(decoder.model, batch)
        expected = torch.stack([decoder.at_the_end(tokenizer(row.text)["input_ids"]) for row in rows])
    assert (expected[0] - expected[1]).abs().max() > 0.01
    figure("logits of a decoder's head, in a batch", (found - expected).abs().max().item(), at_most=1e-12)


@pytest.mark.property("D10")
def test_no_chat_template_is_needed_or_used(tokenizers: Tokenizers, questions: list[Row]) -> None:
    plain, chatty = tokenizers["lettered"](), tokenizers["lettered"]()
    assert plain.chat_template is None
    chatty.chat_template = "{{ raise_exception('used') }}"
    examples = [[multiple_choice("arc_easy", t).example(row) for row in questions] for t in (plain, chatty)]
    assert examples[0] == examples[1]


@pytest.mark.property("D10")
def test_a_BOS_that_comes_twice_is_refused(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["sentencepiece"]()
    multiple_choice("openbookqa", tokenizer)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <s> $A", special_tokens=[("<s>", 0)]
    )
    with pytest.raises(
        TaskError, match="openbookqa: this tokenizer cannot score it: it puts '<s>' before a text twice"
    ):
        multiple_choice("openbookqa", tokenizer)


@pytest.mark.property("D10")
def test_choices_padded_with_another_id_than_the_models_are_refused(
    tokenizers: Tokenizers, questions: list[Row], build: Build
) -> None:
    """RoBERTa counts its positions by the pad of its own."""
    task, model = encoder_multiple_choice("arc_easy", tokenizers["encoder"]()), build("bert choice")
    model.config.pad_token_id = 5
    with pytest.raises(TaskError, match="the model pads with id 5 and the tokenizer with 0"):
        task.outputs(model, task.collate([task.example(row) for row in questions]))


def backbone(tokenizer: PreTrainedTokenizerFast, *, decodes: bool, **settings: Any) -> Backbone:
    config = LlamaConfig(**settings) if decodes else BertConfig(**settings)
    family = "causal" if decodes else "encoder"
    return Backbone(source="here", config=config, tokenizer=tokenizer, family=family, positions=None)


@pytest.mark.property("D10")
@pytest.mark.parametrize("decodes", [True, False])
def test_a_row_with_a_token_beyond_the_embeddings_is_refused_and_others_are_not(
    tokenizers: Tokenizers, decodes: bool
) -> None:
    """Published tokenizers have tokens that no text uses, for images, say, beyond the embeddings."""
    tokenizer = tokenizers["encoder"]()
    tokenizer.add_tokens(["<é>", "<b>"])
    size = tokenizer.convert_tokens_to_ids("<é>")
    rows = [Row(id=text, question=text, choices=("<c>", "é"), answer=0) for text in ("a <c>", "é", "a <b> c", "<é>")]
    task = build_task(backbone(tokenizer, decodes=decodes, vocab_size=size + 2), "openbookqa", None, 300)
    task.check(rows)
    task = build_task(backbone(tokenizer, decodes=decodes, vocab_size=size), "openbookqa", None, 300)
    task.check(rows[:2])
    with pytest.raises(DataError) as caught:
        task.check(rows)
    says = f"(id a <b> c): field 'question': found token '<b>' with id {size + 1}, expected ids below {size}, "
    assert says in str(caught.value) and "(2 of 4 rows cannot be used)" in str(caught.value)
    with pytest.raises(DataError, match=rf"token '<\\xe9>' with id {size}, expected"):
        task.check(rows[3:])
    sentences = build_task(backbone(tokenizer, decodes=decodes, vocab_size=size), "rte", None, 300)
    with pytest.raises(DataError, match="field 'text': found token '<b>'"):
        sentences.check([TextRow(id="t", text="a <b> c", label=0)])


@pytest.mark.property("D10")
@pytest.mark.parametrize("architecture", [LLAMA, BERT], ids=lambda architecture: architecture.name)
def test_training_and_predicting_refuse_a_token_without_an_embedding_by_its_row(
    tokenizers: Tokenizers, tmp_path: Path, architecture: Architecture
) -> None:
    """With tasks and models put together by hand; a pad without one is refused where rows are padded."""
    tokenizer = tokenizers["lettered"]() if architecture is LLAMA else tokenizers["encoder"]()
    size = len(tokenizer)
    tokenizer.add_tokens(["<new>"])
    sizes = {"vocab_size": size, "max_position_embeddings": 200, "pad_token_id": None, "num_labels": 2}
    model = get_peft_model(architecture.build(**sizes), architecture.config())
    if architecture is LLAMA:
        task = multiple_choice("openbookqa", tokenizer)
        rows = [Row(id=text, question=text, choices=tuple("wxyz"), answer=0) for text in ("an old one", "a <new> one")]
    else:
        task = classification("rte", tokenizer)
        rows = [TextRow(id=text, text=text, label=0) for text in ("an old one", "a <new> one")]
    says = rf"\(id a <new> one\): field '\w+': found token '<new>' with id {size}, expected ids below {size}, "
    with pytest.raises(DataError, match=says):
        predict(model, task, rows, draws=2)
    with pytest.raises(DataError, match=says):
        BayesTrainer(model, task=task, args=arguments(tmp_path), train_rows=rows)
    with pytest.raises(DataError, match=says):
        BayesTrainer(model, task=task, args=arguments(tmp_path), train_rows=rows[:1], eval_rows=rows)
    assert predict(model, task, rows[:1], draws=0).probs.isfinite().all()
    longer = dataclasses.replace(
        rows[0], id="longer", **{"text" if architecture is BERT else "question": "an older one"}
    )
    tokenizer.pad_token = "<new>"
    task = type(task)(task.spec, tokenizer, data=None, max_tokens=200)
    predict(model, task, rows[:1], draws=0)
    with pytest.raises(TaskError, match=f"pads with id {size}, expected one below {size}, the embeddings"):
        predict(model, task, [rows[0], longer], draws=0)


@pytest.mark.property("D10")
@pytest.mark.parametrize("decodes", [True, False])
def test_a_pad_beyond_the_embeddings_is_refused_before_the_weights_are_read(
    tokenizers: Tokenizers, decodes: bool
) -> None:
    tokenizer = tokenizers["encoder"]()
    tokenizer.add_special_tokens({"pad_token": "<new>"})
    size = tokenizer.pad_token_id
    build_task(backbone(tokenizer, decodes=decodes, vocab_size=size + 1, pad_token_id=size), "openbookqa", None, 300)
    with pytest.raises(ConfigError, match=f"it pads with id {size}, expected one below {size}, the embeddings"):
        build_task(backbone(tokenizer, decodes=decodes, vocab_size=size), "openbookqa", None, 300)


@pytest.mark.property("D10")
def test_another_pad_than_the_encoders_is_refused_before_the_weights_are_read(tokenizers: Tokenizers) -> None:
    for name in ("openbookqa", "rte"):
        build_task(backbone(tokenizers["encoder"](), decodes=False, pad_token_id=0), name, None, 300)
        with pytest.raises(ConfigError, match="it pads with id 0 and the model with 5, expected the same"):
            build_task(backbone(tokenizers["encoder"](), decodes=False, pad_token_id=5), name, None, 300)
    build_task(backbone(tokenizers["with pad"](), decodes=True, pad_token_id=5), "openbookqa", None, 300)
    build_task(backbone(tokenizers["lettered"](), decodes=True, pad_token_id=5), "rte", None, 300)
