"""The program `bayestune`: its commands, and what becomes of errors and signals."""

import contextlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from bayestune.cli.console import tell
from bayestune.cli.reporting import report, table
from bayestune.cli.trained import evaluate, export, predict
from bayestune.cli.training import demo, train
from bayestune.errors import BayestuneError, BayestuneWarning, TrainingError

OK, INTERNAL, USER, STOPPED, INTERRUPTED, TERMINATED = 0, 1, 2, 3, 130, 143

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="Train a posterior over LoRA weights, get calibrated answers from it, serve it anywhere a LoRA runs.",
    epilog="Exit codes: 0 done; 1 internal error; 2 wrong flag, file, row or setting (nothing was trained or "
    "overwritten); 3 training stopped because a loss or gradient was not finite; 130 interrupted (Ctrl-C); "
    "143 terminated. Errors go to stderr, one line each.",
)


@app.callback()
def program(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and every library's warnings.")] = False,
) -> None:
    """`main` takes --debug out of the arguments, wherever it stands; here it is declared for the help."""


for command in (train, evaluate, predict, export, demo, table, report):
    app.command()(command)


def main() -> NoReturn:
    """Entry point of the program."""
    code = invoke(sys.argv[1:])

    from bayestune.experiment.processes import leave, process_count

    if process_count() > 1:
        leave(code)
    sys.exit(code)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code. What goes wrong is told in one line on stderr."""
    debug = "--debug" in arguments
    try:
        with contextlib.nullcontext() if debug else _quiet(), _terminable():
            arguments = [argument for argument in arguments if argument != "--debug"]
            code = app(arguments, prog_name="bayestune", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except typer.TyperException as error:
        return _tell(f"error: {error.format_message()}", USER)
    except KeyboardInterrupt:
        return _tell("interrupted", INTERRUPTED)
    except _Terminated:
        return _tell("terminated", TERMINATED)
    except Exception as error:
        if debug:
            traceback.print_exc()
        if isinstance(error, TrainingError):
            return _tell(f"training stopped: {error}", STOPPED)
        if isinstance(error, BayestuneError | OSError | ImportError):
            return _tell(f"error: {error}", USER)
        return _tell(f"internal error: {type(error).__name__}: {error} (--debug shows where)", INTERNAL)


class _Terminated(BaseException):
    """SIGTERM."""


def _tell(message: str, code: int) -> int:
    tell(" ".join(message.split()))
    return code


def _tell_warning(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
    if issubclass(category, BayestuneWarning):  # a library may switch its own on again
        tell(f"warning: {message}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep libraries' advice and load reports off the console; their errors still show."""
    from transformers.utils.logging import disable_progress_bar, enable_progress_bar

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", BayestuneWarning)
            warnings.showwarning = _tell_warning
            yield
    finally:
        enable_progress_bar()
        logging.disable(before)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that files are left whole; the handler before is put back."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
