"""`PromptRow`: a prompt for free text."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from bayestune.tasks.rows import AnyRow, Fields


@dataclass(frozen=True, kw_only=True)
class PromptRow(AnyRow):
    """A text, or a chat, that a language model goes on with.

    Raises DataError for an empty prompt, or a chat without a message or with one that lacks its role or content.

    Attributes:
        prompt: a text, or messages ``{"role": ..., "content": ...}``, which the chat template puts into words.
    """

    noun: ClassVar[str] = "prompt"
    marks: ClassVar[tuple[str, ...]] = ("prompt", "messages")
    target_field: ClassVar[str] = "answer"

    id: str
    prompt: str | tuple[Mapping[str, Any], ...]
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        name = "prompt" if isinstance(self.prompt, str) else "messages"
        if not self.prompt:
            raise self.fault(name, "nothing in it", "some text" if name == "prompt" else "at least one message")
        for message in () if isinstance(self.prompt, str) else self.prompt:
            if not isinstance(message, Mapping) or {type(message.get(key)) for key in ("role", "content")} != {str}:
                raise self.fault(name, f"the message {message!r}"[:80], "each with the texts 'role' and 'content'")

    @classmethod
    def from_fields(cls, fields: Fields) -> "PromptRow":
        messages = fields.values.get("messages")
        if messages is None:
            return cls(id=fields.text("id"), prompt=fields.text("prompt"), where=fields.where)
        if not isinstance(messages, list) or "prompt" in fields.values:
            raise fields.fault("messages", "a list of messages, and no 'prompt'")
        return cls(id=fields.text("id"), prompt=tuple(messages), where=fields.where)

    @property
    def target(self) -> None:
        """None: what is right is not known."""
        return None

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        if isinstance(self.prompt, str):
            return [("prompt", self.prompt)]
        return [("messages", str(message["content"])) for message in self.prompt]
