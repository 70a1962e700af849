"""Rows and the strict reader of JSON Lines: what is not exactly a row is refused, with file, line, id and field.

One row is one JSON object on one line, UTF-8, ended by a newline. Multiple choice:
`{"id", "question", "choices": [str, ...], "answer": int, "passage"?: str}`; sentences:
`{"id", "text", "text_pair"?: str, "label": int}`. Other fields (`title`, say) are ignored. Nothing is skipped,
repaired or cut.
"""

import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayestune.errors import DataError

LINE_LIMIT = 10_000_000
"""Bytes a line may have; longer ones are a broken file rather than a row."""
MAX_CHOICES = 26
"""One for each of the letters A to Z."""


def shown(value: object) -> str:
    """A value as an error message shows it: ASCII only (safe on any console), at most 60 characters."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def fault(where: str, row_id: object, name: str, found: str, expected: str) -> DataError:
    """The error of one field of one row: `where` is `file:line`, or empty for a row made in code."""
    place = f"{where or 'row'} (id {shown(row_id).strip(chr(39))})"
    return DataError(f"{place}: field '{name}': found {found}, expected {expected}; fix or remove the row")


def _check_text(row: "AnyRow", name: str, text: str) -> None:
    if not text.strip():
        raise fault(row.where, row.id, name, "empty text" if not text else "only blanks", "some text")
    if "\0" in text:
        raise fault(row.where, row.id, name, "a NUL character", "text without NUL")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise fault(row.where, row.id, name, f"a lone surrogate at character {error.start}", "Unicode") from error


@dataclass(frozen=True, kw_only=True)
class Row:
    """One multiple-choice question.

    `answer` indexes `choices` from 0; None means unlabelled. `where` says where the row was read (`file:line`) and
    takes no part in comparison. Raises DataError for an empty or invalid text, fewer than 2 or more than 26 choices,
    an answer out of range, or an answer whose text is also another choice's. (Published data repeat *wrong* choices
    here and there: these rows are accepted as they are.)
    """

    id: str
    question: str
    choices: tuple[str, ...]
    answer: int | None
    passage: str | None = None
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_text(self, "id", self.id)
        _check_text(self, "question", self.question)
        if self.passage is not None:
            _check_text(self, "passage", self.passage)
        if not 2 <= len(self.choices) <= MAX_CHOICES:
            raise self.fault("choices", f"{len(self.choices)} choices", f"2 to {MAX_CHOICES}")
        for choice in self.choices:
            _check_text(self, "choices", choice)
        if self.answer is None:
            return
        if not 0 <= self.answer < len(self.choices):
            raise self.fault("answer", str(self.answer), f"0..{len(self.choices) - 1} ({len(self.choices)} choices)")
        if self.choices.count(self.choices[self.answer]) > 1:
            raise self.fault(
                "choices", f"the answer {shown(self.choices[self.answer])} twice", "an answer unlike the other choices"
            )

    @property
    def target(self) -> int | None:
        """The class index, or None when unlabelled."""
        return self.answer

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        passage = [] if self.passage is None else [("passage", self.passage)]
        return [("question", self.question), *passage, *(("choices", choice) for choice in self.choices)]

    def fault(self, name: str, found: str, expected: str) -> DataError:
        """The error that names this row and one of its fields."""
        return fault(self.where, self.id, name, found, expected)


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """One sentence, or pair of sentences, with a class from 0, or None when unlabelled. Raises DataError as `Row`."""

    id: str
    text: str
    text_pair: str | None = None
    label: int | None = None
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        _check_text(self, "id", self.id)
        _check_text(self, "text", self.text)
        if self.text_pair is not None:
            _check_text(self, "text_pair", self.text_pair)
        if self.label is not None and self.label < 0:
            raise self.fault("label", str(self.label), "0 or more")

    @property
    def target(self) -> int | None:
        """The class index, or None when unlabelled."""
        return self.label

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Every text that is put to a model, each after the name of its field."""
        return [("text", self.text), *([] if self.text_pair is None else [("text_pair", self.text_pair)])]

    def fault(self, name: str, found: str, expected: str) -> DataError:
        """The error that names this row and one of its fields."""
        return fault(self.where, self.id, name, found, expected)


AnyRow = Row | TextRow


