"""`bayestune serve` runs llama.cpp until a signal, and `predict --served` gives the answers of `predict`."""

import json
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from transformers import LlamaForCausalLM

from bayestune.errors import ServingError
from bayestune_cli import serve
from bayestune_cli.app import invoke
from cli.commands import make_world, predicting
from gguf_files import write_gguf
from toys import byte_tokenizer


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, rows.jsonl, base.gguf, and whole/, a run."""
    made = make_world(tmp_path_factory.mktemp("world"))
    tokens = byte_tokenizer().convert_ids_to_tokens(list(range(len(byte_tokenizer()))))
    model = LlamaForCausalLM.from_pretrained(made / "llama")
    write_gguf(made / "base.gguf", model, gguf.GGMLQuantizationType.F32, tokens)
    return made


@contextmanager
def serving(world: Path, output: Path, *flags: str, count: int = 1) -> Iterator[list[str]]:
    """Run the command; yields its first `count` lines, and ends it by SIGTERM."""
    command = [sys.executable, "-m", "bayestune", "serve", str(world / "whole"), "--base", str(world / "base.gguf")]
    command += ["--output", str(output), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        lines = [process.stdout.readline() for _ in range(count)]
        if not lines[-1]:
            pytest.fail(process.stderr.read())
        try:
            yield lines
            process.terminate()  # not SIGINT, which a shell's background ignores
            assert process.wait(timeout=60) == 0
            assert process.stdout.read() == "stopped\n"
        finally:
            process.kill()


@pytest.fixture(scope="module")
def served(world: Path) -> Iterator[Path]:
    with serving(world, world / "served") as lines:
        assert lines[0].startswith(f"{world}/served/served.json: 3 draws at http://127.0.0.1:")
        yield world / "served" / "served.json"


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asking(world: Path, served: Path, output: Path, *flags: str) -> list[str]:
    rows = str(world / "rows.jsonl")
    return ["predict", "--served", str(served), "--input", rows, "--output", str(output), *flags]


def test_the_served_answers_are_those_of_the_run(world: Path, served: Path, tmp_path: Path) -> None:
    assert invoke(asking(world, served, tmp_path / "there.jsonl")) == 0
    assert invoke(predicting(world, tmp_path / "here.jsonl", "--draws", "3")) == 0
    there, here = answers(tmp_path / "there.jsonl"), answers(tmp_path / "here.jsonl")
    for one, other in zip(there, here, strict=True):
        assert one["probs"] == pytest.approx(other["probs"], abs=1e-5)
        assert (one["id"], one["label"]) == (other["id"], other["label"])
        assert one["epistemic"] == pytest.approx(other["epistemic"], abs=1e-5)


def test_answers_are_resumed_from_a_server(world: Path, served: Path, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    assert invoke(asking(world, served, output)) == 0
    whole = output.read_text()
    output.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert invoke(asking(world, served, output, "--resume")) == 0
    assert output.read_text() == whole


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--draws", "2"], "found 3 served draws of seed 0, and another --draws or --seed"),
        (["--seed", "8"], "found 3 served draws of seed 0"),
        (["--predictive", "mc"], "found --data or --predictive with --served"),
    ],
)
def test_what_the_server_decides_is_no_flag(
    flags: list[str], words: str, world: Path, served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(asking(world, served, tmp_path / "a.jsonl", *flags)) == 2
    assert words in capsys.readouterr().err and not (tmp_path / "a.jsonl").exists()


def test_a_run_or_a_server_answers(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--input", str(world / "rows.jsonl"), "--output", str(tmp_path / "a.jsonl")]
    assert invoke(["predict", *output]) == 2
    assert "found neither of RUN and --served" in capsys.readouterr().err
    assert invoke(["predict", str(world / "whole"), "--served", "served.json", *output]) == 2
    assert "found both of RUN and --served" in capsys.readouterr().err
    assert invoke(["predict", "--served", str(tmp_path / "no.json"), *output]) == 2
    assert "no.json: found no such file, expected the served.json" in capsys.readouterr().err


def test_a_server_cannot_start_without_its_base(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["serve", str(world / "whole"), "--output", str(tmp_path / "s")]) == 2
    assert "base: found nothing, expected the base model as a GGUF file" in capsys.readouterr().err
    assert invoke(["serve", str(world / "whole"), "--output", str(world / "llama")]) == 2
    assert "it exists; choose another, or pass --overwrite" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_the_proxy_answers_at_the_port_that_was_asked_for(world: Path, tmp_path: Path) -> None:
    from bayestune.serving.engines import check_port

    port = check_port("127.0.0.1", 0)
    with serving(world, tmp_path / "served", "--proxy", "--port", str(port), count=2) as lines:
        assert lines[1] == f"the model 'posterior' at http://127.0.0.1:{port}/v1; Ctrl-C stops it\n"
        body = json.dumps({"prompt": "The cup", "max_tokens": 1}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body)
        (choice,) = json.load(urllib.request.urlopen(request))["choices"]
        assert choice["uncertainty"][0]["total"] > 0


def test_a_server_that_ends_by_itself_is_an_error() -> None:
    """A program that ends stands for vLLM."""
    served: Any = SimpleNamespace(url="http://here", backend="vllm")
    with subprocess.Popen(["true"]), pytest.raises(ServingError, match="http://here: the server ended by itself"):
        serve._wait(served)
