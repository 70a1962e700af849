"""`bayestune table --rebuild` and `bayestune report`: files written, and one clear line for each wrong input."""

import json
from pathlib import Path
from typing import Any

import pytest

from bayestune_cli.app import invoke
from tabled import answers, record, save


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two cells of table 1 and two of table 2."""
    folder = tmp_path_factory.mktemp("results")
    known = answers(rows=20)
    other = record(answers("arc_easy", rows=20), known=known, table="table2")
    save(folder, record(known), record(known, method="mle"), record(known, table="table2"), other)
    return folder


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with 2."""
    assert invoke(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err
    return err


def test_rebuild_prints_and_writes_the_table(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b/c"):
        command = ["table", "table1", "--rebuild", "--results", str(results), "--output", str(tmp_path / folder)]
        assert invoke(command) == 0
        assert "| BLoB, N = 10 | **" in capsys.readouterr().out
    for name in ("table1.md", "table1.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b/c" / name).read_bytes()
    text = (tmp_path / "a" / "table1.md").read_text(encoding="utf-8")
    assert text.startswith("# Table 1") and "bayestune table table1 --rebuild, from 2 cells" in text
    assert "Content-Security-Policy" in (tmp_path / "a" / "table1.html").read_text(encoding="utf-8")


def test_rebuild_needs_nothing_but_the_cells(results: Path, tmp_path: Path) -> None:
    command = ["table", "table2", "--rebuild", "--results", str(results), "--output", str(tmp_path)]
    assert invoke(command) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"table2.md", "table2.html"}
    assert "AUROC" in (tmp_path / "table2.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["table9", "--rebuild"], "table: found 'table9', expected one of table1, table2, roberta."),
        (["<script>"], "table: found '<script>'"),
        (["table1"], "table: found no --model, expected one"),
        (["table1", "--rebuild", "--dry-run"], "found --dry-run with --rebuild"),
        (["table1", "--rebuild", "--seeds", "1"], "found --seeds with --rebuild"),
        (["table1", "--rebuild", "--steps", "few"], "Invalid value for '--steps'"),
        (["roberta", "--rebuild"], "roberta: no such folder"),
        ([], "Missing argument 'TABLE'"),
    ],
)
def test_a_wrong_table_command_is_one_line(
    results: Path, tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--results", str(results), "--output", str(tmp_path / "tables")]
    assert message in refused(["table", *arguments, *places], capsys)
    assert not (tmp_path / "tables").exists()


def test_a_faulty_cell_stops_before_anything_is_written(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell: dict[str, Any] = record(answers(rows=20)) | {"ece": float("nan")}
    (tmp_path / "table1").mkdir()
    (tmp_path / "table1" / "x.json").write_text(json.dumps(cell))
    command = ["table", "table1", "--rebuild", "--results", str(tmp_path), "--output", str(tmp_path / "tables")]
    assert "x.json: field ece: found nan" in refused(command, capsys)
    page = ["report", str(tmp_path / "table1"), "--output", str(tmp_path / "report.html")]
    assert "x.json: field ece: found nan" in refused(page, capsys)
    assert {path.name for path in tmp_path.iterdir()} == {"table1"}


def test_report_writes_one_page_of_several_folders(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "report.html"
    assert invoke(["report", str(results / "table1"), str(results / "table2"), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: 4 cells\n"
    first = output.read_bytes()
    assert b"Table 1: in distribution" in first and b"Table 2: trained on OBQA" in first
    assert invoke(["report", str(results), "--output", str(output), "--overwrite"]) == 0
    assert output.read_bytes() == first
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_wrong_report_command_is_one_line_and_writes_nothing(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken.html").write_text("mine")
    (tmp_path / "empty").mkdir()
    table = str(results / "table1")
    for arguments, message in (
        ([table, "--output", str(tmp_path / "taken.html")], "the file exists; choose another, or pass --overwrite"),
        ([table, "--output", str(tmp_path)], "found a folder, expected a file"),
        ([table, "--output", str(tmp_path / "no" / "a.html")], "found no folder"),
        ([str(tmp_path / "nowhere"), "--output", str(tmp_path / "a.html")], "nowhere: no such folder"),
        ([str(tmp_path / "empty"), "--output", str(tmp_path / "a.html")], "empty: found no .json file"),
        ([table, table, "--output", str(tmp_path / "a.html")], "the same table, task"),
        (["--output", str(tmp_path / "a.html")], "Missing argument"),
        ([table], "Missing option '--output'"),
    ):
        assert message in refused(["report", *arguments], capsys)
    assert (tmp_path / "taken.html").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"taken.html", "empty"}
