"""The protocols of llama.cpp and vLLM: requests for next-token log-probabilities under one adapter, and the replies.

Nothing here imports torch or opens a connection: a request is a path and a JSON body, a reply is a JSON body.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

from bayestune.errors import ServingError

Tokens = Sequence[int]
LOWEST = -87.0
"""The log-probability, in nats, below which float32 cannot hold the probability as a normal number."""
_AT_ONCE = 128
"""The largest number of tokens that one request to vLLM may name."""
Step = tuple[tuple[int, ...], int]
"""All tokens before a token, and the token."""


class Asked(NamedTuple):
    """A row as a question for a server: the token ids before the answer, and those of each answer.

    `relative` allows log-probabilities that are shifted by a constant, which suffices to compare single tokens.
    """

    context: Sequence[int]
    continuations: Sequence[Sequence[int]]
    relative: bool = False

    def steps(self, choice: int) -> tuple[Step, ...]:
        """Return each token of an answer, with all tokens before it."""
        answer = self.continuations[choice]
        return tuple(((*self.context, *answer[:place]), token) for place, token in enumerate(answer))


@dataclass(frozen=True, kw_only=True)
class Question:
    """One request.

    Attributes:
        path: path under the server's URL. body: JSON body of a POST; None for a GET.
        steps: the steps whose log-probabilities it asks for.
        refusable: whether the server may refuse these tokens with status 500; the reply is then {}.
    """

    path: str
    body: Mapping[str, Any] | None = None
    steps: tuple[Step, ...] = ()
    refusable: bool = False


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter of a running server: how requests name it, and the file or folder that it was loaded from."""

    key: int | str
    path: str


class Wire(ABC):
    """The protocol of one server program."""

    name: ClassVar[str]
    listing: ClassVar[Question]
    """The request whose reply lists the adapters."""

    @abstractmethod
    def adapters(self, reply: Any) -> list[Adapter]:
        """Return the adapters in the reply to `listing`."""

    @abstractmethod
    def tokenize(self, text: str) -> Question:
        """Return the request for the token ids of a text; the reply holds them under `tokens`."""

    @abstractmethod
    def questions(self, key: int | str | None, asked: Asked) -> list[Question]:
        """Return the requests for the log-probabilities of every token of a row's answers.

        Args:
            key: the adapter; None for the base.
            asked: the row.
        """

    @abstractmethod
    def whole(self, key: int | str | None, context: Tokens) -> Question:
        """Return the request for the log-probabilities of the whole vocabulary after `context`."""

    @abstractmethod
    def read(self, question: Question, reply: Any) -> dict[Step, float] | None:
        """Return the log-probabilities in the reply to one of the `questions`; None if the server withholds some.

        Raises:
            ServingError: the reply lacks a token that was asked for.
        """

    @abstractmethod
    def read_whole(self, reply: Any) -> dict[int, float]:
        """Return the log-probability of every token, from the reply to `whole`.

        Raises:
            ServingError: the reply lacks a token.
        """


@dataclass(kw_only=True)
class LlamaCpp(Wire):
    """The server of llama.cpp, or of xllamacpp.

    Every request names every adapter and its scale, and disables the prompt cache, which does not distinguish adapters
    (ggml-org/llama.cpp#26207).

    Attributes:
        count: number of adapters. vocabulary: number of tokens. anchor: id of a token that is text by itself.
    """

    name = "llamacpp"
    listing = Question(path="/lora-adapters")
    count: int = 0
    vocabulary: int = 0
    anchor: int = 0

    def adapters(self, reply: Any) -> list[Adapter]:
        return [Adapter(key=entry["id"], path=entry["path"]) for entry in reply]

    def tokenize(self, text: str) -> Question:
        return Question(path="/tokenize", body={"content": text})

    def _body(self, key: int | str | None, context: Tokens, **own: Any) -> dict[str, Any]:
        scales = [{"id": number, "scale": float(number == key)} for number in range(self.count)]
        fixed = {"n_predict": 1, "temperature": 1.0, "samplers": [], "cache_prompt": False}
        return {"prompt": list(context), "lora": scales, **fixed, **own}

    def questions(self, key: int | str | None, asked: Asked) -> list[Question]:
        choices = range(len(asked.continuations))
        if asked.relative and len(choices) > 1:
            return [self._biased(key, asked)]
        answers = enumerate(asked.continuations)  # an answer is empty if all others start with it
        return [self._forced(key, asked.context, ids, asked.steps(choice)) for choice, ids in answers if ids]

    def _biased(self, key: int | str | None, asked: Asked) -> Question:
        """Return one request for all answers, of one token each, up to a constant.

        The bias raises all of them equally, far above every other token.
        """
        steps = tuple(asked.steps(choice)[0] for choice in range(len(asked.continuations)))
        bias = {"logit_bias": [[token, 60.0] for _, token in steps]}
        body = self._body(key, asked.context, n_probs=len(steps), post_sampling_probs=True, **bias)
        return Question(path="/completion", body=body, steps=steps)

    def _forced(self, key: int | str | None, context: Tokens, tokens: Tokens, steps: tuple[Step, ...]) -> Question:
        """Return a request whose grammar forces `tokens`; log-probabilities are those before the grammar.

        A grammar cannot force tokens that are parts of a character.
        """
        grammar = "root ::= " + " ".join(f"<[{token}]>" for token in tokens)
        body = self._body(key, context, n_predict=len(tokens), n_probs=1, grammar=grammar)
        return Question(path="/completion", body=body, steps=steps, refusable=True)

    def whole(self, key: int | str | None, context: Tokens) -> Question:
        bias = {"logit_bias": [[self.anchor, 1000.0]]}  # samples text: after other tokens the server reports nothing
        return Question(path="/completion", body=self._body(key, context, n_probs=self.vocabulary, **bias))

    def read(self, question: Question, reply: Any) -> dict[Step, float] | None:
        steps = reply.get("completion_probabilities", [])
        if len(steps) == 1 and "top_probs" in steps[0]:
            found = {entry["id"]: _log(entry["prob"]) for entry in steps[0]["top_probs"]}
            known = {step: found[step[1]] for step in question.steps if step[1] in found}
            return known if len(known) == len(question.steps) else None  # a token is too improbable for the bias
        if [entry["id"] for entry in steps] != [token for _, token in question.steps]:
            return None  # a part of a character is withheld, or reported with the next token
        return {
            step: told({step[1]: entry["logprob"]}, step[1]) for step, entry in zip(question.steps, steps, strict=True)
        }

    def read_whole(self, reply: Any) -> dict[int, float]:
        (step,) = reply["completion_probabilities"]
        return _complete({entry["id"]: entry["logprob"] for entry in step["top_logprobs"]}, self.vocabulary)


