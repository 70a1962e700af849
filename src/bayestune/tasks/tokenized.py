"""`TokenizedTask`: a data set and a tokenizer. Rows are tokenized in large batches, and each row only once."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from peft import PeftModel
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from bayestune.errors import ConfigError, DataError, TaskError
from bayestune.tasks.base import P, Task
from bayestune.tasks.datasets import DatasetSpec, rows_of
from bayestune.tasks.prompts import Scoring
from bayestune.tasks.rows import AnyRow, shown

_ROWS_AT_ONCE = 512  # per call of the tokenizer: enough to keep its threads busy, few enough to bound the memory

Text = tuple[str, str | None]
"""A text, and the second text of a pair."""


class TokenizedTask(Task[P]):
    """A data set, a tokenizer, and the way from rows to outputs.

    Nothing is ever truncated: a row longer than `max_tokens` (or than the tokenizer's own limit) is refused.

    Attributes:
        spec: the description of the data set.
        max_tokens: the largest number of tokens in a sequence.
        pad_id: the id that is padded with: the tokenizer's pad, or else its EOS (heads that look for the last token
            skip it, and no text ends with it), or 0 if it has neither.
        embeddings: number of tokens that have an embedding in the model, or None if it is unknown; `check` refuses
            rows with other tokens.
        shot_tokens: number of tokens that the rows in `worked` take in each sequence.
    """

    row: ClassVar[type[AnyRow]]
    """The class of rows that the task reads."""
    families: ClassVar[tuple[str, ...]]
    """The families of models that can answer it."""
    auto_model: ClassVar[type[_BaseAutoModelClass]]
    """The class of transformers that loads a model with the right head."""
    scorings: ClassVar[tuple[Scoring, ...]] = ()
    """The ways of scoring that it offers, for tasks that put a `Prompt` to the model."""
    settings: ClassVar[tuple[str, ...]] = ()
    """The settings of a run that it takes in addition to those of every task."""
    has_temperature: ClassVar[bool] = True
    """Whether its predictions have a temperature."""
    encoding: Mapping[str, Any] = MappingProxyType({})
    """Options of the tokenizer's call."""

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        if max_tokens < 1:
            raise ConfigError(f"max_tokens: found {max_tokens}, expected 1 or more")
        self.spec = spec
        self.name = spec.name
        self.columns = spec.classes
        self.labels = spec.labels
        self.tokenizer = tokenizer
        self.data = None if data is None else Path(data)
        self.max_tokens = min(max_tokens, tokenizer.model_max_length)
        self.embeddings: int | None = None
        self.shot_tokens = 0
        named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self.pad_id = next((token for token in named if isinstance(token, int)), 0)
        self._checked: dict[int, tuple[AnyRow, dict[str, Any]]] = {}  # by the row's identity

    @property
    def generates(self) -> bool:
        """Whether the answers are the model's own next tokens, so that it needs no new head."""
        return self.auto_model is AutoModelForCausalLM

    @property
    def head(self) -> dict[str, Any]:
        """The settings of the model's head, for `auto_model.from_pretrained`."""
        return {}

    @property
    def recorded(self) -> dict[str, Any]:
        """The settings of a run that the task has filled in, by name; with them, the same task can be made again."""
        return {}

    @property
    def needs_temperature(self) -> bool:
        """Whether a temperature is part of its likelihood; a run then fits one, by default on its training rows."""
        return False

    def rows(self, split: str) -> list[AnyRow]:
        """Return the labeled rows of a split, such as "train" or "dev+test", without those in `worked`.

        Raises:
            DataError: as `load_rows`.
        """
        return [row for row in rows_of(self.spec, split, self.data) if row not in self.worked]

    @abstractmethod
    def sequences(self, row: AnyRow) -> list[Text]:
        """Return the texts of the row that the model reads, as the tokenizer takes them."""

    @abstractmethod
    def encoded(self, row: AnyRow, encodings: list[dict[str, list[int]]]) -> dict[str, Any]:
        """Return the example of a row, given the tokenizer's output for each of its `sequences`.

        Raises:
            DataError: the row cannot be scored.
        """

    def longest_field(self, row: AnyRow, example: dict[str, Any]) -> str:
        """Return the field to name in the error for a row that is too long."""
        return row.texts[0][0]

    def advise(self, model: nn.Module, rows: Sequence[AnyRow]) -> None:  # noqa: B027
        """Warn if the model, before it is trained on `rows`, seems unable to answer in the way that the task asks."""

    def example(self, row: AnyRow) -> dict[str, Any]:
        """Check and tokenize a row; return `id`, `label` (None when unlabeled) and what `collate` needs.

        Raises:
            DataError: the row does not belong to the data set, cannot be scored, or is too long; the message names it.
        """
        return _sound(self._tokenize([row]))[0]

    def check(self, rows: Sequence[AnyRow]) -> None:
        """Tokenize every row, and keep the examples for `examples`.

        Raises:
            DataError: rows cannot be used; the message names the first one and their number.
        """
        found = self._examined(rows)
        faults = [each for each in found if isinstance(each, DataError)]
        if faults:
            raise DataError(f"{faults[0]} ({len(faults)} of {len(rows)} rows cannot be used)") from faults[0]
        self._checked |= {id(row): (row, each) for row, each in zip(rows, _sound(found), strict=True)}

    def faults(self, rows: Sequence[AnyRow]) -> list[DataError | None]:
        """Return the error of each row, or None; the examples are not kept."""
        return [each if isinstance(each, DataError) else None for each in self._examined(rows)]

    def _examined(self, rows: Sequence[AnyRow]) -> list[dict[str, Any] | DataError]:
        found = self._tokenize(rows)
        return found if self.embeddings is None else self._without_embedding(rows, found, self.embeddings)

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        """Return the `example` of each row, if `model` has an embedding for each of its tokens and for the padding.

        Raises:
            DataError: as `example`, or a token has no embedding.
            TaskError: the padding has no embedding, and the rows differ in length.
        """
        new = [row for row in rows if id(row) not in self._checked]
        tokenized = dict(zip(map(id, new), _sound(self._tokenize(new)), strict=True))
        examples = [tokenized[id(row)] if id(row) in tokenized else self._checked[id(row)][1] for row in rows]
        known = embeddings_of(model)
        if known is None or not examples:
            return examples
        _sound(self._without_embedding(rows, examples, known))
        ends = [choose(examples, key=self.tokens) for choose in (min, max)]
        pad_id = int(self.collate(ends)["input_ids"].max())
        if pad_id >= known:
            raise TaskError(
                f"the tokenizer pads with id {pad_id}, expected one below {known}, the embeddings of the model; "
                "choose another pad_token, or call model.resize_token_embeddings before the adapter is added"
            )
        return examples

    def _tokenize(self, rows: Sequence[AnyRow]) -> list[dict[str, Any] | DataError]:
        """Return the example of each row, or its error."""
        found: list[dict[str, Any] | DataError] = []
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = rows[start : start + _ROWS_AT_ONCE]
            texts = [self._texts(row) for row in part]
            good = [row for row, several in zip(part, texts, strict=True) if isinstance(several, list)]
            empty = self._empty_texts(good)
            encodings = iter(self.encode([text for several in texts if isinstance(several, list) for text in several]))
            found += [
                self._example(row, [next(encodings) for _ in several], empty) if isinstance(several, list) else several
                for row, several in zip(part, texts, strict=True)
            ]
        return found

    def _texts(self, row: AnyRow) -> list[Text] | DataError:
        """Return the texts of a row, or its error."""
        try:
            self.spec.check(row)
            return self.sequences(row)
        except DataError as error:
            return error

    def _example(
        self, row: AnyRow, encodings: list[dict[str, list[int]]], empty: set[str]
    ) -> dict[str, Any] | DataError:
        for name, text in row.texts:
            if text in empty:
                expected = "text with at least one token that the tokenizer knows"
                return row.fault(name, f"text without a token ({shown(text)})", expected)
        try:
            example = {"id": row.id, **self.encoded(row, encodings), "label": self.target(row)}
        except DataError as error:
            return error
        tokens = self.tokens(example)
        if tokens > self.max_tokens:
            expected = f"at most {self.max_tokens} (max_tokens, or the tokenizer's own limit; nothing is ever cut)"
            shots = f", {self.shot_tokens} of them of the {len(self.worked)} shots" if self.worked else ""
            return row.fault(
                self.longest_field(row, example), f"{tokens} tokens with its prompt and answer{shots}", expected
            )
        return example

    def encode(self, texts: Sequence[Text]) -> list[dict[str, list[int]]]:
        """Return the tokenizer's output for each text or pair of texts."""
        found: list[dict[str, list[int]]] = [{} for _ in texts]
        for paired in (False, True):
            places = [i for i, (_, second) in enumerate(texts) if (second is not None) is paired]
            if places:
                columns: list[Any] = [[texts[i][column] for i in places] for column in range(1 + paired)]
                options: dict[str, Any] = {"padding": False, "truncation": False, "verbose": False, **self.encoding}
                encodings: Any = self.tokenizer(*columns, **options)
                for number, i in enumerate(places):
                    found[i] = {key: encodings[key][number] for key in encodings}
        return found

    def _empty_texts(self, rows: Sequence[AnyRow]) -> set[str]:
        """Return the texts of the rows for which the tokenizer, without special tokens, gives no token."""
        texts = list(dict.fromkeys(text for row in rows for _, text in row.texts))
        if not texts:
            return set()
        encoded = self.tokenizer(texts, add_special_tokens=False, padding=False, truncation=False, verbose=False)
        return {text for text, ids in zip(texts, encoded["input_ids"], strict=True) if not ids}

    def _without_embedding(
        self, rows: Sequence[AnyRow], found: Sequence[dict[str, Any] | DataError], known: int
    ) -> list[dict[str, Any] | DataError]:
        """Return `found` with an error in place of each example that has a token without an embedding."""
        checked = list(found)
        sound = [example for example in found if not isinstance(example, DataError)]
        parts = [sound[start : start + _ROWS_AT_ONCE] for start in range(0, len(sound), _ROWS_AT_ONCE)]
        if all(int(self.collate(part)["input_ids"].max()) < known for part in parts):
            return checked
        for i, (row, example) in enumerate(zip(rows, found, strict=True)):
            if isinstance(example, DataError):
                continue
            largest = int(self.collate([example])["input_ids"].max())
            if largest >= known:
                token = f"token {shown(self.tokenizer.convert_ids_to_tokens(largest))} with id {largest}"
                checked[i] = row.fault(row.texts[0][0], token, f"ids below {known}, the embeddings of the model")
        return checked


def _sound(found: Sequence[dict[str, Any] | DataError]) -> list[dict[str, Any]]:
    """Return the examples, or raise the first error among them."""
    examples = []
    for each in found:
        if isinstance(each, DataError):
            raise each
        examples.append(each)
    return examples


def embeddings_of(model: nn.Module) -> int | None:
    """Return the number of tokens that a model has embeddings for; None if it does not look them up in one table."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(base, PreTrainedModel):
        return None
    try:
        table = base.get_input_embeddings()
    except NotImplementedError:
        return None
    return table.num_embeddings if isinstance(table, nn.Embedding) else None


def check_padding(model: Any, attention_mask: Tensor, pad_id: int) -> None:
    """Raise an error if padding has a different id than the model's pad token.

    Some models find the last token, or count positions, by that id.

    Raises:
        TaskError: the ids differ; the message names both.
    """
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    theirs = inner.config.pad_token_id
    if theirs is not None and theirs != pad_id and not bool(attention_mask.all()):
        raise TaskError(
            f"the model pads with id {theirs} and the tokenizer with {pad_id}, expected the same; "
            f"set model.config.pad_token_id = {pad_id}"
        )
