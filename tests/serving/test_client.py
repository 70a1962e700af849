"""The client's answers are those of `predict`, by the real server of llama.cpp; and what it refuses to average."""

import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

from bayestune.errors import ConfigError, DataError, ServingError, TaskError
from bayestune.inference import predict
from bayestune.serving import Asked, Client, serve
from bayestune.serving.engines import check_port
from bayestune.serving.record import SERVED, Served
from bayestune.serving.wire import LlamaCpp
from bayestune.tasks import Prediction, classification
from serving.served import ROWS, base, posterior, serving, task

PROMPTS: dict[str, dict[str, Any]] = {
    "letters": {},
    "words": {"words": ("ab", "no", "b", "x")},
    "long_words": {"words": ("yes", "no", "yet", "never")},
    "text": {"scoring": "text"},
    "text_per_byte": {"scoring": "text_per_byte"},
    "chat": {"style": "chat", "system": "Be brief."},
}


def apart(found: Prediction, expected: Prediction) -> float:
    """The largest difference of any probability, of any draw."""
    assert (found.ids, found.draws, found.seed, found.names) == (
        expected.ids,
        expected.draws,
        expected.seed,
        expected.names,
    )
    return float((found.draw_log_probs.exp() - expected.draw_log_probs.exp()).abs().max())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("client")
    base(made)
    return made


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    """Three draws on a server, scored by the text of the choices, with a temperature."""
    with serving(folder, posterior(temperature=1.7), task(folder, scoring="text")) as served:
        yield served


@pytest.mark.parametrize("name", PROMPTS)
def test_the_client_predicts_what_predict_does(name: str, served: Served, folder: Path) -> None:
    asked, here = task(folder, **PROMPTS[name]), posterior(temperature=1.7)
    with Client(folder / "served") as client:
        found = client.predict(ROWS, task=asked)
    expected = predict(here, asked, ROWS, draws=3, seed=4)
    assert apart(found, expected) < 1e-5
    assert float(expected.draw_log_probs.exp().std(0).max()) > 1e-3, "the draws differ, so a mixed-up one is seen"


def test_the_record_holds_the_task_and_the_temperature(served: Served, folder: Path) -> None:
    with Client(folder / "served" / SERVED) as client:
        assert (
            apart(client.predict(ROWS), predict(posterior(temperature=1.7), client.task, ROWS, draws=3, seed=4)) < 1e-5
        )
        assert client.task.prompt.scoring == "text" and client.predict(ROWS[:1]).task == "mine"


def test_an_untied_head_and_the_mean_are_served_too(tmp_path: Path) -> None:
    base(tmp_path, tied=False)
    asked, here = task(tmp_path), posterior(tied=False)
    with serving(tmp_path, here, asked, draws=0) as record, Client(tmp_path / "served") as client:
        assert (record.draws, [draw.name for draw in record.adapters]) == (0, ["mean"])
        assert apart(client.predict(ROWS), predict(here, asked, ROWS, draws=0, seed=4)) < 1e-5


def test_shots_are_part_of_the_record(served: Served, folder: Path, tmp_path: Path) -> None:
    base(tmp_path)
    asked, here = task(tmp_path, shots=(ROWS[0],)), posterior()
    with serving(tmp_path, here, asked, draws=2) as record, Client(tmp_path / "served") as client:
        assert len(record.task.shots) == 1 and client.task.worked == (ROWS[0],)
        assert apart(client.predict(ROWS[2:]), predict(here, asked, ROWS[2:], draws=2, seed=4)) < 1e-5


def test_no_answer_depends_on_what_was_asked_before(served: Served, folder: Path) -> None:
    """The prompt cache is not keyed by adapter: draw 0 on A, draw 1 on C, then draw 1 on A."""
    asked = task(folder)
    with Client(folder / "served") as client:
        alone = [client.predict([row], task=asked).draw_log_probs for row in ROWS]
        for order in ([1, 0, 2], [2, 1, 0, 1]):
            for i in order:
                assert torch.equal(client.predict([ROWS[i]], task=asked).draw_log_probs, alone[i])


