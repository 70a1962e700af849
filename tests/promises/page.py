"""`docs/properties.md` from the record of the test runs."""

from collections.abc import Mapping
from itertools import groupby
from typing import Any

from promises.listed import PROMISES
from promises.promise import Promise

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

What bayestune promises, and the tests that show it. Made by `make properties` from the reports of the tests
themselves; nothing here is typed by hand but the promises and the notes, in `tests/promises/listed.py`.

Tier "commit" is `make test`, "nightly" `make test-nightly` (with seeds that change from day to day), "gpu" needs a
GPU and is skipped without one. A figure is the worst of all cases of its test beside the bound that the test holds it
to. `make mutants` plants small defects, one at a time, and asks that these tests fail on each.
"""


def page(record: Mapping[str, Any]) -> str:
    """The page, in Markdown."""
    lines = [_HEAD, _summary(record), ""]
    for letter, group in groupby(PROMISES, key=lambda promise: promise.id[0]):
        lines += [f"## {GROUPS[letter]}", "", "| id | promise | tests | tier | bound and last figure |"]
        lines += ["|---|---|---|---|---|"]
        chosen = list(group)
        lines += [_line(promise, record["tests"].get(promise.id, {})) for promise in chosen]
        notes = [f"- **{promise.id}.** {promise.note}" for promise in chosen if promise.note]
        lines += ["", *(["Where a promise has limits:", "", *notes, ""] if notes else [])]
    return "\n".join(lines).rstrip() + "\n"


def state(tests: Mapping[str, Any]) -> str:
    """What the tests of one promise show: "held", "broken", "not run" or "no test"."""
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
    files: dict[str, int] = {}
    for test in tests:
        file = test.partition("::")[0]
        files[file] = files.get(file, 0) + 1
    places = "<br>".join(f"[{file.removeprefix('tests/')}](../{file}) ({count})" for file, count in files.items())
    tiers = ", ".join(sorted({test["tier"] for test in tests.values()}))
    reference = f" [{promise.id}: see below]" if promise.note else ""
    return (
        f"| {promise.id} | {promise.says}{reference} | {places or '-'} | {tiers or '-'} | {_found(promise, tests)} |"
    )


def _found(promise: Promise, tests: Mapping[str, Any]) -> str:
    figures = [_figure(figure) for test in tests.values() for figure in test["figures"]]
    passed = sum(test["passed"] for test in tests.values())
    skipped = sorted({reason for test in tests.values() for reason in test["skipped"]})
    parts = [] if figures else [promise.bound]
    parts += figures
    parts += [f"**{state(tests)}**" + (f", {passed} cases" if passed else "")]
    parts += [f"skipped: {reason}" for reason in skipped]
    return "<br>".join(part.replace("|", "\\|") for part in parts)


def _figure(figure: Mapping[str, Any]) -> str:
    bound = f"<= {figure['at_most']:.3g}" if figure["at_most"] is not None else f">= {figure['at_least']:.3g}"
    return f"{figure['what']}: {figure['value']:.3g} {bound}"
