"""From the reports of test runs (JUnit XML, as pytest writes it) to one record of what was tested and measured."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree


def collect(reports: Iterable[Path]) -> dict[str, Any]:
    """``{id: {"file::test": {"tier", "passed", "failed", "skipped": [reasons], "figures": [...]}}}``.

    The cases of a parametrized test are counted together. Of the figures with one name, the worst is kept: the one
    closest to its bound, or furthest past it.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            file = f"{case.get('classname', '').replace('.', '/')}.py"
            test = f"{file}::{case.get('name', '').partition('[')[0]}"
            for promise in _values(case, "property"):
                new = {"tier": "", "passed": 0, "failed": 0, "skipped": [], "figures": []}
                _count(found.setdefault(promise, {}).setdefault(test, new), case)
    return {promise: dict(sorted(tests.items())) for promise, tests in sorted(found.items())}


def _values(case: ElementTree.Element, name: str) -> list[str]:
    """The values of all user properties with this name."""
    return [entry.get("value", "") for entry in case.iter("property") if entry.get("name") == name]


def _count(test: dict[str, Any], case: ElementTree.Element) -> None:
    (test["tier"],) = _values(case, "tier")
    skipped = case.find("skipped")
    if skipped is not None:
        reason = skipped.get("message", "")
        test["skipped"] = sorted({*test["skipped"], reason})
    elif case.find("failure") is not None or case.find("error") is not None:
        test["failed"] += 1
    else:
        test["passed"] += 1
    figures = {figure["what"]: figure for figure in test["figures"]}
    for figure in map(json.loads, _values(case, "figure")):
        figures[figure["what"]] = max(figure, figures.get(figure["what"], figure), key=strain)
    test["figures"] = [figures[what] for what in sorted(figures)]


def strain(figure: dict[str, Any]) -> float:
    """How near to its bound a figure came; 1 is on it."""
    value, most, least = (figure[name] for name in ("value", "at_most", "at_least"))
    if most is not None:
        return value / most if most else value
    return least / value if value else float("inf")
