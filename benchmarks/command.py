"""Measure how the seconds and peak memory of the whole command `bayestune predict` grow with the number of rows.

    python benchmarks/command.py [--json FILE]

A run of one update on the built-in data answers files of more and more rows, with one draw. "start" is the command
with one row. "exponent" is the slope of log(seconds - start) over log(rows), by least squares; 1 is linear.
"""

import gzip
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from options import add_json, parser, publish
from tqdm.auto import tqdm

import bayestune

SIZES = (1, 1000, 2000, 4000, 8000)
EVERYDAY = Path(bayestune.__file__).parent / "data" / "everyday" / "test.jsonl.gz"


def main() -> None:
    made = parser(__doc__)
    add_json(made)
    options = made.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train = ["train", "--model", "minilm", "--task", "everyday", "--steps", "1", "--draws", "1"]
        command([*train, "--output", str(folder / "run")])
        curve = {rows: answered(folder, rows) for rows in tqdm(SIZES, desc="command", disable=None)}
    start = curve.pop(1)
    seconds = [found["seconds"] - start["seconds"] for found in curve.values()]
    exponent = float(np.polyfit(np.log(list(curve)), np.log(seconds), 1)[0])
    publish({"start": start, "curve": curve, "exponent": exponent}, options)


def answered(folder: Path, rows: int) -> dict[str, Any]:
    """Return the seconds and peak bytes of `bayestune predict` for a file of `rows` rows."""
    source = folder / f"{rows}.jsonl"
    with gzip.open(EVERYDAY) as file:
        known = itertools.cycle([json.loads(line) for line in file])
    source.write_text("".join(json.dumps({**next(known), "id": f"q{i}"}) + "\n" for i in range(rows)))
    flags = ["--input", str(source), "--output", str(folder / f"{rows}.answers"), "--draws", "1"]
    return command(["predict", str(folder / "run"), *flags])


def command(arguments: list[str]) -> dict[str, Any]:
    """Run `bayestune` in a separate process and return its seconds and peak bytes."""
    begun = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "bayestune", *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"bayestune {arguments[0]}: found status {status}, expected 0.")
    return {"seconds": time.perf_counter() - begun, "bytes": usage.ru_maxrss * 1024}


if __name__ == "__main__":
    main()