def read_rows(path: str | Path, *, labelled: bool = True) -> list[AnyRow]:
    """Read one `.jsonl` or `.jsonl.gz` file.

    Args:
        path: the file. Its rows are all of one kind, and their ids differ.
        labelled: whether every row must have its `answer` or `label`; where not, it may be absent or null.

    Raises:
        DataError: naming file, line, id and field of the first thing that is wrong.
    """
    path = Path(path)
    rows = [
        parse_row(_parse_line(line, f"{path}:{number}"), where=f"{path}:{number}", labelled=labelled)
        for number, line in _lines(path)
    ]
    if not rows:
        raise DataError(f"{path}: found no rows, expected one JSON object a line; check the path")
    check_together(rows)
    return rows


def check_together(rows: Sequence[AnyRow]) -> None:
    """Refuse rows that share an id, or are not all of one kind, with the places of both."""
    seen: dict[str, AnyRow] = {}
    for row in rows:
        if row.id in seen:
            raise row.fault("id", f"the id of {seen[row.id].where or 'an earlier row'} again", "ids that differ")
        if type(row) is not type(rows[0]):
            raise row.fault(
                "choices" if isinstance(row, Row) else "text",
                f"a {_kind(row)} row after the {_kind(rows[0])} row of {rows[0].where}",
                "rows of one kind",
            )
        seen[row.id] = row


def _kind(row: AnyRow) -> str:
    return "multiple-choice" if isinstance(row, Row) else "sentence"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of every line; ends at newlines only, so that U+2028 and such stay inside their row."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number in itertools.count(1):
                line = file.readline(LINE_LIMIT + 1)
                if not line:
                    return
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}; check the path and that the file is whole") from error


def _parse_line(line: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line, with nothing before, after or twice in it."""
    problem = None
    if len(line) > LINE_LIMIT:
        problem = f"a line of more than {LINE_LIMIT:,} bytes"
    elif line.startswith(b"\xef\xbb\xbf"):
        problem = "a byte order mark (BOM); save the file as UTF-8 without one"
    elif line.endswith(b"\r\n"):
        problem = "a CRLF line end; convert the file to LF (\\n) line ends"
    elif not line.strip():
        problem = "a blank line"
    elif b"\0" in line:
        problem = "a NUL byte"
    if problem is not None:
        raise DataError(f"{where}: found {problem}, expected one JSON object; fix or remove the row")
    try:
        value = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: found byte {error.start} not in UTF-8; save the file as UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not one JSON object: {error}; fix or remove the row") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: found {shown(value)}, expected one JSON object {{...}}; fix or remove the row")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"field {shown(twice)} is there twice")
    return fields


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_row(fields: dict[str, Any], *, where: str, labelled: bool = True) -> AnyRow:
    """A row from the fields of one JSON object; types are checked here, values by the row itself.

    Raises:
        DataError: naming `where`, the id and the field.
    """
    row_id = fields.get("id")
    if ("question" in fields or "choices" in fields) == ("text" in fields):
        found = "both" if "text" in fields else "neither"
        raise fault(where, row_id, "question", f"{found} of 'question' and 'text'", "one of them")
    if "text" in fields:
        return TextRow(
            id=_string(fields, "id", where),
            text=_string(fields, "text", where),
            text_pair=_string(fields, "text_pair", where) if fields.get("text_pair") is not None else None,
            label=_label(fields, "label", where, labelled),
            where=where,
        )
    choices = fields.get("choices")
    if not isinstance(choices, list):
        raise fault(where, row_id, "choices", _found(fields, "choices"), "a list of texts")
    for choice in choices:
        if not isinstance(choice, str):
            raise fault(where, row_id, "choices", f"{shown(choice)} among the choices", "a list of texts")
    return Row(
        id=_string(fields, "id", where),
        question=_string(fields, "question", where),
        choices=tuple(choices),
        answer=_label(fields, "answer", where, labelled),
        passage=_string(fields, "passage", where) if fields.get("passage") is not None else None,
        where=where,
    )


def _found(fields: dict[str, Any], name: str) -> str:
    return shown(fields[name]) if name in fields else "nothing"


def _string(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise fault(where, fields.get("id"), name, _found(fields, name), "a text")
    return value


def _label(fields: dict[str, Any], name: str, where: str, labelled: bool) -> int | None:
    value = fields.get(name)
    if value is None and not labelled:
        return None
    if type(value) is not int:  # a bool is an int to isinstance, and no label
        raise fault(where, fields.get("id"), name, _found(fields, name), "a whole number, counted from 0")
    return value
