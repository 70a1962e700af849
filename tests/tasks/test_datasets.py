"""Known data sets, folders of the user's, and the Hub."""

import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from bayestune.errors import ConfigError, DataError, MissingSplitError
from bayestune.tasks import Row, TextRow, dataset, load_rows
from bayestune.tasks.datasets import KNOWN, DatasetSpec

FOUR = {"question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}


def write(folder: Path, split: str, *rows: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{split}.jsonl"
    numbered = [{"id": f"{split}-{i}", **row} for i, row in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in numbered))
    return path


@pytest.mark.parametrize("name", ["openbook", "../openbookqa", "/etc", "", ".", "a/b", "mmlu", "mmlu_../x", "x" * 65])
def test_an_unknown_name_lists_the_known_ones_and_the_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="unknown data set .*winogrande_s, .*, wic, mmlu_<subject>; and no folder"):
        dataset(name, tmp_path)
    with pytest.raises(DataError, match="unknown data set .*; and no data folder was given"):
        dataset(name)


def test_the_names_of_the_issue_are_known() -> None:
    names = "winogrande_s winogrande_m arc_easy arc_challenge openbookqa boolq rte mrpc cola wic"
    assert {spec.name for spec in KNOWN} == set(names.split())
    assert dataset("mmlu_college_physics").classes == 4


def test_a_missing_folder_and_a_missing_split_name_their_paths(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path / 'openbookqa'}: no such folder"):
        load_rows("openbookqa", "train", tmp_path)
    write(tmp_path / "openbookqa", "dev", FOUR)
    missing = tmp_path / "openbookqa" / "train.jsonl"
    with pytest.raises(DataError, match=f"{missing}: no such file, nor train.jsonl.gz; the folder has dev.jsonl"):
        load_rows("openbookqa", "train", tmp_path)
    with pytest.raises(DataError, match="found split '../dev'"):
        load_rows("openbookqa", "../dev", tmp_path)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "openbookqa", "dev", FOUR)
    (tmp_path / "openbookqa" / "dev.jsonl.gz").write_bytes(b"")
    with pytest.raises(DataError, match=f"{path}: found both"):
        load_rows("openbookqa", "dev", tmp_path)


def test_splits_are_joined_in_order_and_ids_stay_unique(tmp_path: Path) -> None:
    write(tmp_path / "openbookqa", "dev", FOUR, FOUR)
    write(tmp_path / "openbookqa", "test", FOUR)
    assert [row.id for row in load_rows("openbookqa", "dev+test", tmp_path)] == ["dev-0", "dev-1", "test-0"]
    with pytest.raises(DataError, match="dev.jsonl:1 .*field 'id': found the id of .*dev.jsonl:1 again"):
        load_rows("openbookqa", "dev+dev", tmp_path)


def test_winogrande_finds_its_train_split_and_boolq_has_none_without_passages(tmp_path: Path) -> None:
    blank = {"question": "The _ sat.", "choices": ["cat", "mat"], "answer": 0}
    yes_no = {"question": "is it so", "choices": ["False", "True"], "answer": 1}
    for size in ("s", "m"):
        write(tmp_path / "winogrande", f"train_{size}", {**blank, "id": size})
        assert [row.id for row in load_rows(f"winogrande_{size}", "train", tmp_path)] == [size]
    write(tmp_path / "boolq", "train_questions", yes_no)
    with pytest.raises(MissingSplitError, match=r"train\.jsonl"):
        load_rows("boolq", "train", tmp_path)  # without passages it is another task, to be asked for by name
    assert [row.id for row in load_rows("boolq", "train_questions", tmp_path)] == ["train_questions-0"]
    write(tmp_path / "boolq", "train", {**yes_no, "passage": "It is so."})
    assert [row.id for row in load_rows("boolq", "train", tmp_path)] == ["train-0"]


