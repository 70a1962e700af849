"""Rows that are refused, and rows that only look odd, through the command line: nothing written, or exact."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bayestune_cli.app import invoke
from toys import pretrained_llama, questions, write_data, write_rows

BAD = {"id": "r7", "question": "Q", "choices": ["a", "b"], "answer": 0}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama/, data/ and run/."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    assert invoke(training(folder, folder / "data", folder / "run")) == 0
    return folder


def training(world: Path, data: Path, output: Path, *more: str) -> list[str]:
    command = ["train", "--model", str(world / "llama"), "--task", "colours", "--data", str(data), "--steps", "2"]
    command += ["--batch-size", "4", "--draws", "2", "--max-tokens", "220", "--output", str(output)]
    return [*command, *more]


def written(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refusals(world: Path, folder: Path, bad: bytes, capsys: Any) -> list[str]:
    """The one line of each command for a file whose sixth line is `bad`: as train, eval, fit, temperature, input."""
    good = b"".join(json.dumps(row).encode() + b"\n" for row in questions(60, 5))
    told = []
    for split, flags in {
        "train": (),
        "dev": (),
        "fit": ("--fit-split", "fit", "--method", "laplace"),
        "held": ("--temperature-split", "held"),
    }.items():
        data = write_data(folder / split)
        (data / "colours" / "dev.jsonl.gz").rename(data / "colours" / "spare.jsonl.gz")
        write_rows(data / "colours" / "dev.jsonl", questions(16, 4))
        (data / "colours" / f"{split}.jsonl").write_bytes(good + bad + good.replace(b'"id": "q', b'"id": "z'))
        told.append(refused(training(world, data, folder / "run", *flags), folder, capsys))
        assert f"{split}.jsonl:6" in told[-1]
    (folder / "asked.jsonl").write_bytes(good + bad)
    asked = ["predict", str(world / "run"), "--input", str(folder / "asked.jsonl"), "--output", str(folder / "out")]
    told.append(refused(asked, folder, capsys))
    assert "asked.jsonl:6" in told[-1]
    return told


def refused(command: list[str], folder: Path, capsys: Any) -> str:
    before = written(folder)
    capsys.readouterr()
    assert invoke(command) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    assert written(folder) == before
    return err


def row(**changes: Any) -> bytes:
    return json.dumps({**BAD, **changes}).encode() + b"\n"


@pytest.mark.property("D01")
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (row()[:-2] + b",}\n", "not one JSON object"),
        (row()[:-1] + b"\r\n", "CRLF"),
        (b"\n", "a blank line"),
        (row(question="Q\0Q").replace(b"\\u0000", b"\0"), "a NUL byte"),
        (b"\xef\xbb\xbf" + row(), "byte order mark"),
        (b'["a"]\n', "expected one JSON object"),
        (b'{"id": "r6", ' + row()[1:], "field 'id' is there twice"),
    ],
    ids=["comma", "CRLF", "blank", "NUL", "BOM", "list", "key twice"],
)
def test_a_malformed_line_ends_every_command_with_2(
    world: Path, tmp_path: Path, capsys: Any, bad: bytes, says: str
) -> None:
    assert all(says in line for line in refusals(world, tmp_path, bad, capsys))


@pytest.mark.property("D08")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"answer": 2}, ("(id r7)", "field 'answer'", "found 2")),
        ({"choices": ["a", 2]}, ("(id r7)", "field 'choices'", "found 2")),
        ({"question": " "}, ("(id r7)", "field 'question'", "only blanks")),
        ({"question": "long " * 80}, ("(id r7)", "field 'question'", "nothing is ever cut", "(1 of ")),
        ({"question": "a\ud800"}, ("(id r7)", "field 'question'", "lone surrogate")),
        ({"id": 7}, ("(id 7)", "field 'id'", "found 7")),
        ({"id": "q61"}, ("(id q61)", "field 'id'", ".jsonl:2 again")),
    ],
    ids=["range", "not text", "blank", "too long", "surrogate", "number as id", "id twice"],
)
def test_a_bad_field_ends_every_command_with_2_and_is_named_with_its_row(
    world: Path, tmp_path: Path, capsys: Any, changes: dict[str, Any], words: tuple[str, ...]
) -> None:
    """And so do those of D02 to D07."""
    for line in refusals(world, tmp_path, row(**changes), capsys):
        assert all(word in line for word in words), line


@pytest.mark.property("D10")
def test_a_token_without_an_embedding_ends_training_with_2(world: Path, tmp_path: Path, capsys: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    tokenizer.add_tokens(["<new>"])
    shutil.copytree(world / "llama", tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write_data(tmp_path / "data")
    command = training(world, data, tmp_path / "run", "--model", str(tmp_path / "model"))
    write_rows(data / "colours" / "train.jsonl", [*questions(0, 3), {**BAD, "question": "a <new> one"}])
    told = refused(command, tmp_path, capsys)
    assert "train.jsonl:4 (id r7): field 'question': found token '<new>' with id 257, expected ids below 257" in told


ODD = {
    "NFC": "caf\u00e9",
    "NFD": "cafe\u0301",
    "joined emoji": "\U0001f469\u200d\U0001f680",
    "right to left": "\u05e9\u05dc\u05d5\u05dd",
    "override": "a\u202eb\u202c",
    "separators": "a\u2028b\u2029c\u0085d",
    "controls": "a\x01\x1b[31mb\tc\x7f\x9b",
    "line ends": "a\nb\r\nc\r",
    "BOM inside": "a\ufeffb",
    "noncharacter": "a\uffff\U0010ffff",
    "markup": "<b>&amp;</b> \"'\\",
    "blanks around": " a\u3000",
}


def odd_rows() -> list[dict[str, Any]]:
    return [
        {"id": text, "question": f"{text}?", "choices": [f"{text}1", text, "x"], "answer": 1} for text in ODD.values()
    ]


@pytest.mark.property("D07")
def test_odd_text_comes_out_as_it_went_in_also_in_the_C_locale(world: Path, tmp_path: Path, capsys: Any) -> None:
    """Ids, by bytes, through predict; and an error about such a row is printed, not a crash."""
    raw = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in odd_rows())
    (tmp_path / "raw.jsonl").write_bytes(raw.encode())
    write_rows(tmp_path / "escaped.jsonl", odd_rows())
    write_rows(tmp_path / "bad.jsonl", [{**odd_rows()[2], "answer": 9}])
    commands = {
        name: ["predict", str(world / "run"), "--input", f"{tmp_path / name}.jsonl", "--output", f"{tmp_path / name}"]
        for name in ("raw", "escaped", "bad")
    }
    assert [invoke(command) for command in commands.values()] == [0, 0, 2]
    expected = (tmp_path / "raw").read_bytes()
    assert (tmp_path / "escaped").read_bytes() == expected
    found = [json.loads(line)["id"] for line in expected.split(b"\n")[:-1]]
    assert [text.encode() for text in found] == [text.encode() for text in ODD.values()]
    assert all(text.encode() in expected for name, text in ODD.items() if name in ("NFC", "NFD", "override"))
    for name in ("raw", "escaped"):
        (tmp_path / name).unlink()
    code = "import json, sys; from bayestune_cli.app import invoke"
    code += "; sys.exit([invoke(command) for command in json.loads(sys.argv[1])] != [0, 0, 2])"
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    arguments = [sys.executable, "-c", code, json.dumps(list(commands.values()))]
    done = subprocess.run(arguments, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "raw").read_bytes() == expected
    assert b"bad.jsonl:1 (id \\U0001f469\\u200d\\U0001f680): field 'answer'" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.property("D14")
def test_answers_are_keyed_by_id_whatever_the_order_of_the_rows(
    world: Path, tmp_path: Path, figure: Callable[..., None]
) -> None:
    """The output has the order of the input; the probabilities of a row do not depend on it."""
    asked = questions(60, 20)
    shuffled = random.Random(0).sample(asked, len(asked))
    answers = []
    for name, rows in (("first", asked), ("second", shuffled)):
        source = write_rows(tmp_path / f"{name}.jsonl", rows)
        command = ["predict", str(world / "run"), "--input", str(source), "--output", str(tmp_path / name)]
        assert invoke([*command, "--draws", "3"]) == 0
        answers.append([json.loads(line) for line in (tmp_path / name).read_text().split("\n")[:-1]])
        assert [answer["id"] for answer in answers[-1]] == [one["id"] for one in rows]
    by_id = {answer["id"]: answer for answer in answers[1]}
    worst = max(abs(p - q) for one in answers[0] for p, q in zip(one["probs"], by_id[one["id"]]["probs"], strict=True))
    figure("probabilities of a row, file in order and shuffled", worst, at_most=1e-6)
    assert len({round(answer["probs"][0], 6) for answer in answers[0]}) > 10


@pytest.mark.property("D13")
def test_a_resumed_run_refuses_rows_that_changed(world: Path, tmp_path: Path, capsys: Any) -> None:
    """One label is enough; put back, the run goes on."""
    data, output = write_data(tmp_path / "data"), tmp_path / "run"
    command = training(world, data, output, "--checkpoint-steps", "1")
    assert invoke(command) == 0
    (output / "result.json").unlink()
    (output / "checkpoints" / "checkpoint-2" / "training.json").unlink()
    rows = questions(0, 16)
    write_rows(data / "colours" / "train.jsonl", [{**rows[0], "answer": 1 - rows[0]["answer"]}, *rows[1:]])
    before = written(tmp_path)
    capsys.readouterr()
    assert invoke([*command, "--resume"]) in (2, 3)  # what is refused on resuming counts as training stopped
    assert "row_sha256" in capsys.readouterr().err
    assert written(tmp_path) == before
    write_rows(data / "colours" / "train.jsonl", rows)
    assert invoke([*command, "--resume"]) == 0
