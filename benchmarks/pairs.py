"""Time several variants in turn, so that noise of the machine affects all of them equally."""

import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from bayestune.experiment.record import hardware, versions
from bayestune.tables.cells import portable


def seconds(
    ways: Mapping[str, Callable[[], object]], *, pairs: int, warmup: int, device: str
) -> dict[str, list[float]]:
    """Return the seconds of each variant in each of `pairs` rounds (A B C, A B C, ...) after `warmup` rounds."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in tqdm(range(warmup + pairs), desc="rounds", unit="round", disable=None):
        for name, way in ways.items():
            _wait(device)
            start = time.perf_counter()
            way()
            _wait(device)
            if turn >= warmup:
                found[name].append(time.perf_counter() - start)
    return found


def ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """Return the median over rounds of the ratio of two times."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def spread(times: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Return the first and third quartile over rounds of the ratio of two times."""
    ratios = [a / b for a, b in zip(times, others, strict=True)]
    first, _, third = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return first, third


def uncertainty(quartiles: Sequence[float], rounds: int) -> float:
    """Return the standard error of a median, if ratios are normal: ``1.2533 (q3 - q1) / (1.349 sqrt(rounds))``."""
    return 1.2533 * (quartiles[1] - quartiles[0]) / (1.349 * rounds**0.5)


def peak_memory() -> int:
    """Return the largest resident memory of this process so far, in bytes (Linux)."""
    # getrusage does not work here: its maximum survives exec, so a child process starts with that of its parent.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def header(device: str) -> dict[str, Any]:
    """Return the provenance of a result: command, day (UTC), versions and hardware."""
    command, today = ["python", *map(portable, sys.argv)], datetime.now(UTC).date().isoformat()
    return {"command": command, "date": today, "device": device, "versions": versions(), "hardware": hardware()}


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
