"""The rows of tasks: `AnyRow`, and the two kinds that data sets hold. Each row class reads its own JSON fields."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bayestune.errors import DataError

if TYPE_CHECKING:
    from bayestune.tasks.datasets import DatasetSpec

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


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object, read by type; what a value means is checked by the row that is made of them.

    Attributes:
        values: the object.
        where: `file:line`.
        labeled: whether the label must be there.
    """

    values: Mapping[str, Any]
    where: str
    labeled: bool = True

    def text(self, name: str) -> str:
        """Return a text."""
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.fault(name, "a text")
        return value

    def optional_text(self, name: str) -> str | None:
        """Return a text, or None if the field is absent or null."""
        return None if self.values.get(name) is None else self.text(name)

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of texts."""
        value = self.values.get(name)
        if not isinstance(value, list):
            raise self.fault(name, "a list of texts")
        for each in value:
            if not isinstance(each, str):
                raise fault(
                    self.where, self.values.get("id"), name, f"{shown(each)} among the {name}", "a list of texts"
                )
        return tuple(value)

    def label(self, name: str, *kinds: type, expected: str) -> Any:
        """Return a label of one of `kinds`, which are types of JSON; None if it is absent and need not be there."""
        value = self.values.get(name)
        if type(value) in kinds or (
            value is None and not self.labeled
        ):  # a bool is an int to isinstance, and no label
            return value
        raise self.fault(name, expected)

    def fault(self, name: str, expected: str) -> DataError:
        """Return the error for a field that is not what is expected."""
        found = shown(self.values[name]) if name in self.values else "nothing"
        return fault(self.where, self.values.get("id"), name, found, expected)


class AnyRow(ABC):
    """A row of any task.

    Attributes:
        noun: what errors call such a row.
        marks: fields, any of which shows that a JSON object is such a row.
        target_field: name of the field with the label.
        id: identifies the row in its data set. where: `file:line`, or empty for a row made in code.
    """

    noun: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    target_field: ClassVar[str]
    id: str
    where: str

    @classmethod
    @abstractmethod
    def from_fields(cls, fields: Fields) -> "AnyRow":
        """Return the row that a JSON object holds.

        Raises:
            DataError: a field is missing, or its value is wrong.
        """

    @classmethod
    def count_classes(cls, rows: Sequence[Any]) -> int:
        """Return the number of classes, or of choices, that such rows need."""
        return 0

    def check_in(self, spec: "DatasetSpec") -> None:
        """Raise a DataError if the row cannot belong to a data set."""
        if type(self) is not spec.row:
            found, expected = self.marks[0], spec.row.marks[0]
            raise self.fault(found, f"a row with '{found}'", f"rows with '{expected}', as {spec.name} has")

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

    noun: ClassVar[str] = "multiple-choice"
    marks: ClassVar[tuple[str, ...]] = ("question", "choices")
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

    @classmethod
    def from_fields(cls, fields: Fields) -> "Row":
        return cls(
            choices=fields.texts("choices"),
            id=fields.text("id"),
            question=fields.text("question"),
            answer=fields.label("answer", int, expected="a whole number, counted from 0"),
            passage=fields.optional_text("passage"),
            where=fields.where,
        )

    @classmethod
    def count_classes(cls, rows: "Sequence[Row]") -> int:
        return max(len(row.choices) for row in rows)

    def check_in(self, spec: "DatasetSpec") -> None:
        super().check_in(spec)
        if len(self.choices) > spec.classes:
            raise self.fault("choices", f"{len(self.choices)} choices", f"at most {spec.classes}, as {spec.name} has")
        if spec.fixed_choices is not None and self.choices != spec.fixed_choices:
            raise self.fault("choices", shown(list(self.choices)), shown(list(spec.fixed_choices)))
        if spec.blank and self.question.count("_") != 1:
            raise self.fault("question", f"{self.question.count('_')} blanks '_'", "exactly one")

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

    noun: ClassVar[str] = "sentence"
    marks: ClassVar[tuple[str, ...]] = ("text",)
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

    @classmethod
    def from_fields(cls, fields: Fields) -> "TextRow":
        return cls(
            id=fields.text("id"),
            text=fields.text("text"),
            text_pair=fields.optional_text("text_pair"),
            label=fields.label("label", int, str, expected="a whole number, counted from 0, or a text"),
            where=fields.where,
        )

    @classmethod
    def count_classes(cls, rows: "Sequence[TextRow]") -> int:
        return max((row.label + 1 for row in rows if isinstance(row.label, int)), default=0)

    def check_in(self, spec: "DatasetSpec") -> None:
        super().check_in(spec)
        if self.label is None or self.label in (spec.labels or range(spec.classes)):
            return
        counted = f"0..{spec.classes - 1} ({spec.classes} classes)"
        expected = counted if spec.labels is None else f"one of {shown(list(spec.labels))}"
        raise self.fault("label", shown(self.label), expected)

    @property
    def target(self) -> int | str | None:
        """The class index or name, or None when the row is unlabeled."""
        return self.label

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        return [("text", self.text), *([] if self.text_pair is None else [("text_pair", self.text_pair)])]


FORMATS: tuple[type[AnyRow], ...] = (Row, TextRow)
"""The rows of data sets."""
