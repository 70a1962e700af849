"""vLLM's protocol, against a stub that refuses what vLLM 0.32 refuses and answers as a model of PyTorch does."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from bayestune.errors import ConfigError, ServingError
from bayestune.inference import draw, predict
from bayestune.serving import Asked, Client, engines
from bayestune.serving.asking import described
from bayestune.serving.engines import check_port
from bayestune.serving.record import Served, ServedDraw, write_served
from bayestune.serving.wire import Vllm
from serving.served import ROWS, posterior, task


class Stub:
    """A server of a base and its draws."""

    def __init__(self) -> None:
        self.posterior = posterior()
        self.seen: list[dict[str, Any]] = []
        routes = [
            Route("/v1/models", self.models),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def models(self, request: Request) -> JSONResponse:
        draws = [{"id": f"draw_{k}", "root": f"/there/draw_{k}", "parent": "base"} for k in range(3)]
        return JSONResponse({"data": [{"id": "base", "root": "base", "parent": None, "owned_by": "vllm"}, *draws]})

    async def tokenize(self, request: Request) -> JSONResponse:
        return JSONResponse({"tokens": [1, *(await request.json())["prompt"].encode()]})

    async def completions(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.seen.append(body)
        asked = body.get("logprob_token_ids")
        if body["model"] not in ("base", "draw_0", "draw_1", "draw_2"):
            return JSONResponse({"error": "The model does not exist."}, 404)
        if "prompt_logprobs" in body or body["max_tokens"] != 1 or (asked is not None and not 0 < len(asked) <= 128):
            return JSONResponse({"error": "not supported"}, 400)
        log_probs = self.log_probs(body["model"], body["prompt"])
        best = sorted(range(len(log_probs)), key=log_probs.__getitem__, reverse=True)
        count = len(best) if body["logprobs"] == -1 else body["logprobs"]
        told = {f"token_id:{token}": log_probs[token] for token in asked or best[:count]}
        return JSONResponse({"choices": [{"logprobs": {"top_logprobs": [told]}}]})

    def log_probs(self, name: str, prompt: list[int]) -> list[float]:
        model = self.posterior.model.eval()
        with torch.no_grad():
            if name == "base":
                with model.disable_adapter():
                    logits = model(torch.tensor([prompt])).logits[0, -1]
            else:
                with draw(model, index=int(name[-1]), seed=4):
                    logits = model(torch.tensor([prompt])).logits[0, -1]
        return logits.double().log_softmax(-1).tolist()


@pytest.fixture(scope="module")
def stub() -> Iterator[tuple[Stub, str]]:
    made, port = Stub(), check_port("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(made.app, port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield made, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def recorded(folder: Path, url: str, scoring: str) -> Path:
    asked = task(folder, scoring=scoring)
    asked.tokenizer.save_pretrained(folder / "tokenizer")
    names = [f"draw_{k}" for k in range(3)]
    with Client(url) as client:
        probes = [tuple(probe) for probe in client.probes()[1:].tolist()]
    draws = tuple(
        ServedDraw(name=name, key=name, path=f"/here/{name}", sha256="0", probe=probe)
        for name, probe in zip(names, probes, strict=True)
    )
    served = Served(
        url=url,
        backend="vllm",
        kind="variational",
        draws=3,
        seed=4,
        adapters=draws,
        temperature=1.0,
        vocabulary=260,
        context=256,
        ends=(2,),
        task=described(asked),
    )
    return write_served(served, folder)


@pytest.mark.parametrize("scoring", ["letters", "text", "text_per_byte"])
def test_the_client_predicts_what_predict_does(scoring: str, stub: tuple[Stub, str], tmp_path: Path) -> None:
    made, url = stub
    with Client(recorded(tmp_path, url, scoring), concurrency=1) as client:
        found, whole = client.predict(ROWS), client.distributions([1, 5])
        expected = predict(made.posterior, client.task, ROWS, draws=3, seed=4)
    assert float((found.draw_log_probs.exp() - expected.draw_log_probs.exp()).abs().max()) < 1e-5
    assert whole.shape == (3, 260) and whole[1].tolist() == pytest.approx(made.log_probs("draw_1", [1, 5]))


def test_a_url_alone_gives_the_whole_distribution(stub: tuple[Stub, str]) -> None:
    made, url = stub
    with Client(url) as client:
        whole = client.distributions([1, 5])
    assert whole.shape == (3, 260) and whole[1].tolist() == pytest.approx(made.log_probs("draw_1", [1, 5]))


def test_a_draw_that_is_not_there_is_refused(stub: tuple[Stub, str], tmp_path: Path) -> None:
    file = recorded(tmp_path, stub[1], "text")
    record = json.loads(file.read_text())
    record["adapters"][1]["key"] = "draw_7"
    file.write_text(json.dumps(record))
    with pytest.raises(ServingError, match=r"found no draw_1 \(id 'draw_7'\) among its 3 adapters"):
        Client(file)


def test_more_tokens_than_a_request_may_name_are_asked_in_parts() -> None:
    asked = Asked([1], [[token] for token in range(200)])
    first, second = Vllm(base="base").questions("draw_0", asked)
    assert [len(each.steps) for each in (first, second)] == [128, 72]
    assert [step[1] for each in (first, second) for step in each.steps] == list(range(200))


def test_an_answer_without_a_token_that_was_asked_for_is_an_error() -> None:
    (question,) = Vllm(base="base").questions("draw_0", Asked([1], [[5], [6]]))
    reply = {"choices": [{"logprobs": {"top_logprobs": [{"token_id:5": -1.0, "token_id:9": -2.0}]}}]}
    with pytest.raises(ServingError, match=r"has no log-probability for token 6 \(2 others are there\)"):
        Vllm(base="base").read(question, reply)


def test_vllm_is_started_with_every_draw_by_name_and_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that ends at once stands for vLLM."""
    seen: list[list[str]] = []
    popen = engines.subprocess.Popen

    def start(command: list[str], **options: Any) -> Any:
        seen.append(command)
        assert options["env"]["VLLM_API_KEY"] == "secret"
        return popen(["false"])

    monkeypatch.setattr(engines.subprocess, "Popen", start)
    settings: dict[str, Any] = {"host": "127.0.0.1", "port": 1, "api_key": "secret", "context": 64, "vocabulary": 260}
    paths = [tmp_path / f"draw_{k}" for k in range(3)]
    with pytest.raises(ServingError, match="vLLM ended with code 1 before it answered"):
        with engines.vllm("base", paths, rank=5, **settings):
            pass
    text = " ".join(seen[0])
    assert "--enable-lora --max-loras 3 --max-lora-rank 8 --max-logprobs 260" in text and "secret" not in text
    assert text.endswith(" ".join(f"draw_{k}={tmp_path}/draw_{k}" for k in range(3)))
    with pytest.raises(ConfigError, match="rank: found 600, expected at most 512"):
        with engines.vllm("base", paths, rank=600, **settings):
            pass
