"""Classification of a sentence, or a pair of sentences, by the head of AutoModelForSequenceClassification."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from bayestune.errors import TaskError
from bayestune.tasks.classes import ClassTask, Prediction
from bayestune.tasks.datasets import DatasetSpec, dataset
from bayestune.tasks.rows import AnyRow, Row, TextRow
from bayestune.tasks.tensors import labels_of, pad_encodings, widen
from bayestune.tasks.tokenized import Text, TokenizedTask, check_padding


def classification(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 256,
    classes: int | None = None,
) -> "Classification":
    """Return a classification task for AutoModelForSequenceClassification (BLoB, section 4.2 and appendix B).

    Args:
        name: a known data set (rte, mrpc, cola, wic, boolq), or the name of a folder in `data`.
        tokenizer: the model's tokenizer.
        data: the data folder; None for the Hugging Face Hub.
        max_tokens: largest number of tokens in a sequence; longer rows are refused.
        classes: number of classes of your own data set; by default counted from the labels in its files.

    Returns:
        The task.

    Raises:
        DataError: the data set is unknown.
        TaskError: the choices differ from row to row, so they are not classes.
    """
    return Classification(dataset(name, data, classes=classes), tokenizer, data=data, max_tokens=max_tokens)


class Classification(TokenizedTask[Prediction], ClassTask):
    """Classification of sequences tokenizer(text, text_pair) or, for fixed choices, tokenizer(question, passage)."""

    row = TextRow
    families = ("causal", "encoder")
    auto_model = AutoModelForSequenceClassification

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        if spec.row not in (Row, TextRow):
            raise TaskError(f"data set {spec.name}: found {spec.row.noun} rows, expected sentences with a label")
        if spec.row is Row and spec.fixed_choices is None:
            raise TaskError(f"data set {spec.name}: choices differ by row, expected classes; use multiple choice")
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)

    @property
    def head(self) -> dict[str, Any]:
        """The number of classes."""
        return {"num_labels": self.columns}

    def sequences(self, row: AnyRow) -> list[Text]:
        if isinstance(row, Row):
            return [(row.question, row.passage)]
        assert isinstance(row, TextRow)
        return [(row.text, row.text_pair)]

    def encoded(self, row: AnyRow, encodings: list[dict[str, list[int]]]) -> dict[str, Any]:
        return {"encoding": encodings[0]}

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["encoding"]["input_ids"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the tokenizer's outputs, [rows, tokens], padded on the right."""
        return {**pad_encodings([example["encoding"] for example in examples], self.pad_id), **labels_of(examples)}

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        check_padding(model, batch["attention_mask"], self.pad_id)
        inputs = {key: tensor for key, tensor in batch.items() if key in self.tokenizer.model_input_names}
        logits = widen(model(**inputs).logits)
        if logits.shape[1] != self.columns:
            raise TaskError(
                f"data set {self.name}: the model has {logits.shape[1]} labels, expected {self.columns}; "
                f"load it with num_labels={self.columns}"
            )
        return logits
