"""The program `bayestune`: its commands, and the handling of errors and signals.

Importing the package `bayestune` takes seconds. The program is a separate package that imports nothing of it before a
command runs, so `bayestune --help` is instant.
"""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from bayestune_cli.acquire import acquire
from bayestune_cli.demo import demo
from bayestune_cli.distil import distil
from bayestune_cli.errors import INTERNAL, INTERRUPTED, OK, STOPPED, TERMINATED, USER, fail
from bayestune_cli.evaluate import evaluate
from bayestune_cli.export import export
from bayestune_cli.generate import generate
from bayestune_cli.launched import process_count, run_launched
from bayestune_cli.lm_eval import lm_eval
from bayestune_cli.predict import predict
from bayestune_cli.report import report
from bayestune_cli.serve import serve
from bayestune_cli.signals import Stopped, stoppable
from bayestune_cli.streams import LOUD, LastingStream, flush_output, quietly
from bayestune_cli.table import table
from bayestune_cli.train import train

_STOPPED = {signal.SIGINT: ("interrupted", INTERRUPTED), signal.SIGTERM: ("terminated", TERMINATED)}

app = typer.Typer(
    rich_markup_mode=None,
    add_completion=False,
    help="Bayesian LoRA: train a posterior over LoRA weights, get calibrated answers, serve draws as plain LoRA.",
    epilog="Exit codes: 0 success; 1 internal error; 2 wrong flag, file, row or setting (nothing is trained or "
    "overwritten), or a file that cannot be written (the last checkpoint is kept); 3 training stopped: a loss, "
    "gradient or KL is not finite, or memory ran out at batch size 1; 130 interrupted (Ctrl-C); 143 terminated. With "
    "--checkpoint-steps, the first signal finishes the update and saves a checkpoint; a second one ends the process "
    "immediately. Errors go to stderr, one line each; with --json also to stdout, as "
    '{"error": {"type", "message", "exit_code"}}.',
)


@app.callback()
def program(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and the warnings of libraries.")] = False,
) -> None:
    """Declare --debug for the help; `invoke` accepts it anywhere among the arguments."""


for command in (train, evaluate, predict, generate, lm_eval, acquire, distil, export, serve, demo, table, report):
    app.command()(quietly(command))


def main() -> NoReturn:
    """Run the program."""
    if process_count() == 1:
        sys.exit(invoke(sys.argv[1:]))
    code = run_launched(invoke, sys.argv[1:])

    from bayestune.experiment.processes import leave

    leave(code)


def invoke(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    In the main thread SIGINT and SIGTERM end the command; a second one ends the process.
    """
    with contextlib.redirect_stderr(LastingStream(sys.stderr or open(os.devnull, "w"))):
        return flush_output(_invoke(arguments))


def _invoke(arguments: Sequence[str]) -> int:
    debug, as_json = "--debug" in arguments, "--json" in arguments
    loud = LOUD.set(debug)
    try:
        with stoppable():
            given = [argument for argument in arguments if argument != "--debug"]
            code = app(given or ["--help"], prog_name="bayestune", standalone_mode=False)
        return code if isinstance(code, int) else OK
    except typer.TyperException as error:
        return fail(f"error: {error.format_message()}", error, USER, as_json=as_json)
    except Stopped as stopped:
        what, code = _STOPPED[signal.Signals(stopped.number)]
        return fail(f"{what}: {stopped}" if str(stopped) else what, stopped, code, as_json=as_json)
    except Exception as error:
        from bayestune.errors import BayestuneError, TrainingError

        if debug:
            traceback.print_exc()
        if isinstance(error, TrainingError):
            message, code = f"training stopped: {error}", STOPPED
        elif isinstance(error, BayestuneError | OSError | ImportError):
            message, code = f"error: {error}", USER
        else:
            message, code = f"internal error: {type(error).__name__}: {error} (--debug shows the traceback)", INTERNAL
        return fail(message, error, code, as_json=as_json)
    finally:
        LOUD.reset(loud)
