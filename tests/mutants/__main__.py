"""Plant each defect in a process of its own, run the tests that must fail on it, and say whether they did.

    make mutants                     # all of them, two at a time
    make mutants ONLY="draw noise"   # those whose name has one of the words

Exits with 1 if a defect survives: if its tests pass, do not run, or take too long. Last line:
`mutants: N killed, M survived`.
"""

import multiprocessing
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mutants.defect import Defect
from mutants.defects import DEFECTS
from mutants.process import RETURNED, run

JOBS, LIMIT = 2, 300
FORKS = multiprocessing.get_context("forkserver")


def main() -> int:
    words = sys.argv[1:] or [""]
    chosen = [defect for defect in DEFECTS.values() if any(word in defect.name for word in words)]
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    FORKS.set_forkserver_preload(["torch", "transformers", "peft"])  # imported once, and never by a defect
    with ThreadPoolExecutor(JOBS) as pool:
        survived = 0
        for defect, (killed, found) in zip(chosen, pool.map(planted, chosen), strict=True):
            survived += not killed
            print(f"{'killed' if killed else 'survived'}: {defect.name} ({found})")
            sys.stdout.flush()
    print(f"mutants: {len(chosen) - survived} killed, {survived} survived")
    return 1 if survived or not chosen else 0


def planted(defect: Defect) -> tuple[bool, str]:
    """Whether the tests fail with the defect in place, and on what."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        process = FORKS.Process(target=run, args=(defect.name, defect.tests, defect.select, str(output)))
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            return False, f"no answer within {LIMIT} s"
        lines = output.read_text(errors="replace").splitlines() if output.exists() else []
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    killed = process.exitcode == RETURNED + pytest.ExitCode.TESTS_FAILED and bool(failed)
    return killed, (failed or lines or ["no output"])[-1][:200]


if __name__ == "__main__":
    sys.exit(main())
