"""The page of properties is that of the record, and every promise has tests under its id, or a note."""

import ast
import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from promises.__main__ import PAGE, RECORD
from promises.listed import PROMISES
from promises.page import GROUPS, page, state
from promises.results import collect

TESTS = Path(__file__).parent


def marked() -> dict[str, set[str]]:
    """The ids that each test is marked with, by file and name."""
    found = {}
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                marks = [d for d in node.decorator_list if ast.unparse(d).startswith("pytest.mark.property(")]
                name = f"{path.relative_to(TESTS.parent).as_posix()}::{node.name}"
                found[name] = {ast.literal_eval(mark.args[0]) for mark in marks if isinstance(mark, ast.Call)}
    return found


def test_ids_are_distinct_and_of_a_known_group() -> None:
    ids = [promise.id for promise in PROMISES]
    assert len(set(ids)) == len(ids)
    assert {i[0] for i in ids} == set(GROUPS)
    assert ids == sorted(ids, key=lambda i: ("SNPDRXK".index(i[0]), i))


def test_every_promise_has_tests_and_every_id_a_promise() -> None:
    assert set().union(*marked().values()) == {promise.id for promise in PROMISES}


def test_the_page_is_made_from_the_record() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert PAGE.read_text(encoding="utf-8") == page(record)
    assert all(state(tests) != "broken" for tests in record["tests"].values())


def test_a_report_becomes_a_record(tmp_path: Path, figure: Any) -> None:
    """Cases are counted together, and the figure nearest to its bound is kept."""

    def case(name: str, *figures: dict[str, Any], ids: str = "", result: str = "") -> str:
        values = [
            ("tier", "commit"),
            *(("property", i) for i in ids.split()),
            *(("figure", json.dumps(value).replace('"', "&quot;")) for value in figures),
        ]
        properties = "".join(f'<property name="{n}" value="{v}"/>' for n, v in values)
        inside = f"<properties>{properties}</properties>{result}"
        return f'<testcase classname="tests.test_x" name="{name}">{inside}</testcase>'

    small, large = ({"what": "error", "value": v, "at_most": 1.0, "at_least": None} for v in (0.1, 0.5))
    cases = [
        case("test_a[1]", small, ids="S01"),
        case("test_a[2]", large, ids="S01"),
        case("test_a[3]", ids="S01", result='<skipped message="no GPU"/>'),
        case("test_b", ids="S02 S03", result='<failure message="no"/>'),
        case("test_of_something_else"),
    ]
    report = tmp_path / "report.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    ElementTree.parse(report)
    found = collect([report])
    assert found.keys() == {"S01", "S02", "S03"} and found["S02"] == found["S03"]
    assert found["S01"].keys() == {"tests/test_x.py::test_a"}
    (one,), (two,) = found["S01"].values(), found["S02"].values()
    assert one == {"tier": "commit", "passed": 2, "failed": 0, "skipped": ["no GPU"],
                   "figures": [large]}  # fmt: skip
    assert (state(found["S01"]), state(found["S02"]), state({})) == ("held", "broken", "no test")
    assert two["failed"] == 1


def test_a_figure_is_held_to_its_bound(figure: Any) -> None:
    figure("one", 1.0, at_most=1.0)
    figure("one", 1.0, at_least=1.0)
    for bad in ({"at_most": 0.5}, {"at_least": 2.0}):
        with pytest.raises(AssertionError, match="one: found 1"):
            figure("one", 1.0, **bad)
    with pytest.raises(AssertionError, match="nan"):
        figure("one", float("nan"), at_most=1.0)