@pytest.mark.property("D03")
@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("openbookqa", {**FOUR, "choices": list("abcde")}, "field 'choices': found 5 choices, expected at most 4"),
        ("openbookqa", {"text": "It rains.", "label": 0}, "field 'text': found a row with 'text'"),
        ("rte", FOUR, "field 'question': found a row with 'question'"),
        ("rte", {"text": "It rains.", "label": 2}, r"field 'label': found 2, expected 0\.\.1 \(2 classes\)"),
        ("rte", {"text": "It rains.", "label": "no"}, r"field 'label': found 'no', expected 0\.\.1 \(2 classes\)"),
        ("boolq", {**FOUR, "choices": ["no", "yes"]}, r"field 'choices': found \['no', 'yes'\], expected \['False'"),
        (
            "winogrande_s",
            {**FOUR, "choices": ["a", "b"]},
            "field 'question': found 0 blanks '_', expected exactly one",
        ),
        ("winogrande_s", {**FOUR, "question": "_ _", "choices": ["a", "b"]}, "field 'question': found 2 blanks"),
    ],
)
def test_a_row_of_another_data_set_is_refused(tmp_path: Path, name: str, row: dict[str, Any], says: str) -> None:
    path = write(tmp_path / dataset(name).folder, "dev", row)
    with pytest.raises(DataError, match=rf"{path}:1 \(id dev-0\): {says}"):
        load_rows(name, "dev", tmp_path)


def test_a_folder_of_the_users_is_a_data_set(tmp_path: Path) -> None:
    write(tmp_path / "mine", "train", FOUR)
    write(tmp_path / "mine", "test", {**FOUR, "choices": list("abcde")})
    spec = dataset("mine", tmp_path)
    assert (spec.row, spec.classes) == (Row, 5)
    assert len(load_rows("mine", "train", tmp_path)) == 1
    write(tmp_path / "moods", "train", {"text": "Good.", "label": 2}, {"text": "Bad.", "label": 0})
    assert (dataset("moods", tmp_path).row, dataset("moods", tmp_path).classes) == (TextRow, 3)
    assert dataset("moods", tmp_path, classes=4).classes == 4


def test_a_folder_of_the_users_without_rows_or_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: found no \.jsonl"):
        dataset("empty", tmp_path)
    write(tmp_path / "one", "train", {"text": "Good.", "label": 0})
    with pytest.raises(DataError, match="one: found 1 classes in its labels, expected at least 2"):
        dataset("one", tmp_path)
    write(tmp_path / "both", "dev", FOUR)
    write(tmp_path / "both", "train", {"text": "Good.", "label": 0})
    with pytest.raises(DataError, match=r"train.jsonl:1 .* found a sentence row after the multiple-choice row of"):
        dataset("both", tmp_path)


GOOD, BAD = ({"text": f"It is {label}.", "label": label} for label in ("good", "bad"))


def test_classes_are_named_by_the_text_labels_of_the_train_split_sorted(tmp_path: Path) -> None:
    write(tmp_path / "moods", "train", GOOD, BAD, GOOD)
    write(tmp_path / "moods", "dev", GOOD, {"text": "Who knows?"})
    spec = dataset("moods", tmp_path)
    assert (spec.row, spec.classes, spec.labels) == (TextRow, 2, ("bad", "good"))
    assert [row.target for row in load_rows("moods", "train", tmp_path)] == ["good", "bad", "good"]
    write(tmp_path / "counted", "train", {"text": "Good.", "label": 1})
    assert dataset("counted", tmp_path).labels is None
    with pytest.raises(DataError, match="moods: found 2 class names in its train split, expected the 3 of classes=3"):
        dataset("moods", tmp_path, classes=3)


def test_a_label_that_the_train_split_does_not_have_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "moods", "train", GOOD, BAD)
    path = write(tmp_path / "moods", "dev", GOOD, {**GOOD, "label": "fair"})
    says = rf"{path}:2 \(id dev-1\): field 'label': found 'fair', expected one of \['bad', 'good'\]"
    with pytest.raises(DataError, match=says):
        dataset("moods", tmp_path)


