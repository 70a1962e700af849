"""From the reports of test runs (JUnit XML, as pytest writes it) to one record of what was tested and measured."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

_NAME = re.compile(r"test_([SNPDRXK]\d\d)[a-z]?_")


def id_of(name: str) -> str | None:
    """The promise that a test called `name` is about; None for any other test."""
    found = _NAME.match(name)
    return found[1] if found else None


def collect(reports: Iterable[Path]) -> dict[str, Any]:
    """``{id: {test: {"file", "tier", "passed", "failed", "skipped": [reasons], "figures": [...]}}}``.

    The cases of a parametrised test are counted together. Of figures with the same name the worst is kept: the one
    that comes nearest to its bound, or past it.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("name", "").partition("[")[0]
            promise = id_of(name)
            if promise is not None:
                place = f"{case.get('classname', '').replace('.', '/')}.py"
                new = {"file": place, "tier": "", "passed": 0, "failed": 0, "skipped": [], "figures": []}
                _count(found.setdefault(promise, {}).setdefault(name, new), case)
    return {promise: dict(sorted(tests.items())) for promise, tests in sorted(found.items())}


def _count(test: dict[str, Any], case: ElementTree.Element) -> None:
    properties = [(p.get("name"), p.get("value", "")) for p in case.iter("property")]
    test["tier"] = next(value for name, value in properties if name == "tier")
    skipped = case.find("skipped")
    if skipped is not None:
        reason = skipped.get("message", "")
        test["skipped"] = sorted({*test["skipped"], reason})
    elif case.find("failure") is not None or case.find("error") is not None:
        test["failed"] += 1
    else:
        test["passed"] += 1
    figures = {figure["what"]: figure for figure in test["figures"]}
    for figure in (json.loads(value) for name, value in properties if name == "figure"):
        figures[figure["what"]] = max(figure, figures.get(figure["what"], figure), key=_strain)
    test["figures"] = [figures[what] for what in sorted(figures)]


def _strain(figure: dict[str, Any]) -> float:
    """How near to its bound a figure came; 1 is on it."""
    value, most, least = (figure[name] for name in ("value", "at_most", "at_least"))
    if most is not None:
        return value / most if most else value
    return least / value if value else float("inf")