def test_every_request_names_every_adapter_and_no_cache() -> None:
    wire, asked = LlamaCpp(count=3, vocabulary=9, anchor=1), Asked([1, 2], [[3], [4, 5]])
    requests = [*wire.questions(1, asked), *wire.questions(1, Asked([1], [[3], [4]], True)), wire.whole(1, [1])]
    requests += [*wire.questions(None, asked)]
    for request in requests:
        assert request.body is not None and request.body["cache_prompt"] is False
        scales = [0.0, 0.0, 0.0] if request in wire.questions(None, asked) else [0.0, 1.0, 0.0]
        assert request.body["lora"] == [{"id": i, "scale": scale} for i, scale in enumerate(scales)]


def test_token_ids_can_be_asked_without_a_record(served: Served, folder: Path) -> None:
    rows = [Asked([1, 40, 77], [[5, 6], [7]]), Asked([1, 9], [[200, 3, 4], [5], [8]])]
    with Client(served.url) as client:
        found = client.log_probs(rows)
        whole = client.distributions(rows[0].context)
    assert found.shape == (3, 2, 3) and np.isneginf(found[:, 0, 2]).all() and np.isfinite(found[:, 0, :2]).all()
    assert np.allclose(np.exp(whole).sum(-1), 1.0, atol=1e-5) and np.allclose(whole[:, 7], found[:, 0, 1], atol=1e-5)
    with pytest.raises(ConfigError, match="found no task at a URL alone; pass a task"):
        client.predict(ROWS)


