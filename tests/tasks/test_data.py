"""Rows and their reader: whatever is not exactly a row is refused, with file, line, id and field."""

import gzip
import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bayestune.errors import DataError
from bayestune.tasks import Row, TextRow, read_rows
from bayestune.tasks.data import LINE_LIMIT, parse_row

GOOD = {"id": "r1", "question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
TEXT = {"id": "t1", "text": "It rains.", "text_pair": "It is wet.", "label": 1}


# The same inputs each time, and no opinion on how fast the machine makes them.
repeatable = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def line(**changes: Any) -> bytes:
    return json.dumps({**GOOD, "id": "bad", **changes}).encode() + b"\n"


def refusal(path: Path, content: bytes, *, labelled: bool = True) -> str:
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read_rows(path, labelled=labelled)
    message = str(caught.value)
    assert "\n" not in message
    assert message.isascii()
    return message


def test_a_good_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line(passage="P.", title="ignored"))
    first, second = read_rows(path)
    assert first == Row(id="r1", question="Which?", choices=("a", "b", "c", "d"), answer=1)
    assert second == Row(id="bad", question="Which?", choices=("a", "b", "c", "d"), answer=1, passage="P.")
    assert (first.target, first.where, second.where) == (1, f"{path}:1", f"{path}:2")


def test_gzip_and_a_last_line_without_newline(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(TEXT).encode()))
    assert read_rows(path) == [TextRow(id="t1", text="It rains.", text_pair="It is wet.", label=1)]


@pytest.mark.property("D01")
@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (line()[:-20] + b"\n", "not one JSON object"),
        (line()[:-2] + b",}\n", "not one JSON object"),
        (line()[:-1] + b",\n", "Extra data"),
        (line()[:-1] + line(), "Extra data"),
        (b"\xef\xbb\xbf" + line(), "byte order mark"),
        (line()[:-1] + b"\r\n", "CRLF"),
        (b"\n", "blank line"),
        (b"  \t\n", "blank line"),
        (line().replace(b"Which", b"Wh\0ch"), "NUL"),
        (line().replace(b"Which", b"Wh\xffch"), "UTF-8"),
        (line().replace(b"Which", b"Wh\x01ch"), "Invalid control character"),
        (b'["a", "b"]\n', "found ['a', 'b'], expected one JSON object"),
        (b"null\n", "found None"),
        (b'{"id": "x", ' + line()[1:], "field 'id' is there twice"),
        (line(choices=[{"a": 1}])[:-1].replace(b'{"a": 1}', b'{"a": 1, "a": 2}') + b"\n", "twice"),
        (line().replace(b'"answer": 1', b'"answer": NaN'), "NaN is not JSON"),
        (line().replace(b'"answer": 1', b'"answer": ' + b"9" * 5000), "not one JSON object"),
        (b"[" * 200_000 + b"\n", "not one JSON object"),
        (b'{"id": "' + b"x" * LINE_LIMIT + b'"}\n', "more than 10,000,000 bytes"),
    ],
)
def test_a_malformed_line_is_refused(tmp_path: Path, bad: bytes, says: str) -> None:
    message = refusal(tmp_path / "rows.jsonl", json.dumps(GOOD).encode() + b"\n" + bad)
    assert f"{tmp_path / 'rows.jsonl'}:2: " in message
    assert says in message


