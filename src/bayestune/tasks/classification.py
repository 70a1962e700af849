"""Classification of a sentence, or a pair of sentences, by the head of AutoModelForSequenceClassification."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bayestune.errors import TaskError
from bayestune.tasks.base import Task, check_padding, labels_of, pad_encodings, widen
from bayestune.tasks.data import AnyRow, Row
from bayestune.tasks.datasets import DatasetSpec, dataset


def classification(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 256,
    classes: int | None = None,
) -> Task:
    """Classification for AutoModelForSequenceClassification (the RoBERTa runs of BLoB, arXiv 2406.11675).

    Args:
        name: a known data set (rte, mrpc, cola, wic, boolq), or a folder of yours in `data`.
        data: the data folder; None for the Hugging Face Hub.
        max_tokens: longest sequence; longer rows are refused.
        classes: of a data set of yours; by default counted over the labels of its files.

    Raises:
        DataError: unknown data set. TaskError: its choices differ from row to row, so that they are no classes.
    """
    return Classification(dataset(name, data, classes=classes), tokenizer, data=data, max_tokens=max_tokens)


class Classification(Task):
    """Sequences tokenizer(text, text_pair); for fixed choices (BoolQ), tokenizer(question, passage)."""

    kind = "text"

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        if spec.kind == "choice" and spec.fixed_choices is None:
            raise TaskError(f"data set {spec.name}: choices differ by row, expected classes; use multiple choice")
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)

    def example(self, row: AnyRow) -> dict[str, Any]:
        self.spec.check(row)
        self.refuse_if_empty(row)
        first, second = (row.question, row.passage) if isinstance(row, Row) else (row.text, row.text_pair)
        encoded = self.tokenizer(first, second, padding=False, truncation=False, verbose=False)
        example = {"id": row.id, "encoding": dict(encoded), "label": row.target}
        self.refuse_if_too_long(row, self.tokens(example))
        return example

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["encoding"]["input_ids"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What the tokenizer gives, [rows, tokens], padded on the right."""
        return {**pad_encodings([example["encoding"] for example in examples], self.pad_id), **labels_of(examples)}

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows classes"]:
        check_padding(model, batch["attention_mask"], self.pad_id)
        inputs = {key: tensor for key, tensor in batch.items() if key in self.tokenizer.model_input_names}
        logits = widen(model(**inputs).logits)
        if logits.shape[1] != self.columns:
            raise TaskError(
                f"data set {self.name}: the model has {logits.shape[1]} labels, expected {self.columns}; "
                f"load it with num_labels={self.columns}"
            )
        return logits
