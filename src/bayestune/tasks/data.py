"""A strict reader of rows in JSON Lines: a line that is not exactly a row is an error that names line, id and field.

One row is one JSON object on one line, UTF-8, ended by a newline. Multiple choice:
`{"id", "question", "choices": [str, ...], "answer": int, "passage"?: str}`; sentences:
`{"id", "text", "text_pair"?: str, "label": int | str}`; numbers: `"target": float | [float, ...]` instead of
`label`; preferences: `{"id", "prompt"?: str, "chosen", "rejected"}`; prompts:
`{"id", "prompt": str | "messages": [...], "answer": str}`. Other fields, such as `title`, are ignored. Nothing is
skipped, repaired or cut.
"""

import gzip
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bayestune.errors import DataError
from bayestune.tasks.preference_rows import PreferenceRow
from bayestune.tasks.prompted import PromptRow
from bayestune.tasks.rows import AnyRow, Fields, NumberRow, Row, TextRow, fault, shown

_KINDS = {str: "a string", int: "a whole number", float: "a number", tuple: "a list of numbers"}
FORMATS: tuple[type[AnyRow], ...] = (Row, TextRow, NumberRow, PreferenceRow, PromptRow)
"""The row classes that data sets can have."""
LINE_LIMIT = 10_000_000
"""The largest number of bytes in a line; a longer line is a broken file rather than a row."""


def read_rows(path: str | Path, *, labelled: bool = True, formats: Sequence[type[AnyRow]] = FORMATS) -> list[Any]:
    """Read one `.jsonl` or `.jsonl.gz` file.

    Args:
        path: the file. Its rows and their labels must all be of one kind, and their ids must differ.
        labelled: whether every row must have its `answer` or `label`; if not, it may be absent or null.
        formats: the row classes to expect, such as those of your own task.

    Raises:
        DataError: the file cannot be read, or a row is invalid; the message names file, line, id and field.
    """
    rows = []
    for row in scan_rows(path, labelled=labelled, formats=formats):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: found no rows, expected one JSON object per line; check the path")
    check_together(rows)
    return rows


def scan_rows(
    path: str | Path, *, labelled: bool = True, formats: Sequence[type[AnyRow]] = FORMATS
) -> Iterator[Any | DataError]:
    """Yield each row of a file, or the error of a line that is not a row. Ids and kinds of rows are not compared.

    Raises:
        DataError: the file cannot be read.
    """
    for number, line in _lines(Path(path)):
        where = f"{path}:{number}"
        try:
            row = parse_row(_parse_line(line, where), where=where, labelled=labelled, formats=formats)
        except DataError as error:
            yield error
        else:
            yield row


def check_together(rows: Sequence[AnyRow]) -> None:
    """Raise a DataError that names both places if two rows share an id or are not of the same kind."""
    seen: dict[str, AnyRow] = {}
    for row in rows:
        if row.id in seen:
            raise row.fault("id", f"the id of {seen[row.id].where or 'an earlier row'} again", "ids that differ")
        seen[row.id] = row
    check_kinds(rows)
    check_labels(rows)


def check_kinds(rows: Sequence[AnyRow]) -> None:
    """Raise a DataError that names both places if two rows are not of the same class."""
    for row in rows:
        if type(row) is not type(rows[0]):
            found = f"a {row.noun} row after the {rows[0].noun} row of {rows[0].where}"
            raise row.fault(row.marks[-1], found, "rows of one kind")


def check_labels(rows: Sequence[AnyRow]) -> None:
    """Raise a DataError that names both places if two labels are of different types, such as texts and numbers."""
    labelled = [row for row in rows if row.target is not None]
    for row in labelled:
        first = labelled[0]
        if type(row.target) is not type(first.target):
            wanted = _KINDS[type(first.target)]
            expected = f"{wanted}, as {shown(first.target)} of {first.where}"
            raise row.fault(row.target_field, shown(row.target), expected)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of every line. Only newlines end a line, so U+2028 and the like stay inside their row."""
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
    """Return the JSON object of one line; anything before or after it, or a repeated field, is an error."""
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


def parse_row(
    values: dict[str, Any], *, where: str, labelled: bool = True, formats: Sequence[type[AnyRow]] = FORMATS
) -> AnyRow:
    """Return the row that one JSON object holds.

    Raises:
        DataError: the row is invalid; the message names `where`, the id and the field.
    """
    marked = [each for each in formats if len(formats) == 1 or not values.keys().isdisjoint(each.marks)]
    known = {name for each in marked for name in each.also}  # fields that are optional in another kind of row
    found = [each for each in marked if not values.keys() & set(each.marks) <= known] or marked
    if len({each.marks for each in found}) != 1:
        marks = list(dict.fromkeys(f"'{each.marks[0]}'" for each in found or formats))
        problem = " and ".join(marks) if found else f"none of {', '.join(marks)}"
        raise fault(where, values.get("id"), formats[0].marks[0], problem, "one of them")
    kind = next((each for each in found if each.target_field in values), found[0])
    return kind.from_fields(Fields(values, where, labelled))


def formats_of(kind: type[AnyRow]) -> tuple[type[AnyRow], ...]:
    """Return the row classes to expect in a data set of `kind`: no other class with the same marks."""
    alike = [each for each in FORMATS if each.marks == kind.marks and each is not kind]
    return tuple(each for each in FORMATS if each not in alike) if kind in FORMATS else (kind,)
