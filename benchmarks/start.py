"""Time `bayestune --help`, compared with starting Python alone.

    python benchmarks/start.py [--json FILE]

Warm runs find the byte code of every module; cold runs find none, as right after an installation. Each run is a new
process, and the figures are medians. Files are in the page cache in both cases.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from options import add_json, parser, publish

RUNS, COLD = 15, 5
COMMANDS = {"help": ["-m", "bayestune", "--help"], "python": ["-c", "pass"]}


def main() -> None:
    made = parser(__doc__)
    add_json(made)
    options = made.parse_args()
    entry = Path(sys.executable).parent / "bayestune"
    commands = {name: [sys.executable, *command] for name, command in COMMANDS.items()}
    if entry.is_file():
        commands["help"] = [str(entry), "--help"]
    warm = {name: [seconds(command, os.environ) for _ in range(RUNS + 1)][1:] for name, command in commands.items()}
    cold = []
    for _ in range(COLD):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(seconds(commands["help"], {**os.environ, "PYTHONPYCACHEPREFIX": folder}))
    found = {
        "seconds": statistics.median(warm["help"]),
        "cold_seconds": statistics.median(cold),
        "python_seconds": statistics.median(warm["python"]),
        "runs": RUNS,
        "cold_runs": COLD,
    }
    publish(found, options)


def seconds(command: list[str], environment: os._Environ[str] | dict[str, str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
