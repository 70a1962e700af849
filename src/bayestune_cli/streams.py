"""Keep libraries quiet, and survive a stdout or a stderr that cannot be written."""

import contextlib
import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, TextIO

from tqdm.utils import ObjectWrapper

from bayestune_cli.errors import USER, fail

LOUD: ContextVar[bool] = ContextVar("LOUD", default=False)
"""Whether libraries may print warnings and logs (--debug)."""


def flush_output(code: int) -> int:
    """Flush stdout and return `code`, or the code of an error if stdout cannot be written."""
    try:
        print(end="", flush=True)
    except OSError as error:
        _discard(sys.stdout)
        return code or fail(f"error: stdout: cannot be written: {error.strerror}.", error, USER, as_json=False)
    return code


class LastingStream(ObjectWrapper):
    """A stream whose output is discarded once it cannot be written, as a log on a full disk."""

    _wrapped: TextIO

    def write(self, text: str) -> int:
        try:
            return self._wrapped.write(text)
        except OSError:
            _discard(self._wrapped)
            return len(text)

    def flush(self) -> None:
        try:
            self._wrapped.flush()
        except OSError:
            _discard(self._wrapped)


def _discard(stream: TextIO) -> None:
    """Redirect a stream to the null device, so that Python can flush its buffer at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def quietly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Return `command` with libraries kept quiet while it runs. Its flags are parsed before libraries are imported."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        with contextlib.nullcontext() if LOUD.get() else quiet():
            return command(*args, **kwargs)

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings, logs and loading bars of libraries; show our own warnings in one line each.

    Nothing is imported here, so a command can check its flags and files before it imports torch.
    """
    with contextlib.ExitStack() as undo:
        undo.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.WARNING)
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        bars = sys.modules.get("transformers.utils.logging")
        if bars is None:
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        elif bars.is_progress_bar_enabled():
            bars.disable_progress_bar()
            undo.callback(bars.enable_progress_bar)
        undo.enter_context(warnings.catch_warnings())
        warnings.simplefilter("always")  # a library may turn its own warnings on again
        warnings.showwarning = _show
        yield


def _show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    ours = sys.modules.get("bayestune.errors")
    if ours is not None and issubclass(category, ours.BayestuneWarning):
        print(f"warning: {message}", file=sys.stderr)
