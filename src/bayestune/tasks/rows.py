"""The rows of tasks: `AnyRow`, and the two kinds that files hold."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bayestune.errors import DataError

MAX_CHOICES = 26
"""One for each of the letters A to Z."""


def shown(value: object) -> str:
    """A value as an error message shows it: ASCII only (safe on any console), at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fault(where: str, row_id: object, name: str, found: str, expected: str) -> DataError:
    """The error of one field of one row: `where` is `file:line`, or empty for a row made in code."""
    place = f"{where or 'row'} (id {shown(row_id).strip(chr(39))})"
    return DataError(f"{place}: field '{name}': found {found}, expected {expected}; fix or remove the row")


class AnyRow(ABC):
    """A row of any task.

    Attributes:
        target_field: name of the field with the label.
        id: identifies the row in its data set. where: `file:line`, or empty for a row made in code.
    """

    target_field: ClassVar[str]
    id: str
    where: str

    @property
    @abstractmethod
    def target(self) -> Any:
        """The label, or None when the row is unlabeled."""

    @property
    @abstractmethod
    def texts(self) -> list[tuple[str, str]]:
        """Every text given to a model, each after the name of its field; the main text comes first."""

    def fault(self, name: str, found: str, expected: str) -> DataError:
        """Return the error that names this row and one of its fields."""
        return fault(self.where, self.id, name, found, expected)


def _check_text(row: AnyRow, name: str, text: str) -> None:
    if not text.strip():
        raise fault(row.where, row.id, name, "empty text" if not text else "only blanks", "some text")
    if "\0" in text:
        raise fault(row.where, row.id, name, "a NUL character", "text without NUL")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise fault(row.where, row.id, name, f"a lone surrogate at character {error.start}", "Unicode") from error


@dataclass(frozen=True, kw_only=True)
class Row(AnyRow):
    """One multiple-choice question.

    `answer` indexes `choices` from 0; None means unlabelled. `where` says where the row was read (`file:line`) and
    takes no part in comparison. Raises DataError for an empty or invalid text, fewer than 2 or more than 26 choices,
    an answer out of range, or an answer whose text is also another choice's. (Published data repeat *wrong* choices
    here and there: these rows are accepted as they are.)
    """

    target_field: ClassVar[str] = "answer"

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int | None
    passage: str | None = None
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_text(self, "id", self.id)
        _check_text(self, "question", self.question)
        if self.passage is not None:
            _check_text(self, "passage", self.passage)
        if not 2 <= len(self.choices) <= MAX_CHOICES:
            raise self.fault("choices", f"{len(self.choices)} choices", f"2 to {MAX_CHOICES}")
        for choice in self.choices:
            _check_text(self, "choices", choice)
        if self.answer is None:
            return
        if not 0 <= self.answer < len(self.choices):
            raise self.fault("answer", str(self.answer), f"0..{len(self.choices) - 1} ({len(self.choices)} choices)")
        if self.choices.count(self.choices[self.answer]) > 1:
            raise self.fault(
                "choices", f"the answer {shown(self.choices[self.answer])} twice", "an answer unlike the other choices"
            )

    @property
    def target(self) -> int | None:
        """The class index, or None when the row is unlabeled."""
        return self.answer

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        passage = [] if self.passage is None else [("passage", self.passage)]
        return [("question", self.question), *passage, *(("choices", choice) for choice in self.choices)]


@dataclass(frozen=True, kw_only=True)
class TextRow(AnyRow):
    """One sentence, or pair of sentences, with a class: its name, its number from 0, or None when unlabelled.

    Raises DataError as `Row`.
    """

    target_field: ClassVar[str] = "label"

    id: str
    text: str
    text_pair: str | None = None
    label: int | str | None = None
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_text(self, "id", self.id)
        _check_text(self, "text", self.text)
        if self.text_pair is not None:
            _check_text(self, "text_pair", self.text_pair)
        if isinstance(self.label, str):
            _check_text(self, "label", self.label)
        elif self.label is not None and self.label < 0:
            raise self.fault("label", str(self.label), "0 or more")

    @property
    def target(self) -> int | str | None:
        """The class index or name, or None when the row is unlabeled."""
        return self.label

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        return [("text", self.text), *([] if self.text_pair is None else [("text_pair", self.text_pair)])]


AnyDataRow = Row | TextRow
"""A row that a file holds."""
