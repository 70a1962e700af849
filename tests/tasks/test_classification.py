"""Classification of sentences and pairs."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bayestune.errors import DataError, TaskError
from bayestune.tasks import Row, TextRow, classification, read_rows
from toys import write_rows

Tokenizers = dict[str, Callable[[], PreTrainedTokenizerFast]]
Build = Callable[..., PreTrainedModel]


@pytest.fixture
def sentences() -> list[TextRow]:
    words = "rain falls on the old red barn while birds sing at noon in May and then again".split()
    return [
        TextRow(
            id=f"s{i}",
            text=" ".join(words[: 1 + i]),
            text_pair=" ".join(words[i % 5 : i % 5 + 3]) if i % 3 else None,
            label=i % 2,
        )
        for i in range(16)
    ]


@pytest.mark.property("N07")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_padding_batch_and_neighbours_do_not_matter(
    tokenizers: Tokenizers, sentences: list[TextRow], build: Build, dtype: torch.dtype, bound: float
) -> None:
    tokenizer, model = tokenizers["encoder"](), build("bert classes", dtype)
    task = classification("rte", tokenizer)
    batch = task.collate([task.example(row) for row in sentences])
    assert {len(tensor) for tensor in batch.values()} == {16}
    with torch.inference_mode():
        together = task.outputs(model, batch).softmax(-1)
        for row, found in zip(sentences, together, strict=True):
            alone = task.outputs(model, task.collate([task.example(row)])).softmax(-1)[0]
            plain = model(**tokenizer(row.text, row.text_pair, return_tensors="pt")).logits.softmax(-1)[0]
            assert (found - alone).abs().max() <= bound
            assert (found - plain).abs().max() <= bound
    assert together.std(0).max() > 0.01


@pytest.mark.property("N02")
@pytest.mark.parametrize("gap", [0.0, 60.0, 110.0, 200.0, 1e4])
def test_the_loss_is_the_gap_and_its_gradient_is_finite(
    tokenizers: Tokenizers, gap: float, figure: Callable[..., None]
) -> None:
    task = classification("rte", tokenizers["encoder"]())
    batch = task.collate([task.example(TextRow(id="r", text="It rains.", label=1))])
    logits = torch.tensor([[gap, 0.0]], requires_grad=True)

    def model(**inputs: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=logits)

    model.config = SimpleNamespace(pad_token_id=0)  # pyright: ignore[reportFunctionMemberAccess]
    loss = task.loss(model, batch)
    expected = torch.nn.functional.softplus(torch.tensor(gap, dtype=torch.float64))
    figure("loss less the gap between the logits, nats", abs(loss.item() - expected.item()), at_most=1e-5)
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_boolq_is_classified_from_question_and_passage(tokenizers: Tokenizers) -> None:
    tokenizer = tokenizers["encoder"]()
    row = Row(id="r", question="is it so", choices=("False", "True"), answer=1, passage="It is so.")
    example = classification("boolq", tokenizer).example(row)
    assert tokenizer.decode(example["encoding"]["input_ids"]) == "[CLS]is it so[SEP]It is so.[SEP]"
    assert example["label"] == 1
    with pytest.raises(TaskError, match="openbookqa: choices differ by row, expected classes"):
        classification("openbookqa", tokenizer)


@pytest.mark.property("D03")
def test_a_class_the_data_set_does_not_have_is_refused(tokenizers: Tokenizers) -> None:
    task = classification("rte", tokenizers["encoder"]())
    with pytest.raises(DataError, match=r"f:9 \(id r\): field 'label': found 2, expected 0\.\.1"):
        task.check([TextRow(id="r", text="It rains.", label=2, where="f:9")])


@pytest.mark.property("D06")
def test_a_text_that_is_too_long_is_refused(tokenizers: Tokenizers) -> None:
    task = classification("rte", tokenizers["encoder"](), max_tokens=20)
    with pytest.raises(DataError, match=r"\(id r\): field 'text': found 32 tokens .* at most 20"):
        task.example(TextRow(id="r", text="x" * 30, label=0))


def test_a_model_with_another_number_of_labels_is_refused(
    tokenizers: Tokenizers, build: Build, tmp_path: Path
) -> None:
    (tmp_path / "moods").mkdir()
    rows = [{"id": f"m{i}", "text": "Good.", "label": i} for i in range(3)]
    (tmp_path / "moods" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert classification("moods", tokenizers["encoder"](), data=tmp_path, classes=4).rows("train")[2].target == 2
    task = classification("moods", tokenizers["encoder"](), data=tmp_path)
    batch = task.collate([task.example(row) for row in task.rows("train")])
    with pytest.raises(TaskError, match="moods: the model has 2 labels, expected 3; load it with num_labels=3"):
        task.outputs(build("bert classes"), batch)


@pytest.mark.property("D10")
def test_padding_with_another_id_than_the_models_is_refused(
    tokenizers: Tokenizers, sentences: list[TextRow], build: Build
) -> None:
    task, model = classification("rte", tokenizers["encoder"]()), build("bert classes")
    model.config.pad_token_id = 5
    examples = [task.example(row) for row in sentences[:3]]
    with pytest.raises(TaskError, match="the model pads with id 5 and the tokenizer with 0"):
        task.outputs(model, task.collate(examples))
    assert task.outputs(model, task.collate(examples[:1])).shape == (1, 2)


def test_labels_need_every_row_labelled(tokenizers: Tokenizers, sentences: list[TextRow]) -> None:
    task = classification("rte", tokenizers["encoder"]())
    batch = task.collate([task.example(row) for row in sentences])
    assert batch["labels"].tolist() == [row.target for row in sentences]
    unlabelled = TextRow(id="u", text="It rains.")
    assert "labels" not in task.collate([task.example(row) for row in (sentences[0], unlabelled)])


def test_named_classes_are_trained_by_index_and_answered_by_name(tokenizers: Tokenizers, tmp_path: Path) -> None:
    rows = [{"id": str(i), "text": "It rains.", "label": label} for i, label in enumerate(["wet", "dry", "wet"])]
    path = write_rows(tmp_path / "weather" / "train.jsonl", rows)
    task = classification("weather", tokenizers["encoder"](), data=tmp_path)
    assert task.labels == ("dry", "wet")
    read = read_rows(path)
    assert task.collate([task.example(row) for row in read])["labels"].tolist() == [1, 0, 1]
    prediction = task.prediction(torch.tensor([[[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]]).double(), read, draws=0, seed=0)
    assert prediction.scores(resamples=2).accuracy == pytest.approx(1 / 3)
    assert [(each["answer"], each["label"]) for each in prediction.records(read)] == [
        (1, "wet"),
        (1, "wet"),
        (0, "dry"),
    ]
    counted = classification("rte", tokenizers["encoder"]())
    numbers = [TextRow(id="r", text="It rains.", label=1)]
    assert (
        "label" not in counted.prediction(torch.zeros(1, 1, 2).double(), numbers, draws=0, seed=0).records(numbers)[0]
    )
