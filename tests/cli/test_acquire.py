"""`bayestune acquire`: the rows it chooses, the rows it leaves out, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bayestune.experiment import Run, load_run
from bayestune.inference.acquire import ACQUISITIONS
from bayestune.tasks import read_rows
from bayestune_cli import batches
from bayestune_cli.app import invoke
from cli.commands import make_world, training
from toys import questions, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole/, a BLoB run, plain/, plain LoRA, and pool.jsonl."""
    folder = make_world(tmp_path_factory.mktemp("world"))
    plain = training(folder, folder / "plain", "--method", "mle")
    del plain[plain.index("--rho-init") : plain.index("--rho-init") + 2]
    assert invoke(plain) == 0
    write_rows(folder / "pool.jsonl", questions(20, 12))
    return folder


def acquiring(world: Path, *flags: str, run: str = "whole", pool: Path | None = None) -> list[str]:
    return ["acquire", str(world / run), "--pool", str(pool or world / "pool.jsonl"), *flags]


def chosen(text: str) -> dict[str, float]:
    found = [json.loads(line) for line in text.splitlines()]
    assert all(one.keys() == {"id", "score"} for one in found)
    return {one["id"]: one["score"] for one in found}


@pytest.mark.parametrize("score", ["mutual_information", "entropy"])
def test_the_rows_are_those_with_the_highest_score_of_the_run(world: Path, score: str, capsys: Any) -> None:
    assert invoke(acquiring(world, "--top", "5", "--score", score)) == 0
    out, err = capsys.readouterr()
    rows = read_rows(world / "pool.jsonl", labelled=False)
    prediction = load_run(world / "whole").predict(rows, draws=3)
    values = prediction.epistemic if score == "mutual_information" else prediction.total
    expected = sorted(zip(prediction.ids, values.tolist(), strict=True), key=lambda pair: -pair[1])[:5]
    assert chosen(out) == dict(expected) and list(chosen(out)) == [row for row, _ in expected]
    assert f"{world / 'pool.jsonl'}: 5 of 12 rows by {score}, 0 training rows left out" in err


def test_a_file_holds_what_stdout_gets_and_is_replaced_only_when_told(
    world: Path, tmp_path: Path, capsys: Any
) -> None:
    output = tmp_path / "next.jsonl"
    assert invoke(acquiring(world)) == 0
    text = capsys.readouterr().out
    assert len(text.splitlines()) == 12  # all rows, as there are fewer than 20
    assert invoke(acquiring(world, "--output", str(output))) == 0
    assert capsys.readouterr().out == f"{output}: 12 of 12 rows by mutual_information, 0 training rows left out\n"
    assert output.read_text(encoding="utf-8") == text
    assert invoke(acquiring(world, "--output", str(output), "--top", "1")) == 2
    assert "the file exists" in capsys.readouterr().err and output.read_text(encoding="utf-8") == text
    assert invoke(acquiring(world, "--output", str(output), "--top", "1", "--overwrite")) == 0
    assert output.read_text(encoding="utf-8") == text.splitlines(keepends=True)[0]
    assert [path.name for path in tmp_path.iterdir()] == ["next.jsonl"]


def test_training_rows_are_left_out_by_their_texts_and_counted(world: Path, tmp_path: Path, capsys: Any) -> None:
    known = [
        {**row, "id": f"new{i}", "question": row["question"].upper() + "  ", "choices": row["choices"][::-1]}
        for i, row in enumerate(questions(0, 3))
    ]
    pool = write_rows(tmp_path / "pool.jsonl", [known[0], *questions(20, 4), *known[1:]])
    assert invoke(acquiring(world, pool=pool)) == 0
    out, err = capsys.readouterr()
    assert set(chosen(out)) == {f"q{i}" for i in range(20, 24)}
    assert f"{pool}: 4 of 4 rows by mutual_information, 3 training rows left out\n" in err


