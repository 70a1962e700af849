"""What a command writes to its terminal or log: its errors, one line each, and little of other libraries."""

import contextlib
import functools
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TextIO

from tqdm.utils import ObjectWrapper

from bayestune_cli.console import say, tell

OK, INTERNAL, USER, STOPPED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143


def fail(message: str, error: BaseException, code: int, *, as_json: bool) -> int:
    """Say in one line on stderr, and as a JSON object on stdout if that was asked for, what went wrong; `code`."""
    line = " ".join(message.split())
    tell(line)
    if as_json:
        with contextlib.suppress(OSError):  # stdout itself may be what failed
            say(json.dumps({"error": {"type": type(error).__name__, "message": line, "exit_code": code}}))
    return code


def open_streams() -> None:
    """Send a stream that the process was started without nowhere."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))


def flush_output(code: int) -> int:
    """Write out what was printed; `code`, or that of an error if stdout takes no more: it is then dropped."""
    try:
        sys.stdout.flush()
    except OSError as error:
        _drop(sys.stdout)
        line = f"error: stdout: cannot be written: {error.strerror}."
        return code or fail(line, error, USER, as_json=False)
    return code


@contextlib.contextmanager
def lasting_stderr() -> Iterator[None]:
    """Inside, a stderr that takes no more, such as a log on a full disk, is no error: what is written is dropped."""
    with contextlib.redirect_stderr(_Lasting(sys.stderr)):
        yield


class _Lasting(ObjectWrapper):
    """A stream that goes on when it takes no more."""

    _wrapped: TextIO

    def write(self, text: str) -> int:
        try:
            return self._wrapped.write(text)
        except OSError:
            _drop(self._wrapped)
            return len(text)

    def flush(self) -> None:
        try:
            self._wrapped.flush()
        except OSError:
            _drop(self._wrapped)


def _drop(stream: TextIO) -> None:
    """Send a stream nowhere from now on, with what it still holds: the interpreter writes that out at its end."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


LOUD: ContextVar[bool] = ContextVar("LOUD", default=False)
"""Whether libraries may say what they like: --debug."""


def quietly(command: Callable[..., Any]) -> Callable[..., Any]:
    """`command`, with libraries kept quiet while it runs, and not before its flags are known to be right."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if LOUD.get() else quiet():
            return command(*args, **kwargs)

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries' advice and load reports off the console; their errors still show."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # before any import: packages tell at once what they lack
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils.logging import disable_progress_bar, enable_progress_bar

            from bayestune.errors import BayestuneWarning

            def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
                if issubclass(category, BayestuneWarning):  # a library may switch its own on again
                    tell(f"warning: {message}")

            warnings.simplefilter("always", BayestuneWarning)
            warnings.showwarning = show
            disable_progress_bar()
            try:
                yield
            finally:
                enable_progress_bar()
    finally:
        logging.disable(before)
