"""Make results/properties.json and docs/properties.md from the reports of test runs.

python -m promises REPORT.xml ...     # as `make properties` does
python -m promises --check            # only say whether the page is that of the record
"""

import argparse
import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

from promises.page import page
from promises.results import collect

ROOT = Path(__file__).parent.parent.parent
RECORD, PAGE = ROOT / "results" / "properties.json", ROOT / "docs" / "properties.md"


def main() -> int:
    parser = argparse.ArgumentParser(description="docs/properties.md from test runs", allow_abbrev=False)
    parser.add_argument("reports", nargs="*", type=Path, help="JUnit XML of pytest")
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    arguments = parser.parse_args()
    if arguments.check:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
        same = PAGE.read_text(encoding="utf-8") == page(record)
        print(f"{PAGE.name} is {'' if same else 'not '}that of {RECORD.name}")
        return 0 if same else 1
    record = {
        "command": "make properties",
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "safetensors")},
        "tests": collect(arguments.reports),
    }
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    PAGE.write_text(page(record), encoding="utf-8")
    print(f"{RECORD}\n{PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
