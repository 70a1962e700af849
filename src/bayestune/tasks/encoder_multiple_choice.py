"""Multiple choice for encoders: one sequence per choice, scored by the head of AutoModelForMultipleChoice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForMultipleChoice, PreTrainedTokenizerBase

from bayestune.tasks.choices import choice_mask, mask_absent, refuse_others, warn_of_alike, with_filler
from bayestune.tasks.classes import ClassTask, Prediction
from bayestune.tasks.datasets import DatasetSpec, dataset
from bayestune.tasks.rows import AnyRow, Row
from bayestune.tasks.tensors import labels_of, pad_encodings, widen
from bayestune.tasks.tokenized import Text, TokenizedTask, check_padding


def encoder_multiple_choice(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 300,
    classes: int | None = None,
) -> "EncoderMultipleChoice":
    """Return a multiple-choice task for AutoModelForMultipleChoice.

    Args:
        name: a known data set, or the name of a folder in `data`.
        tokenizer: the model's tokenizer.
        data: the data folder; None for the Hugging Face Hub.
        max_tokens: largest number of tokens in a sequence; longer rows are refused.
        classes: largest number of choices in your own data set; by default counted from its files.

    Returns:
        The task.

    Raises:
        DataError: the data set is unknown.
        TaskError: the data set is not multiple choice.
    """
    return EncoderMultipleChoice(dataset(name, data, classes=classes), tokenizer, data=data, max_tokens=max_tokens)


class EncoderMultipleChoice(TokenizedTask[Prediction], ClassTask):
    """Multiple choice with one sequence per choice, scored by the head of AutoModelForMultipleChoice.

    The sequence is tokenizer(question, choice); a passage comes before the question. If the question has a blank to
    fill (WinoGrande), the sequence is the sentence with the choice in the blank, which is ordinary text to an encoder.
    Different choices with the same tokens (many tokenizers ignore letter case) get the same probability; `examples`
    warns about such rows.
    """

    row = Row
    families = ("encoder",)
    auto_model = AutoModelForMultipleChoice

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        refuse_others(spec)
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)

    def sequences(self, row: AnyRow) -> list[Text]:
        assert isinstance(row, Row)
        if self.spec.blank:
            return [(row.question.replace("_", choice), None) for choice in row.choices]
        question = row.question if row.passage is None else f"{row.passage}\n{row.question}"
        return [(question, choice) for choice in row.choices]

    def encoded(self, row: AnyRow, encodings: list[dict[str, list[int]]]) -> dict[str, Any]:
        return {"encodings": encodings}

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        examples = super().examples(rows, model)
        ids = [row.id for row, example in zip(rows, examples, strict=True) if _alike(row, example)]
        warn_of_alike(self.name, ids, len(rows))
        return examples

    def tokens(self, example: dict[str, Any]) -> int:
        return max(len(encoding["input_ids"]) for encoding in example["encodings"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the tokenizer's outputs, [rows, choices, tokens], padded on the right, and `choice_mask`."""
        present = choice_mask([len(example["encodings"]) for example in examples])
        flat = [one for example in examples for one in with_filler(example["encodings"], present.shape[1])]
        inputs = {key: t.unflatten(0, tuple(present.shape)) for key, t in pad_encodings(flat, self.pad_id).items()}
        return {**inputs, "choice_mask": present, **labels_of(examples)}

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        check_padding(model, batch["attention_mask"], self.pad_id)
        inputs = {key: tensor for key, tensor in batch.items() if key in self.tokenizer.model_input_names}
        return mask_absent(widen(model(**inputs).logits), batch["choice_mask"], self.columns)


def _alike(row: AnyRow, example: dict[str, Any]) -> bool:
    """Return whether different choices of the row have the same tokens."""
    assert isinstance(row, Row)
    return len({tuple(one["input_ids"]) for one in example["encodings"]}) < len(set(row.choices))
