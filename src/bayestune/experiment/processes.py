"""The processes of torchrun or `accelerate launch`: their ranks, and the values that they exchange."""

import contextlib
import functools
import os
import sys
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from bayestune.errors import BayestuneError

T = TypeVar("T")


def process_count() -> int:
    """Processes that work together; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Whether this process writes files and prints. A launcher ends the others if it fails."""
    return rank() == 0


def together(mine: T) -> list[T]:
    """Return the value that each process passes here, by rank; it waits for all of them.

    Every process must call it equally often. Values travel through pickle, between processes of one launcher.

    Raises:
        BayestuneError: another process reported an error, ended, or was silent for 30 minutes.
    """
    if process_count() == 1:
        return [mine]
    values: list[Any] = [None] * process_count()
    try:
        dist.all_gather_object(values, mine, group=_group())
    except RuntimeError as error:
        raise BayestuneError(
            f"process {rank()} of {process_count()}: found no answer from another process, expected one within 30 "
            "minutes: it was ended, or hangs; the launcher may say more."
        ) from error
    for value in values:
        if isinstance(value, BayestuneError):
            raise value
    return values


def report(message: str) -> None:
    """Raise an error in the main process, at its next `together`; return when that process has ended."""
    failure = BayestuneError(f"process {rank()} of {process_count()}: {message}")
    for _ in range(2):  # the second time the main process is not there any more
        with contextlib.suppress(BayestuneError):
            together(failure)


@functools.cache
def _group() -> Any:
    """A group on the CPU, beside the one that a Trainer may have on GPUs."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.new_group(backend="gloo")


def leave(code: int) -> NoReturn:
    """Exit at once: in a normal exit of the interpreter, gloo's threads can abort or deadlock."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