def test_the_pool_is_read_some_rows_at_a_time_and_bad_rows_are_skipped_when_told(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert invoke(acquiring(world, "--top", "4")) == 0
    whole = chosen(capsys.readouterr().out)
    monkeypatch.setattr(batches, "ROWS_AT_ONCE", 5)
    rows = questions(20, 12)
    bad = {**rows[0], "id": "long", "question": "long " * 80}
    pool = write_rows(tmp_path / "pool.jsonl", [*rows[:7], bad, *rows[7:]])
    assert invoke(acquiring(world, "--top", "4", "--on-bad-row", "skip", pool=pool)) == 0
    out, err = capsys.readouterr()
    # Other batches may change the last bits of a float32 forward.
    assert chosen(out) == pytest.approx(whole, abs=1e-6) and list(chosen(out)) == list(whole)
    assert f"4 of 12 rows by mutual_information, 0 training rows left out, 1 skipped; the first: {pool}:8" in err


def test_random_needs_no_answers_and_follows_the_seed(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(Run, "predict", lambda *_, **__: pytest.fail("the model is asked"))
    found = []
    for run, seed in (("plain", "1"), ("whole", "1"), ("whole", "2")):
        assert invoke(acquiring(world, "--score", "random", "--seed", seed, run=run)) == 0
        found.append(chosen(capsys.readouterr().out))
    assert found[0] == found[1] and list(found[1]) != list(found[2])


def test_wrong_input_is_one_line_and_nothing_is_written(world: Path, tmp_path: Path, capsys: Any) -> None:
    none, bad = tmp_path / "none.jsonl", tmp_path / "bad.jsonl"
    write_rows(bad, [*questions(20, 2), {**questions(22, 1)[0], "question": "long " * 80}])
    pool, output = world / "pool.jsonl", ["--output", str(tmp_path / "a")]
    before = sorted(path.name for path in tmp_path.iterdir())
    for command, words in (
        (acquiring(world, *output, pool=none), "none.jsonl: cannot be read"),
        (acquiring(world, *output, "--on-bad-row", "skip", pool=none), "none.jsonl: found no such file"),
        (acquiring(world, *output, pool=bad), "bad.jsonl:3 (id q22): field 'question'"),
        (acquiring(world, *output, "--top", "0"), "Invalid value for '--top'"),
        (acquiring(world, *output, "--score", "margin"), "Invalid value for '--score'"),
        (acquiring(world, *output, run="plain"), "acquire: found 0 draws, of which the mutual information is 0"),
        (acquiring(world, *output, "--draws", "5", run="plain"), "draws"),
        (acquiring(world, *output, "--draws", "1"), "acquire: found 1 draws"),
        (acquiring(world, *output, "--score", "random", "--draws", "7"), "expected neither: --score random uses"),
        (acquiring(world, *output, "--data", str(tmp_path)), str(tmp_path)),
        (acquiring(world, "--output", str(pool)), "the file exists"),
        (acquiring(world, "--output", str(pool), "--overwrite"), "found the file of --pool"),
        (acquiring(world, "--output", str(tmp_path / "no" / "a")), "found no folder"),
        (acquiring(world, *output, run="nowhere"), "nowhere: found no result.json"),
        (["acquire", str(world / "whole")], "Missing option '--pool'"),
    ):
        capsys.readouterr()
        assert invoke(command) == 2
        out, err = capsys.readouterr()
        last = err.rstrip("\n").rpartition("\n")[2]
        assert out == "" and last.startswith("error: ") and words in last and "Traceback" not in err, err
        assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert pool.read_bytes() == write_rows(tmp_path / "same.jsonl", questions(20, 12)).read_bytes()


def test_wrong_paths_and_rows_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "result.json").touch()
    (tmp_path / "bad.jsonl").write_text('{"id": "r1"}\n')
    commands = [["acquire", str(tmp_path), "--pool", str(tmp_path / name)] for name in ("none.jsonl", "bad.jsonl")]
    code = "import json, sys; from bayestune_cli.app import invoke\n"
    code += "codes = [invoke(given) for given in json.loads(sys.argv[1])]\n"
    code += "print(json.dumps([codes, [m for m in ('torch', 'transformers', 'bayestune') if m in sys.modules]]))"
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True)
    assert json.loads(done.stdout) == [[2, 2], []] and len(done.stderr.splitlines()) == 2


def test_the_scores_of_the_command_are_those_of_the_package(world: Path, capsys: Any) -> None:
    assert invoke(["acquire", "--help"]) == 0
    assert "|".join(ACQUISITIONS) in capsys.readouterr().out.replace("\n", "").replace(" ", "")
