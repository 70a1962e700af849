"""Plant each defect in a copy of the source, run the tests that must fail on it, and say which were noticed.

    make mutants                     # all of them
    make mutants ONLY=draw           # those whose name has the word

Exits with 1 if a defect survives, or its place is not found exactly once. Last line: `mutants: N killed, M survived`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants.defect import Defect
from mutants.defects import DEFECTS

ROOT = Path(__file__).parent.parent.parent
JOBS, LIMIT = 2, 600
FAILED = 1
"""What pytest returns where tests ran and some failed; any other failure proves nothing."""


def main() -> None:
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    chosen = [defect for defect in DEFECTS if word in defect.name]
    with ThreadPoolExecutor(JOBS) as pool:
        survived = 0
        for defect, problem in zip(chosen, pool.map(planted, chosen), strict=True):
            survived += problem is not None
            print(f"{'survived' if problem else 'killed'}: {defect.name}" + (f" ({problem})" if problem else ""))
            sys.stdout.flush()
    print(f"mutants: {len(chosen) - survived} killed, {survived} survived")
    sys.exit(1 if survived or not chosen else 0)


def planted(defect: Defect) -> str | None:
    """None if the tests fail with the defect in place, else what happened."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "src"
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("__pycache__"))
        path = source / defect.file
        text = path.read_text(encoding="utf-8")
        if text.count(defect.before) != 1:
            return f"found {text.count(defect.before)} times in {defect.path}, expected once: {defect.before!r}"
        path.write_text(text.replace(defect.before, defect.after), encoding="utf-8")
        file, _, word = defect.tests.partition(" ")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-p", "no:cacheprovider"]
        command += [str(ROOT / "tests" / file), *(["-k", word] if word else [])]
        environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            return f"no answer within {LIMIT} s"
        if done.returncode == FAILED:
            return None
        return f"pytest returned {done.returncode}: {done.stdout.strip().splitlines()[-1:]}"


if __name__ == "__main__":
    main()