@dataclass(kw_only=True)
class Vllm(Wire):
    """The server of vLLM.

    Attributes:
        base: the name of the base model. vocabulary: number of tokens; 0 if it is unknown, as without a record.
    """

    name = "vllm"
    listing = Question(path="/v1/models")
    base: str = ""
    vocabulary: int = 0

    def adapters(self, reply: Any) -> list[Adapter]:
        return [Adapter(key=e["id"], path=e["root"]) for e in reply["data"] if e.get("parent") is not None]

    def tokenize(self, text: str) -> Question:
        return Question(path="/tokenize", body={"prompt": text})

    def _body(self, key: int | str | None, context: Tokens, **own: Any) -> dict[str, Any]:
        name = self.base if key is None else key
        fixed = {"max_tokens": 1, "temperature": 0.0, "return_tokens_as_token_ids": True}
        return {"model": name, "prompt": list(context), **fixed, **own}

    def questions(self, key: int | str | None, asked: Asked) -> list[Question]:
        after: dict[tuple[int, ...], dict[int, None]] = {}
        for choice in range(len(asked.continuations)):
            for before, token in asked.steps(choice):
                after.setdefault(before, {})[token] = None
        questions = []
        for before, distinct in after.items():
            for start in range(0, len(distinct), _AT_ONCE):
                tokens = list(distinct)[start : start + _AT_ONCE]
                body = self._body(key, before, logprobs=1, logprob_token_ids=tokens)
                steps = tuple((before, token) for token in tokens)
                questions.append(Question(path="/v1/completions", body=body, steps=steps))
        return questions

    def whole(self, key: int | str | None, context: Tokens) -> Question:
        return Question(path="/v1/completions", body=self._body(key, context, logprobs=self.vocabulary or -1))

    def read(self, question: Question, reply: Any) -> dict[Step, float] | None:
        found = self._told(reply)
        return {step: told(found, step[1]) for step in question.steps}

    def read_whole(self, reply: Any) -> dict[int, float]:
        found = self._told(reply)
        return _complete(found, self.vocabulary or len(found))

    def _told(self, reply: Any) -> dict[int, float]:
        (step,) = reply["choices"][0]["logprobs"]["top_logprobs"]
        return {int(name.removeprefix("token_id:")): value for name, value in step.items()}


WIRES: Mapping[str, type[Wire]] = {wire.name: wire for wire in (LlamaCpp, Vllm)}
"""The protocols, by the name of their program."""


def _log(probability: float) -> float:
    return math.log(probability) if probability > 0 else -math.inf


def told(found: Mapping[int, float], token: int) -> float:
    """Return the log-probability of a token that was asked for, or raise a ServingError."""
    value = found.get(token)
    if value is not None and value < LOWEST:
        raise ServingError(
            f"token {token}: found a probability below the smallest of float32 (e^{LOWEST:g}), in which the server "
            "reports it, expected a larger one; answer the row with `bayestune predict` and the run itself."
        )
    if value is None or math.isnan(value):
        raise ServingError(
            f"the server's reply has no log-probability for token {token} ({len(found)} others are there), expected "
            "one for every token that was asked for; its version may speak another protocol."
        )
    return value


def _complete(found: dict[int, float], vocabulary: int) -> dict[int, float]:
    missing = next((token for token in range(vocabulary) if token not in found), None)
    if missing is not None:
        told(found, missing)
    return found
