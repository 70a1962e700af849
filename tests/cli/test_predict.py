"""`bayestune predict`: wrong input is refused before torch is imported; answers are written as they come."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bayestune.experiment import Run
from bayestune.sampling.posteriors import PREDICTIVES
from bayestune.tables.layouts import TABLES
from bayestune_cli import arguments, batches, table
from bayestune_cli.app import invoke
from bayestune_cli.signals import Stopped
from cli.commands import make_world, predicting
from toys import questions, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and whole/, a run."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches, "ROWS_AT_ONCE", 4)


def asking(world: Path, source: Path, output: Path, *flags: str) -> list[str]:
    arguments = predicting(world, output, *flags)
    arguments[arguments.index("--input") + 1] = str(source)
    return arguments


def test_wrong_paths_and_rows_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").touch()
    good = questions(0, 2)
    files: dict[str, list[Any]] = {
        "good": good,
        "list": [*good, ["a"]],
        "no choices": [*good, {"id": "r9", "question": "Q", "choices": "ab"}],
        "one choice": [*good, {"id": "r9", "question": "Q", "choices": ["a"]}],
        "no question": [*good, {"id": "r9"}],
        "id twice": [*good, good[0]],
        "empty": [],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(good[0]).encode() + b"\n")
    (tmp_path / "crlf.jsonl").write_bytes(json.dumps(good[0]).encode() + b"\r\n")
    (tmp_path / "blank.jsonl").write_bytes(json.dumps(good[0]).encode() + b"\n \n")
    (tmp_path / "cut.jsonl").write_text(json.dumps(good[0]) + "\n" + '{"id": "r9", "quest')
    cases = {
        ("run", "none", "a"): "none.jsonl: cannot be read",
        ("nowhere", "good", "a"): "nowhere: found no result.json",
        ("run", "good", "no/a"): "found no folder",
        ("run", "cut", "a"): "cut.jsonl:2: not one JSON object",
        ("run", "bom", "a"): "bom.jsonl:1: found a byte order mark (BOM)",
        ("run", "crlf", "a"): "crlf.jsonl:1: found a CRLF line end; convert the file to LF (\\n) line ends",
        ("run", "blank", "a"): "blank.jsonl:2: found a blank line, expected one JSON object",
        ("run", "list", "a"): "list.jsonl:3: found ['a'], expected one JSON object",
        (
            "run",
            "no choices",
            "a",
        ): "jsonl:3 (id r9): field 'choices': found 'ab', expected a list of texts",
        ("run", "one choice", "a"): "field 'choices': found 1 choices, expected 2 to 26",
        ("run", "no question", "a"): "field 'question': found none of 'question', 'text', 'chosen', 'prompt'",
        ("run", "id twice", "a"): "id twice.jsonl:1 again",
        ("run", "empty", "a"): "found no rows",
    }
    commands = [
        ["predict", str(tmp_path / r), "--input", str(tmp_path / f"{i}.jsonl"), "--output", str(tmp_path / o)]
        for r, i, o in cases
    ]
    commands += [["evaluate", str(tmp_path / "nowhere")], ["export", str(run), "--output", str(run)]]
    commands += [["evaluate", str(run), "--predictive", "sobol"], ["table", "table9", "--rebuild"]]
    commands += [["table", "table1", "--model", "m", "--seeds", "a"], ["table", "table1", "--rebuild", "--seeds", "1"]]
    code = "import json, sys; from bayestune_cli.app import invoke\n"
    code += "codes = [invoke(given) for given in json.loads(sys.argv[1])]\n"
    code += "print(json.dumps([codes, [m for m in ('torch', 'transformers', 'bayestune') if m in sys.modules]]))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True)
    assert json.loads(done.stdout) == [[2] * len(commands), []]
    lines = done.stderr.splitlines()
    assert len(lines) == len(commands)
    others = [
        "nowhere: found no result.json",
        "it exists",
        "expected one of mc, antithetic",
        "found 'table9', expected",
    ]
    others += ["--seeds: found 'a'", "found --seeds with --rebuild"]
    for line, words in zip(lines, [*cases.values(), *others], strict=True):
        assert line.startswith("error: ") and words in line


@pytest.mark.usefixtures("small_batches")
def test_a_stopped_command_keeps_its_answers_and_resumes_with_the_same_bits(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    source, whole, cut = write_rows(tmp_path / "rows.jsonl", questions(60, 10)), tmp_path / "whole", tmp_path / "cut"
    assert invoke(asking(world, source, whole)) == 0
    real, calls = Run.predict, []

    def stopping(self: Run, *args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == 3:
            raise Stopped(2)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "predict", stopping)
        assert invoke(asking(world, source, cut)) == 130
    assert f"interrupted: 8 rows are answered in {cut}; continue with --resume" in capsys.readouterr().err
    lines = whole.read_bytes().splitlines(keepends=True)
    assert cut.read_bytes() == b"".join(lines[:8])
    cut.write_bytes(b"".join(lines[:6]) + lines[6][:9])  # the disk lost the end
    assert invoke(asking(world, source, cut)) == 2
    assert invoke(asking(world, source, cut, "--resume")) == 0
    assert "4 rows, 6 answered before" in capsys.readouterr().out
    assert cut.read_bytes() == whole.read_bytes()
    kept = b"".join(lines[:6])
    cut.write_bytes(kept)
    assert invoke(asking(world, source, cut, "--resume", "--seed", "9")) == 2
    assert "found another answer for row 'q60' than this run gives" in capsys.readouterr().err
    assert cut.read_bytes() == kept
    for text in (
        '{"id": "a", "probs": null, "answer": 0}\n',
        "mine",
        "mine\n",
        '{"id": "a", "question": "Q"}\n{"id": "b"',
        '{"id": "a", "question": "Q"}',
    ):
        cut.write_text(text)
        assert invoke(asking(world, source, cut, "--resume")) == 2
        assert "cut:1: found another line" in capsys.readouterr().err and cut.read_text() == text


@pytest.mark.usefixtures("small_batches")
def test_bad_rows_are_skipped_when_told_and_counted(world: Path, tmp_path: Path, capsys: Any) -> None:
    rows = questions(60, 6)
    bad = [{**rows[0], "id": "long", "question": "long " * 80}, {"id": "r9", "question": "Q", "choices": ["a"]}]
    source = write_rows(tmp_path / "rows.jsonl", [*rows[:3], bad[0], *rows[3:], bad[1], rows[1]])
    assert invoke(asking(world, source, tmp_path / "a")) == 2
    assert not (tmp_path / "a").exists()
    assert invoke(asking(world, source, tmp_path / "a", "--on-bad-row", "skip")) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'a'}: 6 rows, 3 skipped; the first: {source}:4 (id long): field 'question'" in out
    ids = [json.loads(line)["id"] for line in (tmp_path / "a").read_text().splitlines()]
    assert ids == [row["id"] for row in rows]


@pytest.mark.usefixtures("small_batches")
def test_batches_change_nothing_but_the_last_bits_and_keep_no_rows(world: Path, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "rows.jsonl", questions(60, 10))
    assert invoke(asking(world, source, tmp_path / "batches")) == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "ROWS_AT_ONCE", 1000)
        assert invoke(asking(world, source, tmp_path / "whole")) == 0
    one, other = ([json.loads(line) for line in (tmp_path / n).read_text().splitlines()] for n in ("batches", "whole"))
    assert [row["id"] for row in one] == [row["id"] for row in other]
    for first, second in zip(one, other, strict=True):
        assert first["probs"] == pytest.approx(second["probs"], abs=1e-6)


def test_names_that_are_checked_early_are_those_of_the_package() -> None:
    assert arguments._PREDICTIVES == PREDICTIVES
    assert table._TABLES == tuple(TABLES)


def test_an_answer_has_the_text_of_the_chosen_choice(world: Path, tmp_path: Path) -> None:
    rows = questions(60, 4)
    source = write_rows(tmp_path / "rows.jsonl", rows)
    assert invoke(asking(world, source, tmp_path / "a")) == 0
    answers = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert [each["label"] for each in answers] == [
        row["choices"][each["answer"]] for row, each in zip(rows, answers, strict=True)
    ]
