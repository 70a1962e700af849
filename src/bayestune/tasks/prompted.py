"""`PromptRow`: a prompt for free text, and its right answer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bayestune.tasks.rows import AnyRow, Fields, check_text


@dataclass(frozen=True, kw_only=True)
class PromptRow(AnyRow):
    """A text or a chat for a language model to continue, and the answer that it should give.

    Raises DataError for an empty prompt or answer, a chat without messages, or a message without role or content.

    Attributes:
        prompt: a text, or messages ``{"role": ..., "content": ...}``, which the chat template turns into text.
        answer: the exact text that follows the prompt, including a space before it; None if the row is unlabeled.
    """

    noun: ClassVar[str] = "prompt"
    marks: ClassVar[tuple[str, ...]] = ("prompt", "messages")
    target_field: ClassVar[str] = "answer"
    counted: ClassVar[str] = "answers"
    fewest: ClassVar[int] = 1

    id: str
    prompt: str | tuple[Mapping[str, Any], ...]
    answer: str | None = None
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        check_text(self, "id", self.id)
        name = "prompt" if isinstance(self.prompt, str) else "messages"
        if not self.prompt:
            raise self.fault(name, "nothing in it", "some text" if name == "prompt" else "at least one message")
        for message in () if isinstance(self.prompt, str) else self.prompt:
            if not isinstance(message, Mapping) or {type(message.get(key)) for key in ("role", "content")} != {str}:
                raise self.fault(name, f"the message {message!r}"[:80], "each with the texts 'role' and 'content'")
        for each, text in self.texts:
            check_text(self, each, text)

    @classmethod
    def from_fields(cls, fields: Fields) -> "PromptRow":
        own: dict[str, Any] = {"id": fields.text("id"), "answer": fields.label("answer", str, expected="a string")}
        messages = fields.values.get("messages")
        if messages is None:
            return cls(prompt=fields.text("prompt"), where=fields.where, **own)
        if not isinstance(messages, list) or "prompt" in fields.values:
            raise fields.fault("messages", "a list of messages, and no 'prompt'")
        return cls(prompt=tuple(messages), where=fields.where, **own)

    @classmethod
    def count_classes(cls, rows: "Sequence[PromptRow]") -> int:
        return 1

    @property
    def target(self) -> int | None:
        """0, or None when the row has no answer."""
        return None if self.answer is None else 0

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field; the last question of a chat first."""
        answer = [] if self.answer is None else [("answer", self.answer)]
        if isinstance(self.prompt, str):
            return [("prompt", self.prompt), *answer]
        asked = [place for place, message in enumerate(self.prompt) if message["role"] == "user"]
        last = asked[-1] if asked else len(self.prompt) - 1
        ordered = [self.prompt[last], *self.prompt[:last], *self.prompt[last + 1 :]]
        return [*(("messages", str(message["content"])) for message in ordered), *answer]
