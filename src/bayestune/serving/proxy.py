"""A proxy for OpenAI's protocol: completions and chats from the average of the draws, with their uncertainty.

Only this file imports starlette and uvicorn.
"""

import hmac
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Annotated, Any, Literal

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bayestune.errors import ConfigError, ServingError, one_line
from bayestune.serving.averaged import Distribution, Sampling, Token, decode
from bayestune.serving.client import Client
from bayestune.serving.record import TOKENIZER

MODEL = "posterior"
_REFUSED = ("best_of", "suffix", "logit_bias", "frequency_penalty", "presence_penalty", "tools", "functions")
_REFUSED += ("response_format", "audio", "modalities")
_Count = Annotated[int, Field(ge=1)]
_Id = Annotated[int, Field(ge=0)]
_Stop = Annotated[str, Field(min_length=1)]


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Message(BaseModel):
    role: str
    content: str | Annotated[list[_Part], Field(min_length=1)]

    def as_text(self) -> dict[str, str]:
        """Return the message as chat templates take it; parts are joined by line breaks, as vLLM joins them."""
        parts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content]
        return {"role": self.role, "content": "\n".join(parts)}


class _Body(BaseModel):
    """The fields of both requests. Other OpenAI fields that would change the answer are refused."""

    model_config = ConfigDict(strict=True, extra="ignore")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            raise ValueError("expected an object")
        found = {name: value for name, value in given.items() if value is not None}
        refused = next((name for name in _REFUSED if found.get(name)), None)
        if refused is not None:
            raise ValueError(f"{refused} is not offered; leave it out")
        return found

    model: Literal["posterior"] = "posterior"
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0)
    stop: _Stop | list[_Stop] | None = None
    n: Literal[1] = 1
    stream: Literal[False] = False


class _Completion(_Body):
    prompt: str | list[_Id] = Field(min_length=1)
    max_tokens: _Count = 16
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False


class _Chat(_Body):
    messages: list[_Message] = Field(min_length=1)
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)