@pytest.mark.property("D01")
def test_a_line_of_50_MB_is_refused_before_it_is_read_to_its_end(tmp_path: Path, figure: Callable[..., None]) -> None:
    """A line cut at the limit is held twice, in pieces and joined; the whole of this one would be five limits."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"id": "' + b"x" * 50_000_000 + b'"}\n')
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"rows\.jsonl:1: found a line of more than 10,000,000 bytes"):
            read_rows(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    figure("memory for a line of 50 MB, in limits of 10 MB", peak / LINE_LIMIT, at_most=3.0)


@pytest.mark.property("D01")
def test_a_line_of_very_many_fields_is_refused_in_time(tmp_path: Path, figure: Callable[..., None]) -> None:
    """In time proportional to the fields; comparing all with all would take minutes."""
    content = b'{"id": "a", ' + b", ".join(b'"k%d": 0' % i for i in range(60_000)) + b"}\n"
    started = time.process_time()
    assert "none of 'question', 'text', 'chosen', 'prompt'" in refusal(tmp_path / "rows.jsonl", content)
    assert "'k7' is there twice" in refusal(tmp_path / "rows.jsonl", content[:-2] + b', "k7": 1}\n')
    figure("seconds of processor for two lines of 60,000 fields", time.process_time() - started, at_most=5.0)


@pytest.mark.property("D01")
def test_a_bom_on_the_first_line_is_refused(tmp_path: Path) -> None:
    assert "rows.jsonl:1: found a byte order mark" in refusal(tmp_path / "rows.jsonl", b"\xef\xbb\xbf" + line())


@pytest.mark.property("D01")
def test_an_extra_blank_last_line_is_refused(tmp_path: Path) -> None:
    assert "rows.jsonl:2: found a blank line" in refusal(tmp_path / "rows.jsonl", line() + b"\n")


@pytest.mark.property("D01")
@pytest.mark.parametrize("cut", [5, 40, -9, -1])
def test_a_truncated_gzip_is_refused(tmp_path: Path, cut: int) -> None:
    packed = gzip.compress(b"".join(line(id=f"r{i}") for i in range(50)))
    assert "cannot be read" in refusal(tmp_path / "rows.jsonl.gz", packed[:cut])


@pytest.mark.property("D01")
def test_a_file_that_is_not_gzip_missing_or_empty_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refusal(tmp_path / "rows.jsonl.gz", line())
    assert "found no rows" in refusal(tmp_path / "rows.jsonl", b"")
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read.*No such file"):
        read_rows(tmp_path / "none.jsonl")


@pytest.mark.property("D02")
@pytest.mark.parametrize(
    ("answer", "found"),
    [(None, "None"), ("", "''"), ("B", "'B'"), ("1", "'1'"), ([1], "[1]"), (1.0, "1.0"), (True, "True")],
)
def test_a_label_of_the_wrong_type_is_refused(tmp_path: Path, answer: object, found: str) -> None:
    message = refusal(tmp_path / "rows.jsonl", line(answer=answer))
    expected = f"rows.jsonl:1 (id bad): field 'answer': found {found}, expected a whole number, counted from 0"
    assert f"{expected}; fix or remove the row" in message


@pytest.mark.property("D02")
@pytest.mark.parametrize(("label", "found"), [(True, "True"), (1.0, "1.0"), (["a"], "['a']"), (None, "None")])
def test_a_label_that_is_neither_a_number_nor_a_text_is_refused(tmp_path: Path, label: object, found: str) -> None:
    message = refusal(tmp_path / "rows.jsonl", json.dumps({**TEXT, "label": label}).encode())
    assert f"(id t1): field 'label': found {found}, expected a whole number, counted from 0, or a string" in message


def test_a_label_may_be_a_text_but_not_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps({**TEXT, "label": "positive"}).encode())
    assert [row.target for row in read_rows(path)] == ["positive"]
    empty = refusal(path, json.dumps({**TEXT, "label": " "}).encode())
    assert "(id t1): field 'label': found only blanks" in empty


def test_text_labels_and_numbers_in_one_file_are_refused_with_both_places(tmp_path: Path) -> None:
    rows = [{**TEXT, "label": "positive"}, {**TEXT, "id": "t2", "label": None}, {**TEXT, "id": "t3", "label": 1}]
    path = tmp_path / "rows.jsonl"
    message = refusal(path, "\n".join(map(json.dumps, rows)).encode(), labelled=False)
    assert f"{path}:3 (id t3): field 'label': found 1, expected a string, as 'positive' of {path}:1" in message


@pytest.mark.property("D02")
def test_a_missing_label_is_refused_unless_unlabelled_rows_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    unlabelled = {key: value for key, value in GOOD.items() if key != "answer"}
    assert "field 'answer': found nothing" in refusal(path, json.dumps(unlabelled).encode())
    assert [row.target for row in read_rows(path, labelled=False)] == [None]
    path.write_bytes(line(answer=None))
    assert [row.target for row in read_rows(path, labelled=False)] == [None]
    assert "found 'B'" in refusal(path, line(answer="B"), labelled=False)


@pytest.mark.property("D03")
@pytest.mark.parametrize("answer", [7, 4, -1])
def test_a_label_out_of_range_is_refused(tmp_path: Path, answer: int) -> None:
    message = refusal(tmp_path / "rows.jsonl", line(answer=answer))
    assert f"rows.jsonl:1 (id bad): field 'answer': found {answer}, expected 0..3 (4 choices)" in message


@pytest.mark.property("D03")
def test_a_negative_class_is_refused(tmp_path: Path) -> None:
    row = json.dumps({**TEXT, "label": -1}).encode()
    assert "(id t1): field 'label': found -1, expected 0 or more" in refusal(tmp_path / "rows.jsonl", row)


@pytest.mark.property("D04")
@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ([], "found 0 choices, expected 2 to 26"),
        (["a"], "found 1 choices"),
        ([f"c{i}" for i in range(27)], "found 27 choices"),
        (["a", 2, "c"], "found 2 among the choices"),
        (["a", None], "found None among the choices"),
        (["a", ["b"]], "found ['b'] among the choices"),
        (["a", ""], "found empty text"),
        (["a", " \t"], "found only blanks"),
        ("abcd", "found 'abcd', expected a list of texts"),
        (None, "found None, expected a list of texts"),
        ({"a": 1}, "found {'a': 1}, expected a list"),
        (["x", "b", "c", "b"], "found the answer 'b' twice"),
    ],
)
def test_bad_choices_are_refused(tmp_path: Path, choices: object, says: str) -> None:
    message = refusal(tmp_path / "rows.jsonl", line(choices=choices))
    assert "rows.jsonl:1 (id bad): field 'choices': " in message
    assert says in message


@pytest.mark.property("D04")
def test_a_wrong_choice_may_repeat_as_in_published_data(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line(choices=["sky", "roots", "sky", "leaves"], answer=3))
    assert len(read_rows(tmp_path / "rows.jsonl")) == 1


@pytest.mark.property("D04")
def test_the_26th_choice_is_still_one(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(line(choices=[f"c{i}" for i in range(26)], answer=25))
    assert read_rows(tmp_path / "rows.jsonl")[0].target == 25


@pytest.mark.property("D05")
@pytest.mark.parametrize("name", ["question", "passage", "id"])
@pytest.mark.parametrize("value", ["", "   ", "\n\u2003", 3, ["x"]])
def test_empty_texts_and_texts_that_are_none_are_refused(tmp_path: Path, name: str, value: object) -> None:
    assert f": field '{name}': found " in refusal(tmp_path / "rows.jsonl", line(**{name: value}))


@pytest.mark.property("D05")
@pytest.mark.parametrize("name", ["id", "text", "text_pair"])
def test_empty_sentences_are_refused(tmp_path: Path, name: str) -> None:
    row = json.dumps({**TEXT, name: " "}).encode()
    assert f": field '{name}': found only blanks" in refusal(tmp_path / "rows.jsonl", row)


@pytest.mark.property("D07")
@pytest.mark.parametrize("name", ["id", "question", "choices", "passage"])
@pytest.mark.parametrize(("text", "says"), [("a\ud800b", "a lone surrogate at character 1"), ("a\0b", "a NUL")])
def test_text_that_cannot_be_written_is_refused(tmp_path: Path, name: str, text: str, says: str) -> None:
    message = refusal(tmp_path / "rows.jsonl", line(**{name: ["x", text] if name == "choices" else text}))
    assert f"field '{name}': found {says}" in message


@pytest.mark.property("D07")
@repeatable
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip))
def test_any_other_text_round_trips(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("text") / "rows.jsonl"
    for ascii_only in (True, False):
        fields = {**GOOD, "question": text, "passage": "\u2028é e\u0301 👩‍🚀 \u202e" + text}
        path.write_bytes(json.dumps(fields, ensure_ascii=ascii_only).encode())
        (row,) = read_rows(path)
        assert isinstance(row, Row)
        assert (row.question, row.passage) == (text, fields["passage"])


@pytest.mark.property("D08")
def test_a_repeated_id_is_refused_with_both_places(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    message = refusal(path, line() + line(id="other") + line(question="Another?"))
    assert f"{path}:3 (id bad): field 'id': found the id of {path}:1 again" in message


@pytest.mark.property("D08")
@pytest.mark.parametrize("row_id", [17, 1.5, None, True, ["r"]])
def test_ids_are_texts(tmp_path: Path, row_id: object) -> None:
    assert "field 'id': found " in refusal(tmp_path / "rows.jsonl", line(id=row_id))


def test_rows_of_two_kinds_in_a_file_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path / "rows.jsonl", line() + json.dumps(TEXT).encode())
    assert "rows.jsonl:2 (id t1): field 'text': found a sentence row after the multiple-choice row" in message


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        ({"id": "r"}, "none of 'question', 'text', 'chosen', 'prompt'"),
        ({**GOOD, "text": "both"}, "'question' and 'text'"),
        ({**TEXT, "rejected": "both"}, "'text' and 'chosen'"),
    ],
)
def test_a_row_of_no_kind_or_several_is_refused(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(DataError, match=f": found {found}, expected one of them"):
        parse_row(fields, where="file:1")


def test_a_row_made_in_code_is_checked_too() -> None:
    with pytest.raises(DataError, match=r"^row \(id r\): field 'answer': found 2, expected 0\.\.1 \(2 choices\)"):
        Row(id="r", question="Which?", choices=("a", "b"), answer=2)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters()),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.property("D01")
@repeatable
@given(st.dictionaries(st.sampled_from([*GOOD, *TEXT, "passage"]), json_values), st.booleans())
def test_any_object_gives_a_row_or_a_data_error(fields: dict[str, Any], labelled: bool) -> None:
    try:
        row = parse_row(fields, where="file:1", labelled=labelled)
    except DataError as error:
        assert str(error).startswith("file:1 (id ")
        assert str(error).isascii()
    else:
        assert row.target is not None or not labelled


@pytest.mark.property("D01")
@repeatable
@given(st.binary(max_size=200))
def test_any_bytes_give_rows_or_a_data_error(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("bytes") / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match="rows.jsonl"):
        read_rows(path)
