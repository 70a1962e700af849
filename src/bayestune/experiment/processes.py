"""Processes started by torchrun or `accelerate launch`: their ranks, and the exchange of values between them."""

import contextlib
import functools
import os
import sys
from typing import Any, NoReturn, TypeVar

import torch.distributed as dist

from bayestune.errors import BayestuneError

T = TypeVar("T")


def process_count() -> int:
    """Return the number of processes that the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return whether this is the main process, which alone writes files and prints.

    If it fails, the launcher ends the other processes.
    """
    return rank() == 0


def together(mine: T) -> list[T]:
    """Wait for a value from each process, and return the values in order of rank.

    Every process must call it the same number of times. Values are pickled, and come only from this launcher.

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
    """Make the main process raise an error at its next `together`; return when that process has ended."""
    failure = BayestuneError(f"process {rank()} of {process_count()}: {message}")
    for _ in range(2):  # the second call fails once the main process has ended
        with contextlib.suppress(BayestuneError):
            together(failure)


@functools.cache
def _group() -> Any:
    """Return a group on the CPU, separate from the group that a Trainer may have on GPUs."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return dist.new_group(backend="gloo")


def leave(code: int) -> NoReturn:
    """Exit immediately: in a normal exit of the interpreter, gloo's threads can abort or deadlock."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
