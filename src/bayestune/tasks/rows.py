"""The rows of tasks: `AnyRow`, and rows of questions, sentences and numbers. Each class reads its own JSON fields."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from bayestune.errors import DataError
from bayestune.tasks.fields import Fields as Fields
from bayestune.tasks.fields import fault as fault
from bayestune.tasks.fields import shown as shown

if TYPE_CHECKING:
    from bayestune.tasks.datasets import DatasetSpec

MAX_CHOICES = 26
"""One for each of the letters A to Z."""


class AnyRow(ABC):
    """A row of any task.

    Attributes:
        noun: the name of this kind of row in errors.
        marks: fields, any of which shows that a JSON object is such a row. Kinds with the same marks differ in the
            field of the label.
        also: optional fields of this kind that are marks of another kind.
        target_field: name of the field with the label.
        counted: what `count_classes` counts.
        fewest: the smallest count that a data set can have.
        id: identifies the row in its data set.
        where: `file:line`, or empty for a row made in code.
    """

    noun: ClassVar[str]
    marks: ClassVar[tuple[str, ...]]
    also: ClassVar[tuple[str, ...]] = ()
    target_field: ClassVar[str]
    counted: ClassVar[str] = "classes"
    fewest: ClassVar[int] = 2
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
        """Return the number of classes, choices or numbers that such rows need."""
        return 0

    def check_in(self, spec: "DatasetSpec") -> None:
        """Raise a DataError if the row cannot belong to a data set."""
        if type(self) is spec.row:
            return
        found, expected = self.marks[0], spec.row.marks[0]
        if found == expected:
            name = spec.row.target_field
            raise self.fault(name, f"a {type(self).__name__}", f"a {spec.row.__name__}, as {spec.name} has")
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


def check_text(row: AnyRow, name: str, text: str) -> None:
    """Raise a DataError for a text of a row that is empty, or that cannot be written as UTF-8 without NUL."""
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

    `answer` indexes `choices` from 0; None means unlabeled. `where` says where the row was read (`file:line`) and is
    ignored in comparisons. Raises DataError for an empty or invalid text, fewer than 2 or more than 26 choices, an
    answer out of range, or an answer whose text is also another choice's. (Some rows of published data repeat *wrong*
    choices; these are accepted.)
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
        check_text(self, "id", self.id)
        check_text(self, "question", self.question)
        if self.passage is not None:
            check_text(self, "passage", self.passage)
        if not 2 <= len(self.choices) <= MAX_CHOICES:
            raise self.fault("choices", f"{len(self.choices)} choices", f"2 to {MAX_CHOICES}")
        for choice in self.choices:
            check_text(self, "choices", choice)
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
    """One sentence or pair of sentences with a class: its name, its number from 0, or None if it is unlabeled.

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
        check_text(self, "id", self.id)
        check_text(self, "text", self.text)
        if self.text_pair is not None:
            check_text(self, "text_pair", self.text_pair)
        if isinstance(self.label, str):
            check_text(self, "label", self.label)
        elif self.label is not None and self.label < 0:
            raise self.fault("label", str(self.label), "0 or more")

    @classmethod
    def from_fields(cls, fields: Fields) -> "TextRow":
        return cls(
            id=fields.text("id"),
            text=fields.text("text"),
            text_pair=fields.optional_text("text_pair"),
            label=fields.label("label", int, str, expected="a whole number, counted from 0, or a string"),
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


@dataclass(frozen=True, kw_only=True)
class NumberRow(AnyRow):
    """One sentence or pair of sentences with a number, a list of numbers, or None if it is unlabeled.

    Raises DataError as `Row`, and for a number that is not finite.
    """

    noun: ClassVar[str] = "number"
    marks: ClassVar[tuple[str, ...]] = ("text",)
    target_field: ClassVar[str] = "target"
    counted: ClassVar[str] = "numbers"
    fewest: ClassVar[int] = 1

    id: str
    text: str
    text_pair: str | None = None
    target: float | tuple[float, ...] | None = None
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_text(self, "id", self.id)
        for name, text in self.texts:
            check_text(self, name, text)
        if self.numbers == () or not all(map(math.isfinite, self.numbers or ())):
            raise self.fault("target", shown(self.target), "one or more numbers, each of them finite")

    @classmethod
    def from_fields(cls, fields: Fields) -> "NumberRow":
        return cls(
            id=fields.text("id"),
            text=fields.text("text"),
            text_pair=fields.optional_text("text_pair"),
            target=fields.numbers("target"),
            where=fields.where,
        )

    @classmethod
    def count_classes(cls, rows: "Sequence[NumberRow]") -> int:
        return max((len(row.numbers) for row in rows if row.numbers is not None), default=0)

    def check_in(self, spec: "DatasetSpec") -> None:
        super().check_in(spec)
        if self.numbers is not None and len(self.numbers) != spec.classes:
            raise self.fault("target", f"{len(self.numbers)} numbers", f"{spec.classes} per row of {spec.name}")

    @property
    def numbers(self) -> tuple[float, ...] | None:
        """The target as a tuple, or None when the row is unlabeled."""
        return self.target if self.target is None or isinstance(self.target, tuple) else (self.target,)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        return [("text", self.text), *([] if self.text_pair is None else [("text_pair", self.text_pair)])]
