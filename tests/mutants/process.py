"""What the process of one planted defect does."""

import contextlib
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
RETURNED = 100
"""Added to what pytest returns, so that a process that dies in another way does not look like a failing test."""


def run(name: str, tests: str, select: str, output: str) -> None:
    """Run `tests` with the defect `name`, print to the file `output`, and exit with `RETURNED` and pytest's code."""
    command = ["-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-p", "mutants.plugin", "--defect", name]
    command += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of pytest plugins that were preloaded
    command += [str(ROOT / "tests" / tests), *(["-k", select] if select else [])]
    os.chdir(ROOT)
    os.environ["COLUMNS"] = "240"  # for the line that says why a test failed
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = pytest.main(command)
    sys.exit(RETURNED + code)
