"""The program under torchrun or `accelerate launch`: which commands run there, and which process prints."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence

from bayestune_cli.errors import INTERNAL, OK, STOPPED, USER, FlagError, fail

_TOGETHER = ("predict", "evaluate", "generate")
"""Commands whose rows the processes divide. The processes of `train` print for themselves."""


def process_count() -> int:
    """Return the number of processes that were launched, without importing torch."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def run_launched(invoke: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> int:
    """Run one command line in each process and return its exit code.

    Only the main process prints. It also prints an error of another process, unless it has the same error itself.
    """
    main, command = os.environ.get("RANK", "0") == "0", next((a for a in arguments if not a.startswith("-")), None)
    if command == "train":
        return invoke(arguments)
    if command is not None and command not in _TOGETHER:
        expected = f"expected one: only {', '.join(('train', *_TOGETHER))} work in several; start it alone"
        error = FlagError(f"{command}: found {process_count()} processes of a launcher, {expected}.")
        if main:
            return fail(f"error: {error.format_message()}", error, USER, as_json="--json" in arguments)
        return OK
    if main:
        return invoke(arguments)
    said = io.StringIO()
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(said):
        code = invoke(arguments)
    if code in (INTERNAL, USER, STOPPED):
        from bayestune.experiment.processes import report

        report(said.getvalue().strip().rpartition("\n")[2].removeprefix("error: "))
    if "--debug" in arguments:
        print(said.getvalue(), file=sys.stderr)
    return code