class Proxy:
    """Answers OpenAI's requests with the average over all draws of `client`.

    Args:
        client: a client that was made from a `served.json`.
        api_key: the bearer token that requests must carry.
    """

    def __init__(self, client: Client, *, api_key: str | None = None) -> None:
        if client.record is None or client.folder is None:
            raise ConfigError("proxy: found a client of a URL alone, expected one of a served.json.")
        self.client, self.api_key, self.context = client, api_key, client.record.context
        self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(client.folder / TOKENIZER)
        self.stopping = False
        self._ends = set(client.record.ends)
        self._vocabulary = client.record.vocabulary
        self._broken, self._checking = False, threading.Lock()

    def app(self) -> Starlette:
        """Return the ASGI application."""
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models),
            Route("/health", self._health),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _refusal})

    async def _models(self, request: Request) -> JSONResponse:
        self._authorize(request)
        return JSONResponse({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "bayestune"}]})

    async def _health(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok"})

    async def _completions(self, request: Request) -> JSONResponse:
        body = await self._parsed(request, _Completion)
        prompt = body.prompt
        ids: Any = prompt
        if isinstance(prompt, str):
            ids = (await run_in_threadpool(self.tokenizer, prompt))["input_ids"]
        if max(ids, default=0) >= self._vocabulary:
            raise HTTPException(400, f"prompt: found token {max(ids)}, expected ids below {self._vocabulary}.")
        tokens, reason = await self._decoded(ids, body, body.max_tokens, top=body.logprobs or 0)
        choice: dict[str, Any] = {"index": 0, "text": self._text(tokens, body), "finish_reason": reason}
        choice["logprobs"] = None if body.logprobs is None else self._listed(tokens)
        return _answer("text_completion", choice, tokens, len(ids))

    async def _chat(self, request: Request) -> JSONResponse:
        body = await self._parsed(request, _Chat)
        if not self.tokenizer.chat_template:
            raise HTTPException(400, "the model has no chat template; use /v1/completions.")
        messages = [message.as_text() for message in body.messages]
        try:
            text: Any = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever the template raises
            raise HTTPException(400, f"the chat template refuses these messages: {one_line(error)}") from error
        ids: Any = (await run_in_threadpool(self.tokenizer, text, add_special_tokens=False))["input_ids"]
        limit = body.max_completion_tokens or body.max_tokens or max(1, self.context - len(ids))
        tokens, reason = await self._decoded(ids, body, limit, top=body.top_logprobs)
        message = {"role": "assistant", "content": self._text(tokens, body), "refusal": None}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": reason}
        choice["logprobs"] = {"content": self._detailed(tokens), "refusal": None} if body.logprobs else None
        return _answer("chat.completion", choice, tokens, len(ids))

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if self.api_key is not None and not hmac.compare_digest(given.encode(), f"Bearer {self.api_key}".encode()):
            raise HTTPException(401, "found another API key, expected the one that the server was started with.")

    async def _parsed(self, request: Request, form: type[Any]) -> Any:
        self._authorize(request)
        try:
            return form.model_validate_json(await request.body())
        except ValidationError as error:
            first = max(error.errors(), key=lambda found: len(found["loc"]))
            place = (
                ".".join(str(each) for each in first["loc"] if each != "str" and "[" not in str(each)) or "the body"
            )
            raise HTTPException(400, f"{place}: {first['msg']}") from error

    async def _decoded(
        self, ids: Sequence[int], body: _Body, limit: int, *, top: int
    ) -> tuple[list[Token], Literal["stop", "length"]]:
        """Return the tokens of the answer, and why it ends."""
        if not ids or len(ids) + limit > self.context:
            raise HTTPException(
                400,
                f"found {len(ids)} tokens of the prompt and up to {limit} of the answer, expected at least one and at "
                f"most {self.context} together; shorten the prompt, or lower max_tokens.",
            )
        seed = int.from_bytes(uuid.uuid4().bytes[:4]) if body.seed is None else body.seed
        sampling = Sampling(temperature=body.temperature, top_p=body.top_p, top=top, seed=seed)
        try:
            await run_in_threadpool(self._check)
            tokens = await run_in_threadpool(
                decode,
                self._distributions,
                ids,
                max_tokens=limit,
                sampling=sampling,
                stops=lambda found: self._stops(found, body),
            )
        except ServingError as error:
            self._broken = True
            raise HTTPException(503, str(error)) from error
        return tokens, "stop" if self._stops([token.id for token in tokens], body) else "length"

    def _check(self) -> None:
        """Check the server again after a failure, since it may have restarted with other draws."""
        with self._checking:
            if self._broken:
                self.client.check()
                self._broken = False

    def _distributions(self, context: Sequence[int]) -> Distribution:
        if self.stopping:
            raise ServingError("the proxy is being stopped")
        return self.client.distributions(context)

    def _stops(self, ids: Sequence[int], body: _Body) -> bool:
        if ids[-1] in self._ends:
            return True
        return bool(body.stop) and any(stop in self.tokenizer.decode(list(ids)) for stop in _stops(body))

    def _text(self, tokens: Sequence[Token], body: _Body) -> str:
        """Return the text of the answer up to the first stop string."""
        text: Any = self.tokenizer.decode([token.id for token in tokens], skip_special_tokens=True)
        ends = [text.find(stop) for stop in _stops(body) if stop in text]
        return text[: min(ends)] if ends else text

    def _listed(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """Return the log-probabilities in the form of a completion."""
        return {
            "tokens": [self._shown(token.id) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [{self._shown(id): log_prob for id, log_prob in reversed(token.top)} for token in tokens],
        }

    def _detailed(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        """Return the log-probabilities in the form of a chat."""
        return [
            {
                **self._entry(token.id, token.log_prob),
                "top_logprobs": [self._entry(id, log_prob) for id, log_prob in token.top],
            }
            for token in tokens
        ]

    def _entry(self, id: int, log_prob: float) -> dict[str, Any]:
        shown = self._shown(id)
        whole = not shown.startswith("token_id:")
        return {"token": shown, "logprob": log_prob, "bytes": list(shown.encode()) if whole else None}

    def _shown(self, id: int) -> str:
        """Return the text of a token, or its id if the token is a part of a character."""
        text: Any = self.tokenizer.decode([id])
        return f"token_id:{id}" if "\N{REPLACEMENT CHARACTER}" in text else text


def _stops(body: _Body) -> list[str]:
    return [body.stop] if isinstance(body.stop, str) else body.stop or []


def _answer(kind: str, choice: Mapping[str, Any], tokens: Sequence[Token], prompt: int) -> JSONResponse:
    uncertainty = [
        {"total": token.total, "aleatoric": token.aleatoric, "epistemic": token.epistemic} for token in tokens
    ]
    usage = {"prompt_tokens": prompt, "completion_tokens": len(tokens), "total_tokens": prompt + len(tokens)}
    return JSONResponse(
        {
            "id": f"bayestune-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": MODEL,
            "choices": [{**choice, "uncertainty": uncertainty}],
            "usage": usage,
        }
    )


async def _refusal(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    kind = "server_error" if error.status_code >= 500 else "invalid_request_error"
    content = {"error": {"message": error.detail, "type": kind, "code": error.status_code, "param": None}}
    return JSONResponse(content, status_code=error.status_code)


class _Server(uvicorn.Server):
    """Calls `listening` once the port is open."""

    def __init__(self, config: uvicorn.Config, proxy: Proxy, listening: Callable[[], None]) -> None:
        super().__init__(config)
        self.proxy, self.listening = proxy, listening

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.proxy.stopping = True  # answers in progress end at their next token
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening()


def run(proxy: Proxy, *, host: str, port: int, listening: Callable[[], None]) -> None:
    """Answer requests until SIGINT or SIGTERM; `listening` is called once the port is open."""
    config = uvicorn.Config(proxy.app(), host=host, port=port, log_level="warning", lifespan="off")
    _Server(config, proxy, listening).run()
