"""`bayestune generate`: texts as `bt.generate` writes them, prompts that cannot be used, and going on."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import bayestune as bt
from bayestune.experiment import load_run
from bayestune_cli import generate as command
from bayestune_cli.app import invoke
from bayestune_cli.signals import Stopped
from cli.commands import make_world, training

PROMPTS = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(["What is it?", "A", "the sea is", "Red"])]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_world(tmp_path_factory.mktemp("world"))
    write(folder / "prompts.jsonl", PROMPTS)
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def generating(world: Path, output: Path, *flags: str, source: str = "prompts.jsonl") -> list[str]:
    files = ["--input", str(world / source), "--output", str(output)]
    return ["generate", str(world / "whole"), *files, "--draws", "2", "--max-new-tokens", "4", *flags]


def texts(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_file_holds_what_generate_gives(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(generating(world, tmp_path / "out.jsonl")) == 0
    out = capsys.readouterr().out
    assert "[1/4] p0: " in out and "[limit reached]" in out and "4 texts" in out
    run = load_run(world / "whole")
    prompts = [row["prompt"] for row in PROMPTS]
    expected = bt.generate(run.posterior, run.task.tokenizer, prompts, draws=2, max_new_tokens=4).records()
    for row, made, wanted in zip(PROMPTS, texts(tmp_path / "out.jsonl"), expected, strict=True):
        assert made["id"] == row["id"]
        assert {name: made[name] for name in wanted} == wanted


def test_answers_of_the_input_are_compared_also_with_texts_written_before(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A text with a line separator in it is one line of the file."""
    output, first = tmp_path / "out.jsonl", write(tmp_path / "first.jsonl", PROMPTS[:2])
    assert invoke(generating(world, output, source=str(first))) == 0
    assert "exact match" not in capsys.readouterr().out
    made = texts(output)
    made[0]["text"] = "iron\u2028and coal"
    output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made))
    answered = [{**row, "answer": "iron\u2028and coal" if row["id"] == "p0" else "nothing"} for row in PROMPTS]
    rows = write(tmp_path / "answered.jsonl", answered)
    assert invoke(generating(world, output, "--resume", source=str(rows))) == 0
    out = capsys.readouterr().out
    assert (
        "exact match" in out
        and "texts N=2" in out
        and " 0.250 [" in out
        and "4 rows" in out
        and "probability per token" in out
    )


def test_prompts_are_put_as_the_run_was_asked(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "llama", tmp_path / "llama")
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    (tmp_path / "llama" / "chat_template.jinja").write_text(template)
    flags = ["--model", str(tmp_path / "llama"), "--no-eval"]
    assert invoke([*training(world, tmp_path / "chat"), *flags]) == 0
    found = {}
    for flag in ([], ["--chat"], ["--no-chat"]):
        command = generating(world, tmp_path / "out.jsonl", *flag, "--overwrite")
        command[1] = str(tmp_path / "chat")
        assert invoke(command) == 0
        found[" ".join(flag)] = [row["log_probs"] for row in texts(tmp_path / "out.jsonl")]
    assert found[""] == found["--chat"] != found["--no-chat"]


def test_each_draw_alone_and_sampled(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.jsonl"
    assert invoke(generating(world, output, "--mode", "per_draw", "--temperature", "1")) == 0
    assert "% of draws)" in capsys.readouterr().out
    assert all(len(row["draw_texts"]) == 2 and row["agreement"] in (0.5, 1.0) for row in texts(output))
    assert all(isinstance(row["information"], float) for row in texts(output))


def test_an_interrupted_command_goes_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Sampled texts depend on the prompt's id, not on its place; a cut line is written again."""
    flags = ["--temperature", "1", "--batch-size", "2"]
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    assert invoke(generating(world, whole, *flags[:2])) == 0
    shown, calls = command._show, []

    def stop(*given: Any) -> None:
        shown(*given)
        calls.append(given)
        raise Stopped(15)

    monkeypatch.setattr(command, "_show", stop)
    assert invoke(generating(world, output, *flags)) == 143
    monkeypatch.undo()
    assert len(calls) == 1 and len(texts(output)) == 2
    output.write_bytes(output.read_bytes() + b'{"id": "p2", "te')
    assert invoke(generating(world, output, *flags, "--resume")) == 0
    assert "2 texts, 2 written before" in capsys.readouterr().out
    pairs = zip(texts(output), texts(whole), strict=True)
    assert all((a["id"], a["text"]) == (b["id"], b["text"]) for a, b in pairs)
    assert invoke(generating(world, output, "--resume")) == 2
    assert "found a text made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"id": "a", "prompt": ""}], "bad.jsonl:1 (id a): field 'prompt': found nothing in it"),
        ([{"id": "a"}], "field 'prompt': found nothing, expected a string"),
        ([{"id": "a", "messages": []}], "field 'messages': found nothing in it"),
        ([{"id": "a", "messages": [{"role": "user"}]}], "each with the texts 'role' and 'content'"),
        ([{"id": "a", "messages": [], "prompt": "b"}], "expected a list of messages, and no 'prompt'"),
        ([{"id": "a", "prompt": "b"}, {"id": "a", "prompt": "c"}], "field 'id'"),
        ([{"id": "a", "messages": [{"role": "user", "content": "b"}]}], "the tokenizer has no chat template"),
        ([*PROMPTS, {"id": "a", "prompt": "b" * 300}], "prompt 'a': found 304 tokens"),
    ],
)
def test_prompts_that_cannot_be_used(
    world: Path, tmp_path: Path, rows: list[Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write(world / "bad.jsonl", rows)
    assert invoke(generating(world, tmp_path / "out.jsonl", source="bad.jsonl")) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_texts_of_other_runs_and_prompts_are_not_gone_on_with(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    assert invoke(generating(world, output)) == 0
    assert invoke(training(world, tmp_path / "other", "--seed", "1", "--no-eval")) == 0
    other = generating(world, output, "--resume")
    other[1] = str(tmp_path / "other")
    assert invoke(other) == 2
    assert "pass the run and the options of the command that made it" in capsys.readouterr().err
    write(world / "changed.jsonl", [{**PROMPTS[0], "prompt": "Where is it?"}])
    assert invoke(generating(world, output, "--resume", source="changed.jsonl")) == 2
    assert "found a text of another prompt with the id 'p0'" in capsys.readouterr().err


@pytest.mark.parametrize("cut", [40, -1])
def test_a_first_line_that_is_cut_is_written_again(world: Path, tmp_path: Path, cut: int) -> None:
    output = tmp_path / "out.jsonl"
    assert invoke(generating(world, output)) == 0
    whole = texts(output)
    output.write_bytes(output.read_bytes().splitlines(keepends=True)[0][:cut])
    assert invoke(generating(world, output, "--resume")) == 0
    assert texts(output) == whole
