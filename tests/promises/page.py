"""`docs/properties.md` from the record of the test runs."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from promises.listed import PROMISES
from promises.promise import Promise
from promises.results import strain

GROUPS = {
    "S": "Statistical",
    "N": "Numerical",
    "P": "Persistence",
    "D": "Data",
    "R": "Runtime",
    "X": "Security",
    "K": "Soak and concurrency",
}
_HEAD = """\
# Properties

What bayestune promises, and whether its tests hold. `make properties` makes this page from the reports of the tests;
the promises and notes are in `tests/promises/listed.py`. "Worst" is the measured figure closest to its bound.
`pytest -k S01` runs the tests of S01, and results/properties.json lists them all with their figures.
"""


def page(record: Mapping[str, Any]) -> str:
    """Return the page, in Markdown."""
    lines = [_HEAD, _summary(record), ""]
    for letter, group in groupby(PROMISES, key=lambda promise: promise.id[0]):
        promises = list(group)
        lines += [f"## {GROUPS[letter]}", "", "| id | promise | held | worst | bound |", "|---|---|---|---|---|"]
        lines += [_line(promise, record["tests"].get(promise.id, {})) for promise in promises]
        lines += ["", *(f"- **{promise.id}**: {promise.note}" for promise in promises if promise.note), ""]
    return "\n".join(lines).rstrip() + "\n"


def state(tests: Mapping[str, Any]) -> str:
    """Return what the tests of one promise show: "held", "broken", "not run" or "no test"."""
    if not tests:
        return "no test"
    if any(test["failed"] for test in tests.values()):
        return "broken"
    return "held" if any(test["passed"] for test in tests.values()) else "not run"


def _summary(record: Mapping[str, Any]) -> str:
    states = [state(record["tests"].get(promise.id, {})) for promise in PROMISES]
    counts = ", ".join(f"{states.count(name)} {name}" for name in ("held", "broken", "not run", "no test"))
    where = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"Of {len(PROMISES)} promises: {counts}. Run on {record['date']} with {where}."


def _line(promise: Promise, tests: Mapping[str, Any]) -> str:
    figures = [figure for test in tests.values() for figure in test["figures"]]
    worst, bound = _figure(max(figures, key=strain)) if figures else ("", "")
    held = {"held": "yes", "broken": "**no**"}.get(state(tests), state(tests))
    return f"| {promise.id} | {promise.says} | {held} | {worst} | {bound} |"


def _figure(figure: Mapping[str, Any]) -> tuple[str, str]:
    """Return the figure with its name, and its bound."""
    bound = f"<= {figure['at_most']:.3g}" if figure["at_most"] is not None else f">= {figure['at_least']:.3g}"
    return f"{figure['value']:.3g} ({figure['what']})".replace("|", "\\|"), bound