def test_text_labels_in_one_split_and_numbers_in_another_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "moods", "train", GOOD, BAD)
    dev = write(tmp_path / "moods", "dev", {"text": "Good.", "label": 1})
    says = rf"{path}:1 \(id train-0\): field 'label': found 'good', expected a whole number, as 1 of {dev}:1"
    with pytest.raises(DataError, match=says):
        dataset("moods", tmp_path)


def test_text_labels_without_a_train_split_need_the_names(tmp_path: Path) -> None:
    write(tmp_path / "moods", "dev", GOOD, BAD)
    with pytest.raises(DataError, match="moods: found text labels but no train split, expected train.jsonl"):
        dataset("moods", tmp_path)
    assert dataset("moods", tmp_path, labels=("bad", "good")).classes == 2


HUB_ROWS: list[tuple[str, str, dict[str, Any], Row | TextRow]] = [
    (
        "winogrande_s",
        "train",
        {"sentence": "The _ sat. ", "option1": "cat", "option2": "mat", "answer": "2"},
        Row(id="train-0", question="The _ sat.", choices=("cat", "mat"), answer=1),
    ),
    (
        "arc_easy",
        "dev",
        {
            "id": "M7",
            "question": "Which?",
            "choices": {"text": ["w", "x", "y"], "label": ["1", "2", "3"]},
            "answerKey": "3",
        },
        Row(id="M7", question="Which?", choices=("w", "x", "y"), answer=2),
    ),
    (
        "openbookqa",
        "test",
        {
            "id": "7-980",
            "question_stem": "The sun",
            "choices": {"text": list("wxyz"), "label": list("ABCD")},
            "answerKey": "D",
        },
        Row(id="7-980", question="The sun", choices=("w", "x", "y", "z"), answer=3),
    ),
    (
        "boolq",
        "dev",
        {"question": "is it so", "answer": True, "passage": "It is so."},
        Row(id="validation-0", question="is it so", choices=("False", "True"), answer=1, passage="It is so."),
    ),
    (
        "mmlu_college_physics",
        "test",
        {"question": "Which?", "subject": "college_physics", "choices": list("wxyz"), "answer": 2},
        Row(id="test-0", question="Which?", choices=("w", "x", "y", "z"), answer=2),
    ),
    (
        "mrpc",
        "train",
        {"sentence1": "One.", "sentence2": "Two.", "label": 0, "idx": 9},
        TextRow(id="train-0", text="One.", text_pair="Two.", label=0),
    ),
    ("cola", "dev", {"sentence": "One.", "label": 1, "idx": 0}, TextRow(id="validation-0", text="One.", label=1)),
    (
        "wic",
        "train",
        {"word": "bank", "sentence1": "By the bank.", "sentence2": "In the bank.", "label": 0, "idx": 0},
        TextRow(id="train-0", text="bank: By the bank.", text_pair="In the bank.", label=0),
    ),
]


