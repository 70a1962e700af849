"""Rows that are scored and were learnt from: counted, and said before anything is trained."""

import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from bayestune.errors import BayestuneWarning
from bayestune.experiment.overlap import count_repeated
from bayestune.tasks import AnyRow, Row, TextRow, load_rows
from bayestune_cli.app import invoke
from toys import pretrained_llama, questions, write_data, write_rows

LEARNT = Row(id="t1", question="Is the café open?", choices=("Yes, sir", "No", "Perhaps"), answer=0)


def question(**changes: object) -> Row:
    return Row(**{**vars(LEARNT), "id": "d1", **changes})


def counted(row: AnyRow, *learnt: AnyRow) -> dict[str, int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayestuneWarning)
        return count_repeated([row], "dev", {"train": learnt or [LEARNT]})["train"]


@pytest.mark.property("D08")
@pytest.mark.parametrize("row", [question(), question(answer=2), question(answer=None), question(id="t1")])
def test_a_row_repeats_another_whatever_its_id_and_answer(row: Row) -> None:
    assert counted(row) == {"rows": 1, "exact": 1}


@pytest.mark.property("D08")
@pytest.mark.parametrize(
    "row",
    [
        question(question="IS the Café open?"),
        question(question="  Is\tthe  café\u00a0open?\n"),
        question(question="Is the cafe\u0301 open?"),
        question(question="\uff29\uff53 the café open?"),
        question(choices=("yes, SIR", "no", "perhaps")),
        question(choices=("No", "Perhaps", "Yes, sir"), answer=2),
    ],
    ids=["case", "blanks", "NFD", "full width", "case of choices", "order of choices"],
)
def test_case_blanks_forms_and_the_order_of_choices_do_not_hide_a_repeated_row(row: Row) -> None:
    assert counted(row) == {"rows": 1, "exact": int(row.question == LEARNT.question and row.choices == LEARNT.choices)}


@pytest.mark.property("D08")
@pytest.mark.parametrize(
    "row",
    [
        question(question="Is the café shut?"),
        question(choices=("Yes, sir", "No")),
        question(choices=("Yes", "sir No", "Perhaps")),
        question(passage="It is noon."),
        TextRow(id="d1", text="Is the café open?", label=0),
    ],
)
def test_a_row_with_other_texts_is_another_row(row: AnyRow) -> None:
    assert counted(row) == {"rows": 0, "exact": 0}


@pytest.mark.property("D08")
def test_pairs_of_sentences_are_compared_in_order() -> None:
    learnt = TextRow(id="t", text="It rains.", text_pair="It is wet.", label=1)
    swapped = TextRow(id="d", text="It is wet.", text_pair="It rains.", label=1)
    assert counted(swapped, learnt) == {"rows": 0, "exact": 0}
    assert counted(TextRow(id="d", text="it rains.", text_pair="It is wet.", label=0), learnt)["rows"] == 1


@pytest.mark.property("D08")
def test_the_warning_counts_and_names_the_first_of_each_split() -> None:
    scored = [question(id=f"d{i}", question=f"Is it {i}?") for i in range(8)]
    train = [question(id=f"t{i}", question=f"Is it {i}?") for i in (1, 3, 4)]
    train += [question(id=f"t{i}", question=f"is it {i}?") for i in (5, 1)]
    with pytest.warns(BayestuneWarning) as caught:
        found = count_repeated(scored, "dev", {"train": train, "held": train[:1], "other": [LEARNT]})
    assert found == {
        "train": {"rows": 4, "exact": 3},
        "held": {"rows": 1, "exact": 1},
        "other": {"rows": 0, "exact": 0},
    }
    first, second = (str(warning.message) for warning in caught)
    assert first.startswith("4 of the 8 rows of split dev, which the run is scored on, are also in split train, ")
    assert "3 of them letter for letter; such as 'd1' (there 't1'), 'd3' (there 't3'), 'd4' (there 't4')." in first
    assert second.startswith("1 of the 8 rows of split dev") and "split held" in second
    assert "\n" not in first


@pytest.mark.property("D08")
@pytest.mark.nightly
def test_a_hundred_thousand_rows_are_compared_in_seconds(figure: Callable[..., None]) -> None:
    """Comparing every pair would take hours."""
    train = [TextRow(id=f"t{i}", text=f"Sentence {i}, and É more.", label=0) for i in range(100_000)]
    scored = [TextRow(id=f"d{i}", text=f"sentence {2 * i}, and é  more.", label=0) for i in range(100_000)]
    started = time.process_time()
    with pytest.warns(BayestuneWarning, match="50000 of the 100000 rows"):
        count_repeated(scored, "dev", {"train": train})
    figure("seconds of processor for 100,000 against 100,000 rows", time.process_time() - started, at_most=30.0)


@pytest.mark.property("D08")
def test_a_run_says_it_first_and_records_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretrained_llama(tmp_path / "llama")
    data = write_data(tmp_path / "data")
    learnt, scored = questions(0, 16), questions(16, 10)
    scored[1] = {**learnt[2], "id": "again"}
    scored[4] = {**learnt[5], "id": "LIKE", "question": learnt[5]["question"].upper()}
    (data / "colours" / "dev.jsonl.gz").unlink()
    write_rows(data / "colours" / "dev.jsonl", scored)
    write_rows(data / "colours" / "held.jsonl", [*questions(30, 3), {**scored[7], "id": "held"}])
    command = ["train", "--model", str(tmp_path / "llama"), "--task", "colours", "--data", str(data), "--steps", "1"]
    command += ["--batch-size", "4", "--draws", "2", "--max-tokens", "200", "--temperature-split", "held"]
    assert invoke([*command, "--output", str(tmp_path / "run")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    found = [line for line in told if "which the run is scored on" in line]
    assert len(found) == 2
    assert "2 of the 10 rows of split dev" in found[0] and "'again' (there 'q2'), 'LIKE' (there 'q5')" in found[0]
    assert "split held" in found[1]
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["repeated_rows"] == {"train": {"rows": 2, "exact": 1}, "held": {"rows": 1, "exact": 1}}


@pytest.mark.property("D08")
@pytest.mark.parametrize(
    ("name", "split", "rows", "exact"),
    [("openbookqa", "test", 14, 0), ("openbookqa", "dev", 7, 0), ("arc_easy", "test", 3, 2), ("rte", "dev", 0, 0)],
)
def test_published_splits_repeat_a_few_rows(data_dir: Path, name: str, split: str, rows: int, exact: int) -> None:
    """Most of them with the choices in another order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BayestuneWarning)
        scored, learnt = load_rows(name, split, data_dir), load_rows(name, "train", data_dir)
        assert count_repeated(scored, split, {"train": learnt})["train"] == {"rows": rows, "exact": exact}