def rewritten(folder: Path, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    record = json.loads((folder / "served" / SERVED).read_text())
    change(record)
    target.write_text(json.dumps(record))
    return target


WRONG: dict[str, tuple[Callable[[dict[str, Any]], None], type[Exception], str]] = {
    "unknown id": (
        lambda r: r["adapters"][2].update(key=7),
        ServingError,
        r"found no draw_2 \(id 7\) among its 3 adapters, expected every draw of the record",
    ),
    "another file": (
        lambda r: r["adapters"][0].update(path="draw_1.gguf"),
        ServingError,
        "found draw_0.gguf under id 0, expected draw_1.gguf, as the record has it",
    ),
    "another draw": (
        lambda r: r["adapters"][1].update(sha256="0" * 64),
        ServingError,
        "draw_1.gguf: found another sha256 than the record has for draw_1",
    ),
    "another program": (lambda r: r.update(backend="vllm"), ServingError, "found llamacpp, expected vllm"),
    "other answers": (
        lambda r: r["adapters"][2].update(probe=r["adapters"][1]["probe"]),
        ServingError,
        "adapter 2 answers a first question differently than when served.json was written",
    ),
    "a draw less": (
        lambda r: r["adapters"].pop(),
        ConfigError,
        "found adapters draw_0, draw_1, expected draw_0, draw_1, draw_2, each once",
    ),
    "a draw twice": (lambda r: r["adapters"][1].update(key=0), ConfigError, "each once"),
    "endless temperature": (
        lambda r: r.update(temperature=1e999),
        ConfigError,
        "temperature: Input should be a finite",
    ),
    "no temperature": (
        lambda r: r.pop("temperature"),
        ConfigError,
        "temperature: Field required; serve the run again",
    ),
    "bad scoring": (lambda r: r["task"].update(scoring="x"), ConfigError, r"task.scoring: Input should be 'letters'"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_record_of_another_server_is_refused(name: str, served: Served, folder: Path, tmp_path: Path) -> None:
    change, kind, words = WRONG[name]
    with pytest.raises(kind, match=words) as caught:
        Client(rewritten(folder, tmp_path / SERVED, change))
    assert "\n" not in str(caught.value)


def test_a_draw_that_changes_nothing_is_refused(tmp_path: Path) -> None:
    base(tmp_path)
    here = posterior()
    with torch.no_grad():
        for name, weight in here.model.named_parameters():
            if "lora_B" in name:
                weight.zero_()
    with pytest.raises(ServingError, match="adapter 0 answers exactly as the base model does"):
        with serving(tmp_path, here, task(tmp_path)):
            pass


def test_a_start_that_fails_leaves_nothing_and_keeps_the_folder_that_it_replaces(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(
        ServingError, match="llama.cpp did not start with .*: the file is not a GGUF model or not the adapters' base"
    ):
        with serving(tmp_path, posterior(), task(tmp_path)):
            pass
    assert not (tmp_path / "served").exists()
    base(tmp_path)
    with serving(tmp_path, posterior(), task(tmp_path)):
        record = (tmp_path / "served" / "served.json").read_bytes()
        with pytest.raises(
            ConfigError,
            match="served: found it in use, expected no other process; stop that one, or choose another path",
        ):
            with serving(tmp_path, posterior(), task(tmp_path), overwrite=True):
                pass
    (tmp_path / "base.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ServingError), serving(tmp_path, posterior(), task(tmp_path), overwrite=True):
        pass
    assert (tmp_path / "served" / "served.json").read_bytes() == record
    base(tmp_path)
    with serving(tmp_path, posterior(), task(tmp_path), overwrite=True):
        assert (tmp_path / "served" / "served.json").read_bytes() != record  # another port
    assert {path.name for path in tmp_path.iterdir() if "served" in path.name} == {"served"}


def test_a_record_is_read_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base(tmp_path)
    monkeypatch.chdir(tmp_path)
    with serve(posterior(), task(tmp_path), "served", base=tmp_path / "base.gguf", draws=1, port=0) as record:
        assert [draw.path for draw in record.adapters] == [str(tmp_path / "served" / "adapters" / "draw_0.gguf")]


def test_a_task_with_room_for_few_tokens_is_served(tmp_path: Path) -> None:
    base(tmp_path)
    short = task(tmp_path, scoring="text")
    short.max_tokens = 20
    with serving(tmp_path, posterior(), short, draws=1) as record:
        assert record.task.max_tokens == 20


def test_a_program_that_is_no_server_of_draws_is_named() -> None:
    app = Starlette(routes=[Route("/v1/models", lambda request: JSONResponse([]))])
    server = uvicorn.Server(uvicorn.Config(app, port=check_port("127.0.0.1", 0), log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with pytest.raises(ServingError, match="found another program, expected llama.cpp's server or vLLM"):
        Client(f"http://127.0.0.1:{server.config.port}")
    server.should_exit = True
    thread.join()


def test_a_server_that_does_not_answer_in_time_is_asked_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        with pytest.raises(
            ServingError,
            match=r"found no answer within 0.1 s, expected one; if the server is only slow, raise `timeout`",
        ):
            Client(f"http://127.0.0.1:{server.getsockname()[1]}", timeout=0.1)
        server.accept()[0].close()
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_a_probability_that_float32_cannot_hold_is_an_error() -> None:
    wire = LlamaCpp(count=1, vocabulary=9, anchor=1)
    (question,) = wire.questions(0, Asked([1, 2], [[3]]))
    reply = {"completion_probabilities": [{"id": 3, "logprob": -3.4028e38, "top_logprobs": []}]}
    with pytest.raises(ServingError, match=r"token 3: found a probability below the smallest of float32"):
        wire.read(question, reply)


def test_a_label_that_the_bias_does_not_reach_is_asked_exactly() -> None:
    wire = LlamaCpp(count=1, vocabulary=9, anchor=1)
    (question,) = wire.questions(0, Asked([1, 2], [[3], [4]], True))
    told = [{"id": 3, "prob": 0.9}, {"id": 8, "prob": 0.1}]
    assert wire.read(question, {"completion_probabilities": [{"id": 3, "prob": 0.9, "top_probs": told}]}) is None


def test_a_server_that_is_down_or_dies_is_an_error_and_no_average(tmp_path: Path) -> None:
    base(tmp_path)
    with serving(tmp_path, posterior(), task(tmp_path)) as record:
        client = Client(tmp_path / "served", retries=0)
        assert client.predict(ROWS).draws == 3
    with client, pytest.raises(ServingError, match=r"found no connection .* in 1 tries, expected a server of draws"):
        client.predict(ROWS)
    with pytest.raises(ServingError, match=rf"^{record.url}: found no connection"):
        Client(record.url, retries=1)
    with pytest.raises(ConfigError, match="nothing.json: found no such file, expected the served.json"):
        Client(tmp_path / "nothing.json")


def test_the_api_key_is_required_and_sent(tmp_path: Path) -> None:
    base(tmp_path)
    with serving(tmp_path, posterior(), task(tmp_path), api_key="secret"):
        with pytest.raises(ServingError, match="found the API key refused"):
            Client(tmp_path / "served")
        with Client(tmp_path / "served", api_key="secret") as client:
            assert client.predict(ROWS[:1]).probs.shape == (1, 4)
    assert "secret" not in (tmp_path / "served" / SERVED).read_text()


def test_a_prompt_longer_than_the_servers_context_is_an_error(served: Served) -> None:
    with Client(served.url) as client, pytest.raises(ServingError, match="status 400.*exceeds the available context"):
        client.log_probs([Asked([1] * 2000, [[5]])])


def test_what_cannot_be_served_is_refused_before_a_file_is_written(tmp_path: Path) -> None:
    here, asked = posterior(), task(tmp_path)
    base(tmp_path)
    tokenizer = asked.tokenizer
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.jsonl").write_text(
        '{"id": "a", "text": "x", "label": 0}\n{"id": "b", "text": "y", "label": 1}\n'
    )
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        (asked, {"base": None}, ConfigError, r"base: found nothing, expected the base model as a GGUF file"),
        (asked, {"base": tmp_path / "no.gguf"}, ConfigError, r"base: found no file .*no\.gguf"),
        (asked, {"backend": "ollama"}, ConfigError, "backend: found 'ollama', expected 'llamacpp' or 'vllm'"),
        (asked, {"backend": "vllm"}, ConfigError, "backend vllm: found no package vllm, expected it"),
        (asked, {"draws": -1}, ConfigError, "draws: found -1"),
        (asked, {"context": 300}, ConfigError, "context: found 300, expected 250, the tokens of the task, to 256"),
        (asked, {"api_key": "é"}, ConfigError, "api_key: found blanks or characters beyond ASCII"),
        (
            classification("texts", tokenizer, data=tmp_path),
            {},
            TaskError,
            "serve: found task texts with a head of its own",
        ),
    ]
    for task_, options, kind, words in cases:
        with pytest.raises(kind, match=words), serving(tmp_path, here, task_, **options):
            pass
    assert not (tmp_path / "served").exists()


def test_another_base_is_warned_of_and_a_taken_port_refused(tmp_path: Path) -> None:
    base(tmp_path)
    here, asked = posterior(), task(tmp_path, scoring="text")
    with torch.no_grad():
        here.model.get_base_model().get_submodule("model.norm").weight.mul_(3)
    with pytest.warns(UserWarning, match=r"serve: a first question has probabilities that differ by 0\.\d+ between"):
        with serving(tmp_path, here, asked) as record:
            port = int(record.url.rpartition(":")[2])
            with pytest.raises(ConfigError, match=f"port {port}: cannot be opened on 127.0.0.1"):
                with serve(here, asked, tmp_path / "again", base=tmp_path / "base.gguf", port=port):
                    pass
    assert not (tmp_path / "again").exists()


def test_no_rows_and_wrong_settings_are_refused(served: Served, folder: Path) -> None:
    with Client(folder / "served") as client, pytest.raises(DataError, match="found no rows"):
        client.predict([])
    with pytest.raises(ConfigError, match="found concurrency=0, timeout=600.0, retries=2"):
        Client(folder / "served", concurrency=0)


def test_the_client_is_imported_without_torch() -> None:
    code = """
import sys
sys.modules["torch"] = None
from bayestune.serving import Asked, Client
import bayestune as bt
assert bt.serving.Client is Client and not {"peft", "transformers"} & set(sys.modules)
try:
    Client("served.json")
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("ConfigError served.json: found no such file")
