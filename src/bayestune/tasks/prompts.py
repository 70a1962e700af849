"""`Prompt`: how a question is put to a language model, and how its answer is scored."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from bayestune.errors import ConfigError, one_line
from bayestune.tasks.datasets import DatasetSpec
from bayestune.tasks.rows import Row, shown

Scoring = Literal["letters", "text", "text_per_byte"]
PAPER, CHAT = "paper", "chat"
_PLACES = ("question", "choices", "passage")
_PLACE = re.compile(r"\{([^\W\d]\w*)\}")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """How a multiple-choice question is put to a causal language model, and how its answer is scored.

    Attributes:
        scoring: what is scored: the label of each choice (letters), the text of each choice (text), or the text's
            log-probability per byte (text_per_byte).
        style: `paper`, BLoB's prompt for letters and lm-evaluation-harness's for texts; `chat`, the same in the
            tokenizer's chat template; or a template with `{question}` and, for letters, `{choices}`.
        system: the system message of a chat.
        words: labels to use instead of the letters A, B, ....
        shots: labeled rows that come before the question, with their answers.

    Raises:
        ConfigError: the template is invalid, or settings contradict each other.
    """

    scoring: Scoring = "letters"
    style: str = PAPER
    system: str | None = None
    words: tuple[str, ...] | None = None
    shots: tuple[Row, ...] = ()

    def __post_init__(self) -> None:
        if self.style not in (PAPER, CHAT):
            unknown = [name for name in _PLACE.findall(self.style) if name not in _PLACES]
            if unknown:
                known = ", ".join(f"{{{name}}}" for name in _PLACES)
                raise ConfigError(
                    f"prompt: found {{{unknown[0]}}} in {shown(self.style)}, expected {known}; correct it, or write "
                    f"{{ {unknown[0]} }} for literal braces."
                )
            for name in ("question", "choices") if self.scoring == "letters" else ("question",):
                if f"{{{name}}}" not in self.style:
                    raise ConfigError(
                        f"prompt: found {shown(self.style)} without {{{name}}}, expected paper, chat, or a template "
                        f"with it, as scoring {self.scoring} needs."
                    )
        if self.system is not None and self.style != CHAT:
            raise ConfigError(f"system: found one for prompt {shown(self.style)}, expected prompt chat.")
        if self.words is not None and self.scoring != "letters":
            raise ConfigError(f"label_words: found some for scoring {self.scoring}, expected scoring letters.")
        if self.words is not None and len(set(self.words)) < len(self.words):
            raise ConfigError(f"label_words: found {', '.join(self.words)}, expected a different word each time.")

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise a ConfigError if the tokenizer cannot make this prompt."""
        if self.style != CHAT:
            return
        if not tokenizer.chat_template:
            raise ConfigError("prompt: found chat, but the tokenizer has no chat template; use paper, or a template.")
        try:
            tokenizer.apply_chat_template(self._messages([("a", "b")] * len(self.shots), "c"), tokenize=False)
        except Exception as error:  # a template can raise any type
            raise ConfigError(
                f"prompt: the chat template refuses these messages: {one_line(error)}; leave out --system, or use "
                "paper or a template."
            ) from error

    @property
    def special_tokens(self) -> bool:
        """Whether the tokenizer should add its special tokens; a chat template already contains them."""
        return self.style != CHAT

    def text(self, row: Row, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase) -> str:
        """Return the whole text before the answer."""
        turns = [(self._body(shot, spec), self._answer(shot, spec)) for shot in self.shots]
        if self.style != CHAT:
            return "".join(f"{body}{answer}\n\n" for body, answer in turns) + self._body(row, spec)
        messages = self._messages(turns, self._body(row, spec))
        chat: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return chat

    def _messages(self, turns: Sequence[tuple[str, str]], question: str) -> list[dict[str, str]]:
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        for body, answer in turns:
            messages += [{"role": "user", "content": body}, {"role": "assistant", "content": answer}]
        return [*messages, {"role": "user", "content": question}]

    def _answer(self, shot: Row, spec: DatasetSpec) -> str:
        assert shot.answer is not None, "shots come from a training split"
        return self.answers(shot, spec)[shot.answer]

    def answers(self, row: Row, spec: DatasetSpec) -> list[str]:
        """Return the text that is scored for each choice, as it follows the prompt."""
        answers = row.choices if self.scoring != "letters" else self._labels(row, spec)
        blank = "" if self.style == CHAT else " "
        return [f"{blank}{answer}" for answer in answers]

    def _labels(self, row: Row, spec: DatasetSpec) -> Sequence[str]:
        fixed = spec.fixed_choices if row.choices == spec.fixed_choices else None  # a shot of another data set
        return (self.words or fixed or ascii_uppercase)[: len(row.choices)]

    def _body(self, row: Row, spec: DatasetSpec) -> str:
        labels = self._labels(row, spec)
        choices = "\n".join(f"{label}) {text}" for label, text in zip(labels, row.choices, strict=False))
        passage = "" if row.passage is None else f"Passage: {row.passage}\n"
        if self.style not in (PAPER, CHAT):
            values = {"question": row.question, "choices": choices, "passage": row.passage or ""}
            return _PLACE.sub(lambda found: values[found[1]], self.style)
        if self.scoring != "letters":
            return f"{passage}Question: {row.question}\nAnswer:"
        if row.choices == spec.fixed_choices:
            words = " or ".join(labels)
            return f"Answer the question with only {words}.\n{passage}Question: {row.question}\nAnswer:"
        head = "Select one of the choices that answers the following question:"
        return f"{head}\n{passage}{row.question}\nChoices:\n{choices}\nAnswer:"
