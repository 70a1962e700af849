"""Task: what is asked of a model. It owns the prompts, the labels, and how logits [rows, classes] come out."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bayestune.errors import ConfigError, DataError, TaskError
from bayestune.tasks.data import AnyRow, Row, shown
from bayestune.tasks.datasets import DatasetSpec, rows_of


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool) -> Int[Tensor, "sequences tokens"]:
    """Sequences of any lengths as one int64 tensor, filled up with `value` on the left or on the right."""
    width = max(len(sequence) for sequence in sequences)
    fill = [[value] * (width - len(sequence)) for sequence in sequences]
    if left:
        return torch.tensor([[*blank, *sequence] for blank, sequence in zip(fill, sequences, strict=True)])
    return torch.tensor([[*sequence, *blank] for blank, sequence in zip(fill, sequences, strict=True)])


def widen(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Half-precision logits as float32, so that log-probabilities are exact; others as they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class Task(ABC):
    """A data set, a tokenizer, and the way from rows to logits.

    Rows become examples (tokenised once), examples a batch (rows are the first dimension of every tensor, so that
    draws are stacked with `t.repeat(draws, 1, ...)`), and a batch becomes logits. Nothing is ever cut: a row longer
    than `max_tokens` (or than the tokenizer's own limit) is refused.

    Attributes:
        name: of the data set. spec: what is known of it. columns: of the outputs.
        max_tokens: limit of a sequence. pad_id: the id under attention mask 0: the tokenizer's pad, or else its EOS
            (heads that look for the last token skip it, and no text ends with it), or 0 if it has neither.
    """

    kind: str
    """What is scored: "choice", the choices of each row, or "text", classes that are the same for all rows."""
    embeddings: int | None = None
    """How many tokens the model has embeddings for, where it is known: `check` refuses rows with others."""

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens: found {max_tokens}, expected 1 or more")
        self.spec = spec
        self.name = spec.name
        self.columns = spec.classes
        self.tokenizer = tokenizer
        self.data = None if data is None else Path(data)
        self.max_tokens = min(max_tokens, tokenizer.model_max_length)
        named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id = next((token for token in named if isinstance(token, int)), 0)

    def rows(self, split: str) -> list[AnyRow]:
        """The labelled rows of a split, such as "train" or "dev+test"; raises DataError as `load_rows` does."""
        return rows_of(self.spec, split, self.data)

    @abstractmethod
    def example(self, row: AnyRow) -> dict[str, Any]:
        """A row, checked and tokenised: `id`, `label` (None when unlabelled) and what `collate` needs.

        Raises DataError, naming the row, when it does not belong to the data set, cannot be scored, or is too long.
        """

    @abstractmethod
    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """One batch: tensors whose first dimension is the rows, with `labels` [rows] when every example has one."""

    @abstractmethod
    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows classes"]:
        """Unnormalised log-probabilities of the classes (nats, up to a constant a row), float32 or wider.

        -inf for choices that a row does not have. `batch["labels"]` plays no part.
        """

    @abstractmethod
    def tokens(self, example: dict[str, Any]) -> int:
        """Tokens of the example's longest sequence, to sort by."""

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, " rows"]:
        """Negative log-likelihood of each row's label: -log softmax(logits)[label], nats.

        Computed in log space: finite for any finite gap between logits.
        """
        if "labels" not in batch:
            raise TaskError("loss: found a batch without labels, expected labelled rows")
        return F.cross_entropy(self.outputs(model, batch), batch["labels"], reduction="none")

    def check(self, rows: Sequence[AnyRow]) -> None:
        """Tokenise every row, and raise a DataError for the first that cannot be used, with how many there are."""
        faults = []
        for row in rows:
            try:
                self._refuse_without_embedding(row, self.example(row), self.embeddings)
            except DataError as error:
                faults.append(error)
        if faults:
            raise DataError(f"{faults[0]} ({len(faults)} of {len(rows)} rows cannot be used)") from faults[0]

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        """`example` of each row, when `model` has an embedding for each token of theirs and for the padding.

        Raises:
            DataError: as `example`; or a token has no embedding.
            TaskError: the padding has none, and the rows are not all of one length.
        """
        examples, known = [self.example(row) for row in rows], embeddings_of(model)
        if known is None or not examples:
            return examples
        for row, example in zip(rows, examples, strict=True):
            self._refuse_without_embedding(row, example, known)
        ends = [choose(examples, key=self.tokens) for choose in (min, max)]
        pad_id = int(self.collate(ends)["input_ids"].max())
        if pad_id >= known:
            raise TaskError(
                f"the tokenizer pads with id {pad_id}, expected one below {known}, the embeddings of the model; "
                "choose another pad_token, or call model.resize_token_embeddings before the adapter is added"
            )
        return examples

    def refuse_if_too_long(self, row: AnyRow, tokens: int) -> None:
        """Raise a DataError for a row of more tokens than `max_tokens`."""
        if tokens > self.max_tokens:
            expected = f"at most {self.max_tokens} (max_tokens, or the tokenizer's own limit; nothing is ever cut)"
            raise row.fault(_main_text(row), f"{tokens} tokens with its prompt and answer", expected)

    def refuse_if_empty(self, row: AnyRow) -> None:
        """Raise a DataError for a row with a text that the tokenizer by itself turns into no token at all."""
        texts = row.texts
        encoded = self.tokenizer(
            [text for _, text in texts], add_special_tokens=False, padding=False, truncation=False, verbose=False
        )
        for (name, text), ids in zip(texts, encoded["input_ids"], strict=True):
            if not ids:
                expected = "text that the tokenizer knows at least one token of"
                raise row.fault(name, f"text without a token ({shown(text)})", expected)

    def _refuse_without_embedding(self, row: AnyRow, example: dict[str, Any], known: int | None) -> None:
        if known is None:
            return
        largest = int(self.collate([example])["input_ids"].max())
        if largest >= known:
            found = f"token {shown(self.tokenizer.convert_ids_to_tokens(largest))} with id {largest}"
            raise row.fault(_main_text(row), found, f"ids below {known}, the embeddings of the model")


def _main_text(row: AnyRow) -> str:
    return "question" if isinstance(row, Row) else "text"


def embeddings_of(model: nn.Module) -> int | None:
    """How many tokens a model has embeddings for; None for one that does not look its tokens up in one table."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return None
    try:
        table = base.get_input_embeddings()
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def check_padding(model: Any, attention_mask: Tensor, pad_id: int) -> None:
    """Refuse to pad with another id than the model's: some find the last token, some their positions, by their own.

    Raises:
        TaskError: with both ids.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    theirs = inner.config.pad_token_id
    if theirs is not None and theirs != pad_id and not bool(attention_mask.all()):
        raise TaskError(
            f"the model pads with id {theirs} and the tokenizer with {pad_id}, expected the same; "
            f"set model.config.pad_token_id = {pad_id}"
        )


def labels_of(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """`{"labels": [rows] int64}`, or nothing unless every example is labelled."""
    labels = [example["label"] for example in examples]
    return {} if None in labels else {"labels": torch.tensor(labels)}


def pad_encodings(encodings: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """The outputs of an encoder's tokenizer (`input_ids`, `attention_mask`, ...) as tensors padded on the right.

    On the right whatever the tokenizer says: encoders count positions from the first token.
    """
    return {
        key: pad([encoding[key] for encoding in encodings], pad_id if key == "input_ids" else 0, left=False)
        for key in encodings[0]
    }
