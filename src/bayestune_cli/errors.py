"""Exit codes, and how an error is reported: one line on stderr, with --json also an object on stdout."""

import contextlib
import json
import sys

import typer

OK, INTERNAL, USER, STOPPED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


class FlagError(typer.TyperException):
    """A wrong flag, or a file named by a flag that cannot be used."""


def fail(message: str, error: BaseException, code: int, *, as_json: bool) -> int:
    """Report `error` and return `code`.

    Args:
        message: what went wrong.
        error: the exception; its type goes into the JSON object.
        code: exit code.
        as_json: also print a JSON object to stdout; its message has no "error: " in front.
    """
    line = " ".join(message.split())
    print(line, file=sys.stderr)
    if as_json:
        text = line.removeprefix("error: ")
        with contextlib.suppress(OSError):  # stdout may be what failed
            print(json.dumps({"error": {"type": type(error).__name__, "message": text, "exit_code": code}}))
    return code
