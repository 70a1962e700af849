"""Rows with one token to look at, or none: an answer or an error by name, never NaN."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, normalizers, processors
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bayestune.errors import BayestuneWarning, DataError, TaskError
from bayestune.inference import predict
from bayestune.tasks import Row, TextRow, classification, encoder_multiple_choice, multiple_choice
from bayestune.tasks.tensors import widen
from bayestune.training import BayesTrainer
from models import BERT, GPT2, LLAMA, Architecture, blob
from training.toys import ToyTask, arguments

INVISIBLE = "\u200b"  # zero width: no blank to Python, nothing to many a tokenizer
Tokenizers = dict[str, Callable[[], PreTrainedTokenizerFast]]
Build = Callable[..., PreTrainedModel]


@pytest.fixture
def bare(tokenizers: Tokenizers) -> PreTrainedTokenizerFast:
    """An encoder's tokenizer that drops invisible characters and adds no token of its own."""
    tokenizer = tokenizers["encoder"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(INVISIBLE, "")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B:1", special_tokens=[]
    )
    return tokenizer


@pytest.mark.property("N05")
def test_a_text_without_a_token_is_refused_by_name(bare: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"f:3 \(id r\): field 'text': found text without a token"):
        classification("rte", bare).example(TextRow(id="r", text=INVISIBLE, label=0, where="f:3"))
    task = encoder_multiple_choice("openbookqa", bare)
    with pytest.raises(DataError, match=r"\(id r\): field 'question': found text without a token"):
        task.example(Row(id="r", question=INVISIBLE, choices=("some", INVISIBLE), answer=0))


def test_choices_that_are_the_same_to_the_tokenizer_are_named(bare: PreTrainedTokenizerFast) -> None:
    task = encoder_multiple_choice("openbookqa", bare)
    model = BERT.build(vocab_size=len(task.tokenizer))
    clear = Row(
        id="clear", question="q", choices=("some", "other", "some"), answer=1
    )  # twice the same text is no news
    blurred = Row(id="blurred", question="q", choices=("some", f"some{INVISIBLE}"), answer=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.examples([clear], model)
    with pytest.warns(BayestuneWarning, match=r"^1 of 2 rows of openbookqa .* such as row 'blurred'"):
        assert len(task.examples([clear, blurred], model)) == 2


@pytest.mark.property("N05")
@pytest.mark.parametrize("framed", [True, False], ids=["[CLS] and [SEP]", "bare"])
def test_each_text_of_a_row_has_a_token_of_its_own(
    bare: PreTrainedTokenizerFast, tokenizers: Tokenizers, framed: bool
) -> None:
    """What a tokenizer puts around every text is nothing to look at."""
    tokenizer = tokenizers["encoder"]() if framed else bare
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(INVISIBLE, "")
    sentences = classification("rte", tokenizer)
    sentences.example(TextRow(id="r", text=f"x{INVISIBLE}", text_pair="y"))
    for name in ("text", "text_pair"):
        with pytest.raises(DataError, match=rf"field '{name}': found text without a token \('\\u200b'\)"):
            sentences.example(TextRow(**{"id": "r", "text": "x", "text_pair": "y", name: INVISIBLE}))
    empty = {"question": INVISIBLE, "choices": ("some", INVISIBLE), "passage": INVISIBLE}
    for data, names in (("openbookqa", ["question", "choices", "passage"]), ("winogrande_s", ["choices"])):
        task = encoder_multiple_choice(data, tokenizer)
        plain = {"id": "r", "question": "an _", "choices": ("some", "more"), "passage": "x", "answer": 0}
        task.example(Row(**plain))
        for name in names:
            with pytest.raises(DataError, match=f"field '{name}': found text without a token"):
                task.example(Row(**{**plain, name: empty[name]}))


@pytest.mark.property("N05")
def test_a_text_of_one_token_is_answered_as_any_other(bare: PreTrainedTokenizerFast, build: Build) -> None:
    task, model = classification("rte", bare), build("bert classes")
    one, long = (task.example(TextRow(id="r", text=text, label=0)) for text in ("x", "a longer one"))
    assert task.tokens(one) == 1
    with torch.inference_mode():
        alone = task.outputs(model, task.collate([one]))
        beside = task.outputs(model, task.collate([long, one]))
    assert alone.isfinite().all()
    assert (alone[0] - beside[1]).abs().max() <= 1e-12


class Masked(ToyTask):
    """The rows "all pad" and "all masked" have nothing under their mask, "one token" has one."""

    columns = 3

    def example(self, row: Any) -> dict[str, Any]:
        example = super().example(row)
        if row.id == "all pad":
            example["ids"] = [0, 0, 0]
        elif row.id == "one token":
            example["ids"] = example["ids"][:1]
        return {**example, "masked": row.id in ("all pad", "all masked")}

    def collate(self, examples: Any) -> dict[str, Tensor]:
        batch = super().collate(examples)
        masked = torch.tensor([example["masked"] for example in examples])
        batch["attention_mask"] = batch["attention_mask"].masked_fill(masked[:, None], 0)
        return batch

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = model(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        return widen(logits if logits.dim() == 2 else logits[:, -1, 4:7])


ROWS = [
    Row(id=name, question="why is it so", choices=("a", "b", "c"), answer=i % 3)
    for i, name in enumerate(["all pad", "all masked", "one token", "plain"])
]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bf16"])
def masked_model(request: pytest.FixtureRequest, architecture: Architecture, attention: str) -> PeftModel:
    model = blob(architecture).to(request.param)
    model.get_base_model().set_attn_implementation(attention)
    return model


@pytest.mark.property("N05")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", [LLAMA, GPT2, BERT], ids=lambda architecture: architecture.name)
def test_rows_masked_as_a_whole_are_answered_and_trained_on(
    masked_model: PeftModel, architecture: Architecture, attention: str, tmp_path: Path
) -> None:
    task = Masked()
    together = predict(masked_model, task, ROWS, draws=3).draw_log_probs
    assert together.isfinite().all()
    for chosen in ROWS[:3]:
        alone = predict(masked_model, task, [chosen], draws=2).draw_log_probs
        assert alone.isfinite().all()
    trainer = BayesTrainer(
        masked_model, task=task, args=arguments(tmp_path, per_device_train_batch_size=4), train_rows=ROWS
    )
    trainer.train()
    assert all(parameter.isfinite().all() for parameter in masked_model.parameters())


@pytest.mark.property("N05")
def test_a_label_without_a_token_before_it_is_refused(tokenizers: Tokenizers) -> None:
    """Nothing of the prompt is left: the answer would be scored after nothing at all."""
    tokenizer = tokenizers["lettered"]()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(Regex("(?m).*Answer:"), "")
    with pytest.raises(TaskError, match="openbookqa: .*no token comes before the label"):
        multiple_choice("openbookqa", tokenizer)
