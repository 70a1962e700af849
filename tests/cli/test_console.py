"""Texts from outside do not steer the terminal, wherever they come from."""

import ast
import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest

import bayestune_cli
from bayestune.errors import BayestuneWarning, TrainingError
from bayestune_cli.app import invoke
from bayestune_cli.console import plain
from bayestune_cli.streams import quietly
from toys import pretrained_llama, questions, write_data, write_rows

STEERING = {
    "colour": "\x1b[31m",
    "clear": "\x1b[2J\x1b[H",
    "title": "\x1b]0;owned\x07",
    "hyperlink": "\x1b]8;;http://example.org\x1b\\here\x1b]8;;\x1b\\",
    "one byte": "\x9b31m",
    "back": "\rerror: none\x08\x08",
    "nul": "a\x00b\x7f",
    "reversed": "\u202egnp.exe\u2066",
    "separator": "\u2028error: none",
    "half": "\udc9b\ud800",
}
OBEYED = re.compile(r"[^\n\t\x20-\x7e\xa0-\U0010ffff]|[\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    flags = {"model": folder / "llama", "task": "colours", "data": folder / "data", "steps": 1, "batch-size": 4}
    flags |= {"max-tokens": 200, "draws": 1, "output": folder / "run"}
    assert invoke(["train", *(part for name, value in flags.items() for part in (f"--{name}", str(value)))]) == 0
    return folder


@pytest.mark.property("X05")
@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_what_a_terminal_obeys_is_shown_and_not_sent(text: str) -> None:
    shown = plain(f"before {text} after")
    assert not OBEYED.search(shown)
    assert shown.startswith("before ") and shown.endswith(" after") and "\\" in shown


@pytest.mark.property("X05")
@pytest.mark.parametrize("text", ["a\tb\nc", "naïve", "שלום", "日本語", "👩\u200d🚀", "C:\\x1b", "▓ 10 %"])
def test_what_no_terminal_obeys_stays(text: str) -> None:
    assert plain(text) == text


@pytest.mark.property("X05")
@pytest.mark.parametrize("text", STEERING.values(), ids=STEERING)
def test_no_error_steers_the_terminal(
    world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], text: str
) -> None:
    """File names, names of models, ids of rows, flags."""
    rows = [row | {"id": f"q{text}"} for row in questions(0, 2)]
    twice = write_rows(tmp_path / "twice.jsonl", rows)
    field = write_rows(tmp_path / "field.jsonl", [{**questions(0, 1)[0], f"field{text}": 1, "answer": text}])
    train = [
        "train",
        "--model",
        str(world / "llama"),
        "--data",
        str(world / "data"),
        "--output",
        str(tmp_path / "run"),
    ]
    commands = [
        ["evaluate", f"nowhere{text}"],
        [f"com{text}mand"],
        [*train, f"--no-such{text}"],
        [*train, "--task", f"colours{text}"],
        [*train, "--task", "colours", "--target-modules", f"q_proj{text}"],
        ["train", "--model", f"./nowhere{text}", "--task", "colours", "--output", str(tmp_path / "run")],
        ["train", "--config", f"nowhere{text}", "--output", str(tmp_path / "run")],
        *(["predict", str(world / "run"), "--input", str(f), "--output", str(tmp_path / "o")] for f in (twice, field)),
        ["report", f"nowhere{text}", "--output", str(tmp_path / "report.html")],
    ]
    for command in commands:
        assert invoke(command) in (1, 2), command
        out, err = capfd.readouterr()
        assert out == "" and err.count("\n") == 1 and not OBEYED.search(err), (command, err)


@pytest.mark.property("X05")
def test_no_result_steers_the_terminal(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = STEERING["title"]
    ids = [row | {"id": f"{row['id']}{text}"} for row in questions(0, 3)]
    rows = write_rows(tmp_path / "rows.jsonl", ids)
    output = tmp_path / f"out{text}"
    for command in (
        ["predict", str(world / "run"), "--input", str(rows), "--output", str(output)],
        ["export", str(world / "run"), "--output", f"{output}.lora", "--draws", "1"],
    ):
        capsys.readouterr()
        assert invoke(command) == 0
        out = capsys.readouterr().out
        assert "owned" in out and not OBEYED.search(out)
    assert [json.loads(line)["id"] for line in output.read_text().splitlines()] == [row["id"] for row in ids]


@pytest.mark.property("X05")
def test_no_warning_steers_the_terminal(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def warned(*args: Any, **kwargs: Any) -> int:
        warnings.warn(f"row {STEERING['clear']}", BayestuneWarning, stacklevel=1)
        raise TrainingError(f"rows {STEERING['one byte']}")

    monkeypatch.setattr("bayestune_cli.app.app", quietly(warned))
    assert invoke(["demo"]) == 3
    err = capsys.readouterr().err
    assert err == "warning: row \\x1b[2J\\x1b[H\ntraining stopped: rows \\x9b31m\n"


@pytest.mark.property("X05")
def test_all_that_is_printed_goes_one_way() -> None:
    folder = Path(bayestune_cli.__file__).parent
    for path in folder.glob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "print" not in names or path.name == "console.py", path
