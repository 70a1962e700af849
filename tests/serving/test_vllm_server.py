"""The real server of vLLM: `bayestune serve --backend vllm`, and the answers of `predict` from it.

It needs an environment of its own, which `make test-vllm` makes.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import psutil
import pytest

from bayestune import tasks
from bayestune.errors import ServingError
from bayestune.experiment import load_run
from bayestune.inference import predict
from bayestune.serving import Asked, Client
from bayestune.tasks.causal import CausalChoice
from bayestune_cli.app import invoke
from cli.commands import make_world, predicting
from toys import questions

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM: make test-vllm"),
]
KEY = "secret"
ROWS = [tasks.Row(**row | {"choices": tuple(row["choices"])}) for row in questions(50, 6)]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, rows.jsonl, and whole/, a run; vLLM's CPU kernels need heads of 32 or more."""
    return make_world(tmp_path_factory.mktemp("world"), head_dim=32)


@contextmanager
def serving(world: Path, output: Path, *flags: str) -> Iterator[list[psutil.Process]]:
    """Run the command; yields the processes of vLLM, which must end with it on SIGTERM."""
    command = [sys.executable, "-m", "bayestune", "serve", str(world / "whole"), "--backend", "vllm"]
    command += ["--output", str(output), "--port", "0", *flags]
    environment = os.environ | {"BAYESTUNE_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
    log = output.with_suffix(".log")
    with (
        log.open("w") as words,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=words, env=environment, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            assert re.match(rf"{output}/served\.json: .* at http://127\.0\.0\.1:\d+; ", line), log.read_text()
            engine = psutil.Process(process.pid).children(recursive=True)
            yield engine
        finally:
            process.terminate()
            code = process.wait(timeout=60)
        assert (code, process.stdout.read()) == (0, "stopped\n")
        assert psutil.wait_procs(engine, timeout=30)[1] == []


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[Path]:
    """Three draws on a server."""
    with serving(world, world / "served"):
        yield world / "served" / "served.json"


def text_choice(world: Path, client: Client) -> CausalChoice:
    asked = tasks.Prompt(scoring="text")
    return tasks.text_choice("colours", client.task.tokenizer, data=world / "data", max_tokens=200, prompt=asked)


@pytest.mark.parametrize("scoring", ["letters", "text"])
def test_the_client_predicts_what_predict_does(
    scoring: str, world: Path, served: Path, figure: Callable[..., None]
) -> None:
    run = load_run(world / "whole")
    with Client(served, api_key=KEY) as client:
        task = client.task if scoring == "letters" else text_choice(world, client)
        found = client.predict(ROWS, task=task)
    expected = predict(run.posterior, task, ROWS, draws=3, seed=0)
    figure("averaged probability", float((found.probs - expected.probs).abs().max()), at_most=1e-5)
    apart = (found.draw_log_probs.exp() - expected.draw_log_probs.exp()).abs().max()
    figure("probability of a draw", float(apart), at_most=1e-5)
    assert float(expected.draw_log_probs.exp().std(0).max()) > 1e-2, "the draws differ, so a mixed-up one is seen"


def test_the_cached_prefix_of_a_draw_is_its_own(world: Path, served: Path) -> None:
    """A block of the cache has 128 tokens on a CPU; the same prompt is asked of each draw, and then of each again."""
    rng = np.random.default_rng(0)
    asked = [Asked(rng.integers(0, 256, 200).tolist(), [[5], [9, 8]])]
    with Client(served, api_key=KEY, concurrency=1) as client:
        url = f"{client.record.url}/metrics"
        before, first, again = hits(url), client.log_probs(asked), client.log_probs(asked)
    assert hits(url) - before >= 3 * 2 * 128, "from the cache came a block for each draw and choice"
    assert np.abs(first - again).max() < 1e-4 and first.std(0).max() > 1e-2


def hits(url: str) -> float:
    """The tokens that came from the prefix cache so far."""
    text = httpx2.get(url, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False).text
    return sum(map(float, re.findall(r"^vllm:prefix_cache_hits_total\{.*\} (\S+)$", text, re.MULTILINE)))


def test_the_command_predicts_what_predict_does(
    world: Path, served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAYESTUNE_API_KEY", KEY)
    rows, there, here = world / "rows.jsonl", tmp_path / "there.jsonl", tmp_path / "here.jsonl"
    assert invoke(["predict", "--served", str(served), "--input", str(rows), "--output", str(there)]) == 0
    assert invoke(predicting(world, here, "--draws", "3")) == 0
    for one, other in zip(there.read_text().splitlines(), here.read_text().splitlines(), strict=True):
        assert json.loads(one)["probs"] == pytest.approx(json.loads(other)["probs"], abs=1e-5)


def test_a_url_alone_gives_the_whole_distribution(served: Path) -> None:
    url = json.loads(served.read_text())["url"]
    with Client(url, api_key=KEY) as client:
        whole, some = client.distributions([1, 40, 77]), client.log_probs([Asked([1, 40, 77], [[5], [9]])])
    assert whole.shape == (3, 257) and np.allclose(np.exp(whole).sum(-1), 1.0, atol=1e-5)
    assert np.allclose(whole[:, [5, 9]], some[:, 0], atol=1e-5)


def test_a_draw_that_the_server_lacks_is_refused(served: Path, tmp_path: Path) -> None:
    with Client(served, api_key=KEY) as client, pytest.raises(ServingError, match="status 404.*`draw_7` does not"):
        client.log_probs_of([Asked([1, 2], [[3]])], "draw_7")
    record = json.loads(served.read_text())
    for field, value, words in (
        ("key", "draw_7", r"found no draw_1 \(id 'draw_7'\) among its 3 adapters"),
        ("sha256", "0", "adapter_model.safetensors: found another sha256 than the record has for draw_1"),
    ):
        changed = record | {"adapters": [dict(draw) for draw in record["adapters"]]}
        changed["adapters"][1][field] = value
        (tmp_path / "served.json").write_text(json.dumps(changed))
        with pytest.raises(ServingError, match=words):
            Client(tmp_path / "served.json", api_key=KEY)


def test_the_api_key_is_required(served: Path) -> None:
    with pytest.raises(ServingError, match="found the API key refused"):
        Client(served)


def test_a_server_that_is_killed_is_an_error(world: Path, tmp_path: Path) -> None:
    with serving(world, tmp_path / "served", "--draws", "0") as (server, *_):
        with Client(tmp_path / "served", api_key=KEY, retries=1) as client:
            assert client.predict(ROWS).draws == 0
            server.kill()
            with pytest.raises(ServingError, match=r"found no connection .* in 2 tries, expected a server of draws"):
                client.predict(ROWS)