def put_on_hub(monkeypatch: pytest.MonkeyPatch, *rows: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A stand-in for the package `datasets` with these rows in every split; returns the requests it gets."""
    requests: list[tuple[Any, ...]] = []

    def load_dataset(repository: str, configuration: str | None, *, split: str) -> list[dict[str, Any]]:
        requests.append((repository, configuration, split))
        return list(rows)

    package = ModuleType("datasets")
    monkeypatch.setattr(package, "load_dataset", load_dataset, raising=False)
    monkeypatch.setitem(sys.modules, "datasets", package)
    return requests


@pytest.mark.parametrize(("name", "split", "row", "expected"), HUB_ROWS)
def test_rows_of_the_hub_become_ours(
    monkeypatch: pytest.MonkeyPatch, name: str, split: str, row: dict[str, Any], expected: Row | TextRow
) -> None:
    requests = put_on_hub(monkeypatch, row)
    assert load_rows(name, split) == [expected]
    assert len(requests) == 1
    assert requests[0][2] == {"dev": "validation"}.get(split, split)


def test_the_hub_is_asked_for_the_right_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = put_on_hub(monkeypatch)
    for name in ("winogrande_m", "arc_challenge", "boolq", "mmlu_college_physics", "rte"):
        load_rows(name, "test" if name.startswith("mmlu") else "dev")
    assert requests == [
        ("allenai/winogrande", "winogrande_m", "validation"),
        ("allenai/ai2_arc", "ARC-Challenge", "validation"),
        ("google/boolq", None, "validation"),
        ("cais/mmlu", "college_physics", "test"),
        ("nyu-mll/glue", "rte", "validation"),
    ]


@pytest.mark.property("D03")
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("winogrande_s", {"answer": ""}, r"hub:allenai/winogrande/winogrande_s/train:1 .*field 'answer': found ''"),
        ("arc_easy", {"answerKey": "E"}, "field 'answer': found 'E'"),
        ("arc_easy", {"choices": {"text": ["w", None], "label": ["A", "B"]}}, "found None among the choices"),
        ("boolq", {"answer": None}, "field 'answer': found None"),
        ("boolq", {"passage": "  "}, "field 'passage': found empty text"),
        ("mrpc", {"label": -1}, "field 'label': found -1"),
        ("cola", {"label": 2}, "field 'label': found 2"),
    ],
)
def test_rows_of_the_hub_go_through_the_same_checks(
    monkeypatch: pytest.MonkeyPatch, name: str, change: dict[str, Any], says: str
) -> None:
    row = next(row for known, _, row, _ in HUB_ROWS if known == name)
    put_on_hub(monkeypatch, {**row, **change})
    with pytest.raises(DataError, match=says):
        load_rows(name, "train")


def test_a_changed_schema_and_an_absent_split_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    put_on_hub(monkeypatch, {"question": "Which?"})
    with pytest.raises(DataError, match="hub:google/boolq/train:1: found no field 'passage'"):
        load_rows("boolq", "train")
    with pytest.raises(DataError, match="split 'train': not on the Hub in cais/mmlu; it has dev, validation, test"):
        load_rows("mmlu_college_physics", "train")


def test_without_the_package_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[hub\]'"):
        load_rows("openbookqa", "train")


ROWS = {
    "winogrande_s": {"train": 638, "dev": 1267},
    "winogrande_m": {"train": 2556, "dev": 1267},
    "arc_challenge": {"train": 1118, "dev": 299, "test": 1172, "dev+test": 1471},
    "arc_easy": {"train": 2251, "dev": 570, "test": 2376, "dev+test": 2946},
    "openbookqa": {"train": 4952, "dev": 500, "test": 500, "dev+test": 1000},
    "boolq": {"train": 9427, "dev": 3270},
    "rte": {"train": 2488, "dev": 277},
    "mmlu_college_chemistry": {"test": 100, "dev": 5},
    "mmlu_college_physics": {"test": 91, "dev": 4},
    "mmlu_high_school_chemistry": {"test": 203, "dev": 5},
    "mmlu_high_school_physics": {"test": 151, "dev": 5},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_row_of_the_real_data_reads(data_dir: Path, name: str) -> None:
    assert {split: len(load_rows(name, split, data_dir)) for split in ROWS[name]} == ROWS[name]


@pytest.mark.parametrize(("splits", "usual"), [(("train", "dev", "test"), "dev"), (("train", "test"), "test")])
def test_a_users_set_is_scored_on_dev_or_else_on_test(tmp_path: Path, splits: tuple[str, ...], usual: str) -> None:
    for split in splits:
        write(tmp_path / "mine", split, {"question": "is it so", "choices": ["no", "yes"], "answer": 1})
    assert dataset("mine", tmp_path).evaluation == usual


def test_a_data_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingSplitError, match="nowhere: no such folder"):
        dataset("mine", tmp_path / "nowhere")


def test_a_row_that_is_none_is_refused_in_words(tmp_path: Path) -> None:
    write(tmp_path / "mine", "train", {"question": "is it so", "choices": ["no", "yes"], "answer": 1})
    row: Any = {"id": "a", "question": "q", "choices": ["x", "y"]}
    checked_only_by_us = inspect.unwrap(DatasetSpec.check)
    with pytest.raises(DataError, match="found a dict, expected a row such as those from tasks.read_rows"):
        checked_only_by_us(dataset("mine", tmp_path), row)
