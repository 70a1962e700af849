"""The program `bayestune`: its commands, and what becomes of errors and signals.

It is a package beside `bayestune`, whose import takes seconds, since it registers a PEFT type: nothing of that
is imported before a command runs, so `bayestune --help` answers at once.
"""

import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from bayestune_cli.console import tell
from bayestune_cli.reporting import report, table
from bayestune_cli.signals import Stopped, stoppable
from bayestune_cli.streams import (
    INTERNAL,
    INTERRUPTED,
    LOUD,
    OK,
    STOPPED,
    TERMINATED,
    USER,
    fail,
    flush_output,
    lasting_stderr,
    open_streams,
    quietly,
)
from bayestune_cli.train import train
from bayestune_cli.trained import evaluate, export, predict
from bayestune_cli.training import demo

_STOPPED: dict[int, tuple[str, int]] = {
    signal.SIGINT: ("interrupted", INTERRUPTED),
    signal.SIGTERM: ("terminated", TERMINATED),
}

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
    help="Train a posterior over LoRA weights, get calibrated answers from it, serve it anywhere a LoRA runs.",
    epilog="Exit codes: 0 done; 1 internal error; 2 wrong flag, file, row or setting (nothing was trained or "
    "overwritten), or a file that cannot be written (the last checkpoint stays whole); 3 training stopped: "
    "a loss, gradient or the KL was not finite, or memory ran out at one row; 130 interrupted (Ctrl-C); "
    "143 terminated. With --checkpoint-steps "
    "both finish the update and save a checkpoint first; a second one ends at once. Errors go to stderr, one line "
    'each; with --json also to stdout, as {"error": {"type", "message", "exit_code"}}.',
)


@app.callback()
def program(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks, and every library's warnings.")] = False,
) -> None:
    """`main` takes --debug out of the arguments, wherever it stands; here it is declared for the help."""


for command in (train, evaluate, predict, export, demo, table, report):
    app.command()(quietly(command))


def main() -> NoReturn:
    """Entry point of the program."""
    open_streams()
    code = invoke(sys.argv[1:])

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from bayestune.experiment.processes import leave

        leave(code)
    sys.exit(code)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line; the exit code. What goes wrong is told in one line on stderr, with --json also on stdout.

    In the main thread SIGINT and SIGTERM end the command; a second one ends the process.
    """
    with lasting_stderr():
        given = [argument for argument in arguments if argument != "--debug"]
        return flush_output(_invoke(given, debug="--debug" in arguments))


def _invoke(arguments: list[str], *, debug: bool) -> int:
    as_json, loud = "--json" in arguments, LOUD.set(debug)
    try:
        with stoppable():
            code = app(arguments, prog_name="bayestune", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except typer.TyperException as error:
        return fail(f"error: {error.format_message()}", error, USER, as_json=as_json)
    except Stopped as stopped:
        what, code = _STOPPED[stopped.number]
        return fail(f"{what}: {stopped}" if str(stopped) else what, stopped, code, as_json=as_json)
    except Exception as error:
        from bayestune.errors import BayestuneError, TrainingError

        if debug:
            tell(traceback.format_exc())
        if isinstance(error, TrainingError):
            message, code = f"training stopped: {error}", STOPPED
        elif isinstance(error, BayestuneError | OSError | ImportError):
            message, code = f"error: {error}", USER
        else:
            message, code = f"internal error: {type(error).__name__}: {error} (--debug shows where)", INTERNAL
        return fail(message, error, code, as_json=as_json)
    finally:
        LOUD.reset(loud)
