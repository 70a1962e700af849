"""Exit codes, and how an error is reported: one line on stderr, with --json also an object on stdout."""

import contextlib
import json
import sys

import typer

OK, INTERNAL, USER, STOPPED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


class FlagError(typer.TyperException):
    """A wrong flag, or a file named by a flag that cannot be used."""


def fail(message: str, error: BaseException, code: int, *, as_json: bool) -> int:
    """Print `message`, with `as_json` also as an object with the type of `error`, and return the exit code `code`."""
    line = " ".join(message.split())
    print(line, file=sys.stderr)
    if as_json:
        text = line.removeprefix("error: ")
        with contextlib.suppress(OSError):  # stdout may be what failed
            print(json.dumps({"error": {"type": type(error).__name__, "message": text, "exit_code": code}}))
    return code
