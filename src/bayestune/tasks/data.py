"""The strict reader of rows in JSON Lines: what is not exactly a row is refused, with file, line, id and field.

One row is one JSON object on one line, UTF-8, ended by a newline. Multiple choice:
`{"id", "question", "choices": [str, ...], "answer": int, "passage"?: str}`; sentences:
`{"id", "text", "text_pair"?: str, "label": int | str}`. Other fields (`title`, say) are ignored. Nothing is skipped,
repaired or cut.
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
from bayestune.tasks.rows import AnyDataRow, Row, TextRow, fault, shown

LINE_LIMIT = 10_000_000
"""Bytes a line may have; longer ones are a broken file rather than a row."""


def read_rows(path: str | Path, *, labelled: bool = True) -> list[AnyDataRow]:
    """Read one `.jsonl` or `.jsonl.gz` file.

    Args:
        path: the file. Its rows and their labels are all of one kind, and their ids differ.
        labelled: whether every row must have its `answer` or `label`; where not, it may be absent or null.

    Raises:
        DataError: naming file, line, id and field of the first thing that is wrong.
    """
    rows = []
    for row in scan_rows(path, labelled=labelled):
        if isinstance(row, DataError):
            raise row
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: found no rows, expected one JSON object a line; check the path")
    check_together(rows)
    return rows


def scan_rows(path: str | Path, *, labelled: bool = True) -> Iterator[AnyDataRow | DataError]:
    """Yield each row of a file, or the error of a line that is not one. Ids and kinds are not compared.

    Raises:
        DataError: the file cannot be read.
    """
    for number, line in _lines(Path(path)):
        where = f"{path}:{number}"
        try:
            row = parse_row(_parse_line(line, where), where=where, labelled=labelled)
        except DataError as error:
            yield error
        else:
            yield row


def check_together(rows: Sequence[AnyDataRow]) -> None:
    """Refuse rows that share an id, or are not all of one kind, with the places of both."""
    seen: dict[str, AnyDataRow] = {}
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
    check_labels(rows)


def check_labels(rows: Sequence[AnyDataRow]) -> None:
    """Refuse labels that are texts in some rows and numbers in others, with the places of both."""
    labelled = [row for row in rows if row.target is not None]
    for row in labelled:
        first = labelled[0]
        if type(row.target) is not type(first.target):
            wanted = "a text" if isinstance(first.target, str) else "a whole number"
            expected = f"{wanted}, as {shown(first.target)} of {first.where}"
            raise row.fault(row.target_field, shown(row.target), expected)


def _kind(row: AnyDataRow) -> str:
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


def parse_row(fields: dict[str, Any], *, where: str, labelled: bool = True) -> AnyDataRow:
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


def _label(fields: dict[str, Any], name: str, where: str, labelled: bool) -> Any:
    """A whole number, or None if `labelled` is false; a `label` may also be a text."""
    value, named = fields.get(name), name == "label"
    if value is None and not labelled:
        return None
    if type(value) is int or (named and isinstance(value, str)):  # a bool is an int to isinstance, and no label
        return value
    expected = f"a whole number, counted from 0{', or a text' if named else ''}"
    raise fault(where, fields.get("id"), name, _found(fields, name), expected)
