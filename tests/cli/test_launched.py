"""`predict`, `evaluate` and `generate` in several processes answer as one does (gloo, on a CPU)."""

import json
from pathlib import Path
from typing import Any

import pytest

from bayestune_cli import batches
from bayestune_cli.app import invoke
from cli.commands import make_world
from cli.launching import ROWS_AT_ONCE, launch
from toys import questions, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, ten rows, four prompts, and whole/, a run."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    write_rows(folder / "rows.jsonl", questions(60, 10))
    write_rows(folder / "prompts.jsonl", [{"id": f"p{i}", "prompt": f"The cup {i} is"} for i in range(5)])
    return folder


@pytest.fixture(scope="module")
def alone(world: Path) -> Path:
    """The answers of one process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "ROWS_AT_ONCE", ROWS_AT_ONCE)
        assert invoke(predicting(world, world / "alone")) == 0
    return world / "alone"


def predicting(world: Path, output: Path, *flags: str) -> list[str]:
    files = ["--input", str(world / "rows.jsonl"), "--output", str(output)]
    return ["predict", str(world / "whole"), *files, "--draws", "3", *flags]


def check_same(found: Path, expected: Path) -> None:
    """The same rows in the same order, with the same numbers up to the padding of other batches."""
    one, other = ([json.loads(line) for line in path.read_text().splitlines()] for path in (found, expected))
    assert [row["id"] for row in one] == [row["id"] for row in other]
    for row, wanted in zip(one, other, strict=True):
        assert row["probs"] == pytest.approx(wanted["probs"], abs=1e-6)
        assert row["epistemic"] == pytest.approx(wanted["epistemic"], abs=1e-6)


def test_processes_share_rows_and_one_writes_and_prints(world: Path, alone: Path, tmp_path: Path) -> None:
    """Of ten rows, four at a time, the last two leave the third process without one."""
    (code, out, err), *others = launch(tmp_path / "log", *[predicting(world, tmp_path / "a")] * 3)
    assert code == 0 and out == f"{tmp_path / 'a'}: 10 rows\n", err
    assert others == [(0, "", "")] * 2
    assert [text.rpartition("| ")[2].split()[0] for text in err.split("\r") if "100%" in text][-1] == "1/1"
    check_same(tmp_path / "a", alone)


def test_a_dead_process_ends_the_command_and_any_number_resumes_it(world: Path, alone: Path, tmp_path: Path) -> None:
    first, second = launch(tmp_path / "died", *[predicting(world, tmp_path / "a")] * 2, dies=2)
    assert second[0] == -9 and first[0] == 2 and "found no answer from another process" in first[2], first
    lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    (tmp_path / "b").write_bytes(b"".join(lines) + b'{"id": "q6')
    for name, count in (("a", 1), ("b", 3)):
        (code, out, err), *_ = launch(
            tmp_path / f"log {name}", *[predicting(world, tmp_path / name, "--resume")] * count
        )
        assert code == 0 and out == f"{tmp_path / name}: 6 rows, 4 answered before\n", err
        assert (tmp_path / name).read_bytes().startswith(b"".join(lines))
        check_same(tmp_path / name, alone)


def test_scores_are_those_of_one_process(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["evaluate", str(world / "whole"), "--ood", "others", "--json"]
    assert invoke(command) == 0
    expected = json.loads(capsys.readouterr().out)
    (code, out, err), *others = launch(tmp_path / "log", *[command] * 2)
    assert code == 0 and others == [(0, "", "")], err
    assert flat(json.loads(out)) == pytest.approx(flat(expected), abs=1e-6)


def flat(found: Any, name: str = "") -> dict[str, Any]:
    """The numbers and texts in JSON, by their paths."""
    if not isinstance(found, dict | list):
        return {name: found}
    pairs = found.items() if isinstance(found, dict) else enumerate(found)
    return {key: value for part, each in pairs for key, value in flat(each, f"{name}/{part}").items()}


def test_texts_are_those_of_one_process(world: Path, tmp_path: Path) -> None:
    """Sampled, one prompt at a time: five prompts, so that the second process has none in the last round."""
    flags = ["--input", str(world / "prompts.jsonl"), "--draws", "2", "--max-new-tokens", "3", "--temperature", "1"]
    command = ["generate", str(world / "whole"), *flags, "--batch-size", "1", "--output"]
    assert invoke([*command, str(tmp_path / "alone")]) == 0
    (code, out, err), *others = launch(tmp_path / "log", *[[*command, str(tmp_path / "two")]] * 2)
    assert code == 0 and others == [(0, "", "")], err
    assert out.count("[5/5] p4: ") == 1 and out.endswith("two: 5 texts\n")
    assert (tmp_path / "two").read_bytes() == (tmp_path / "alone").read_bytes()


def test_an_error_is_said_once(world: Path, tmp_path: Path) -> None:
    """One that every process has; one of another process than the main one; and a command that needs one process."""
    there, nowhere = world / "rows.jsonl", tmp_path / "nowhere.jsonl"
    good, bad = (
        ["predict", str(world / "whole"), "--input", str(p), "--output", str(tmp_path / "a")] for p in (there, nowhere)
    )
    missing = f"{nowhere}: cannot be read: [Errno 2] No such file or directory"
    expected = "report: found 2 processes of a launcher, expected one: only train, predict"
    cases = [
        ([bad, bad], f"error: {missing}"),
        ([good, bad], f"error: process 1 of 2: {missing}"),
        ([["report", str(world / "whole")]] * 2, f"error: {expected}"),
    ]
    for number, (commands, message) in enumerate(cases):
        main, other = launch(tmp_path / str(number), *commands)
        assert main[0] == 2 and main[1] == "" and main[2].count("\n") == 1 and message in main[2], main
        assert other[1:] == ("", ""), other
    assert not (tmp_path / "a").exists()
