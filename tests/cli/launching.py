"""Command lines run by several processes that see the environment of torchrun, forked where imports are done."""

import contextlib
import os
import signal
from collections.abc import Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from bayestune.experiment import trained
from bayestune.experiment.processes import leave
from bayestune_cli import batches
from bayestune_cli.app import invoke
from bayestune_cli.launched import run_launched
from cli.commands import _begin, processes

ROWS_AT_ONCE = 4


def launch(folder: Path, *command_lines: Sequence[str], dies: int = 0) -> list[tuple[int, str, str]]:
    """Run a command line in each process; return its exit code, its stdout and its stderr.

    As with torchrun, this process holds the store by which they meet, and the first that fails ends the others, unless
    it was killed with `dies`: then the others notice it themselves, and no signal comes in between.

    Args:
        folder: a new folder, for their output.
        command_lines: one for each process.
        dies: the call of the model at which process 1 is killed; 0 for none.
    """
    folder.mkdir()
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    children = []
    for number, arguments in enumerate(command_lines):
        ranks = {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(len(command_lines))}
        told = (list(arguments), {**given, **ranks}, str(folder / str(number)), dies if number == 1 else 0)
        children.append(processes().Process(target=process, args=told))
    with _ending(children):
        for child in children:
            child.start()
        running = {child.sentinel: child for child in children}
        while running:
            for sentinel in wait(list(running), 120) or [next(iter(running))]:
                child = running.pop(sentinel)
                child.join(0)
                if child.exitcode != 0 and not dies:
                    for other in running.values():
                        other.terminate()
        files = [[folder / f"{i}.{name}" for name in ("out", "err")] for i in range(len(children))]
        texts = [[file.read_text() if file.exists() else "" for file in each] for each in files]  # or ended before
        return [(child.exitcode, out, err) for child, (out, err) in zip(children, texts, strict=True)]


@contextlib.contextmanager
def _ending(children: Sequence[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for child in children:
            child.kill()
            child.join()


def process(arguments: list[str], environment: dict[str, str], log: str, dies: int) -> None:
    """One of the processes; answers `ROWS_AT_ONCE` rows at a time."""
    _begin(f"{log}.out", f"{log}.err")
    os.environ.update(environment)
    batches.ROWS_AT_ONCE = ROWS_AT_ONCE
    real, calls = trained.draw_outputs, []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) == dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    trained.draw_outputs = dying
    leave(run_launched(invoke, arguments))
