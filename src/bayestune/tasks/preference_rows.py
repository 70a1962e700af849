"""The rows of preferences: `PreferenceRow`, two texts of which one was chosen, and `Candidate`, one text to reward."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from bayestune.tasks.rows import AnyRow, Fields, check_text


@dataclass(frozen=True, kw_only=True)
class PreferenceRow(AnyRow):
    """Two texts after the same prompt, of which the chosen one is better.

    The label is the order of the two fields, so no row is unlabeled. If it is not known which text is better, put them
    in either order and read the probability that the first is better. Raises DataError for an empty or invalid text,
    and for two equal texts.
    """

    noun: ClassVar[str] = "preference"
    marks: ClassVar[tuple[str, ...]] = ("chosen", "rejected")
    also: ClassVar[tuple[str, ...]] = ("prompt",)
    target_field: ClassVar[str] = "chosen"

    id: str
    chosen: str
    rejected: str
    prompt: str = ""
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_text(self, "id", self.id)
        for name, text in self.texts:
            check_text(self, name, text)
        if self.chosen == self.rejected:
            raise self.fault("rejected", "the text of 'chosen'", "another text")

    @classmethod
    def from_fields(cls, fields: Fields) -> "PreferenceRow":
        return cls(
            id=fields.text("id"),
            chosen=fields.text("chosen"),
            rejected=fields.text("rejected"),
            prompt=fields.optional_text("prompt") or "",
            where=fields.where,
        )

    @classmethod
    def count_classes(cls, rows: "Sequence[PreferenceRow]") -> int:
        return 2

    @property
    def target(self) -> int:
        """0, the class of `chosen`."""
        return 0

    @property
    def answers(self) -> tuple[str, ...]:
        """The texts that get a reward."""
        return (self.chosen, self.rejected)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        return [*_prompt(self.prompt), ("chosen", self.chosen), ("rejected", self.rejected)]


@dataclass(frozen=True, kw_only=True)
class Candidate(AnyRow):
    """One text after a prompt, to reward; it has no label. Raises DataError for an empty or invalid text."""

    noun: ClassVar[str] = "candidate"
    marks: ClassVar[tuple[str, ...]] = ("text",)
    target_field: ClassVar[str] = "text"

    id: str
    text: str
    prompt: str = ""
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, text in self.texts:
            check_text(self, name, text)

    @classmethod
    def from_fields(cls, fields: Fields) -> "Candidate":
        prompt = fields.optional_text("prompt") or ""
        return cls(id=fields.text("id"), text=fields.text("text"), prompt=prompt, where=fields.where)

    @property
    def target(self) -> None:
        """None."""

    @property
    def answers(self) -> tuple[str, ...]:
        """The text that gets a reward."""
        return (self.text,)

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        return [*_prompt(self.prompt), ("text", self.text)]


def _prompt(prompt: str) -> list[tuple[str, str]]:
    return [("prompt", prompt)] if prompt else []
