"""docs/answers.md from the records of answers.py."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bayestune.files import read_json
from bayestune.inference.answer_scores import SIGNALS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "answers"
TASKS, METHODS, SEEDS = ("arc_easy", "openbookqa"), ("mle", "blob"), (1, 2, 3)


def page() -> str:
    return ""
