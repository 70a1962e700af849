"""Make docs/task_results.md from the records of answers.py, regression.py and preference.py; trains nothing.

python benchmarks/task_results.py
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from over_seeds import difference, spread

from bayestune.files import read_json, write_text
from bayestune.inference.answer_scores import SIGNALS

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
Record = dict[str, Any]
Values = dict[int, float]
"""One number per seed."""

ANSWERED = {
    "plain LoRA": ("mle", "averaged"),
    "BLoB, 5 draws averaged": ("blob", "averaged"),
    "BLoB, each draw alone": ("blob", "per_draw"),
}
NUMBERS = {
    "mle": "plain LoRA",
    "mle_temperature": "plain LoRA, temperature",
    "ensemble": "ensemble of three",
    "blob_mean": "BLoB, the mean alone",
    "blob": "BLoB, N = 10",
    "blob_temperature": "BLoB, N = 10, temperature",
}
CONFORMAL = {"mle_conformal": "plain LoRA", "blob_conformal": "BLoB, N = 10"}
PREFERENCES = {"mle": "plain LoRA", "blob": "BLoB, N = 10"}


def read(name: str) -> list[Record]:
    return [read_json(path, "a record") for path in sorted((RESULTS / name).glob("*.json"))]


def seeds_of(records: Sequence[Record], of: Callable[[Record], float | None]) -> Values:
    """Return one number per seed, from the records that have it."""
    found = {made["seed"]: of(made) for made in records}
    return {seed: value for seed, value in found.items() if value is not None}


def shown(values: Values) -> str:
    """Return mean and standard deviation over seeds as text."""
    return spread(values.values()) if values else "none"


def table(headings: Sequence[str], lines: Mapping[str, Sequence[str]]) -> str:
    head = f"| | {' | '.join(headings)} |\n{'|---' * (len(headings) + 1)}|\n"
    return head + "".join(f"| {label} | {' | '.join(cells)} |\n" for label, cells in lines.items())


def less(first: Values, second: Values) -> str:
    """Return `first` minus `second` over shared seeds as text: mean, standard error, and each seed."""
    mean, each = difference(first, second)
    return f"{mean} (by seed {each})" if mean else "no shared seeds"


def words() -> str:
    records = read("answers")
    parts, aurocs = [], []
    for task in dict.fromkeys(made["task"] for made in records):
        mine = {
            label: ([m for m in records if (m["task"], m["method"]) == (task, method)], mode)
            for label, (method, mode) in ANSWERED.items()
        }
        mine = {label: pair for label, pair in mine.items() if pair[0]}
        seeds = {label: ", ".join(str(made["seed"]) for made in several) for label, (several, _) in mine.items()}
        parts.append(f"### {task}\n\nSeeds: {'; '.join(f'{label} {each}' for label, each in seeds.items())}.\n")
        parts.append(table(list(ANSWER_SCORES), _scores(mine)))
        parts.append("AUROC of each signal for right against wrong answers; 0.5 is chance:\n")
        parts.append(table(list(mine), _signals(mine)))
        parts.append("BLoB averaged minus plain LoRA:\n")
        plain, blob = (mine[label] for label in list(ANSWERED)[:2])
        compared = {
            **ANSWER_SCORES,
            "AUROC of the probability": lambda m, mode: m["answers"][mode]["auroc"]["probability"],
        }
        parts.append("\n".join(f"- {name}: {less(_of(*blob, of), _of(*plain, of))}" for name, of in compared.items()))
        parts[-1] += "\n"
        aurocs += [statistics.mean(v.values()) for pair in mine.values() for s in SIGNALS if (v := _auroc(*pair, s))]
    return "\n".join([WORDS.format(best=max(aurocs)), *parts])


ANSWER_SCORES: dict[str, Callable[[Record, str], float]] = {
    "exact match": lambda made, mode: made["answers"][mode]["exact_match"],
    "ECE, corrected": lambda made, mode: made["answers"][mode]["ece_corrected"],
    "NLL per token": lambda made, mode: made["likelihood"]["nll_per_token"],
}


def _of(records: list[Record], mode: str, score: Callable[[Record, str], float]) -> Values:
    return seeds_of(records, lambda made: score(made, mode))


def _scores(mine: dict[str, tuple[list[Record], str]]) -> dict[str, list[str]]:
    return {label: [shown(_of(*pair, score)) for score in ANSWER_SCORES.values()] for label, pair in mine.items()}


def _signals(mine: dict[str, tuple[list[Record], str]]) -> dict[str, list[str]]:
    return {signal: [shown(_auroc(several, mode, signal)) for several, mode in mine.values()] for signal in SIGNALS}


def _auroc(records: list[Record], mode: str, signal: str) -> Values:
    return seeds_of(records, lambda made: made["answers"][mode]["auroc"].get(signal))


def numbers() -> str:
    records = read("regression")
    if not records:
        return ""

    def cells(key: str, names: Sequence[str]) -> list[str]:
        return [shown(seeds_of(records, lambda m, n=n: m["scores"].get(key, {}).get(n))) for n in names]

    targets = shown(seeds_of(records, lambda made: made["target_std"]))
    factors = ", ".join(f"{made['scale']:.3g}" for made in records)
    seeds = ", ".join(str(made["seed"]) for made in records)
    given = f"Seeds {seeds}; std of the target {targets}; chosen factors of BLoB's std {factors}.\n"
    names = ("rmse", "nll", "crps", "coverage")
    parts = [
        NUMBERS_TEXT,
        given,
        table(["RMSE", "NLL", "CRPS", "coverage of 90 % intervals"], {v: cells(k, names) for k, v in NUMBERS.items()}),
    ]
    parts.append("Split-conformal 90 % intervals, scaled by the predicted standard deviation:\n")
    parts.append(table(["coverage", "width"], {v: cells(k, ("coverage", "width")) for k, v in CONFORMAL.items()}))
    nll = {key: seeds_of(records, lambda m, k=key: m["scores"].get(k, {}).get("nll")) for key in NUMBERS}
    rivals = "; ".join(f"{NUMBERS[key]} {less(nll[key], nll['mle'])}" for key in ("blob", "ensemble"))
    parts.append(f"NLL minus that of plain LoRA: {rivals}.\n")
    return "\n".join(parts)


def preferences() -> str:
    records = read("preference")
    lines = {}
    for method, label in PREFERENCES.items():
        mine = [made for made in records if made["method"] == method]
        scores = [shown(seeds_of(mine, lambda m, n=n: m["scores"][n])) for n in ("accuracy", "nll", "ece_corrected")]
        best = [shown(seeds_of(mine, lambda m, n=n: m["best_of_4"].get(n))) for n in ("mean", "lower_bound")]
        lines[f"{label} (seeds {', '.join(str(m['seed']) for m in mine)})"] = [*scores, *best]
    headings = ["accuracy", "NLL", "ECE, corrected", "best of four by the mean", "by the lower bound"]
    nll = [seeds_of([m for m in records if m["method"] == k], lambda m: m["scores"]["nll"]) for k in ("blob", "mle")]
    return "\n".join([PREFERENCES_TEXT, table(headings, lines), f"NLL, BLoB minus plain LoRA: {less(*nll)}.\n"])


INTRODUCTION = """# Words, numbers and preferences: results

This page compares plain LoRA and BLoB on answers in words, on regression and on preferences.
`python benchmarks/task_results.py` makes it from the records in `results/answers`, `results/regression` and
`results/preference`; each record names its command. Numbers are means and standard deviations over seeds. Differences
use the same rows and seeds and come with their standard error; means over different seeds are not comparable. NLL is
in nats.
"""

WORDS = """## Answers in words

SmolLM2-135M-Instruct gets a question with its choices and answers in words. It trains on 400 rows (300 updates of 4,
rank-8 LoRA on q_proj and v_proj); 60 rows choose the scale of BLoB's standard deviation, and 150 rows of dev are
answered. An answer is right if it equals the right choice, up to case, articles and punctuation. The confidence whose
ECE is shown is the probability of the whole text; for "each draw alone" it is the share of draws that agree
(`benchmarks/answers.py`).

**No signal finds wrong answers well here**, and epistemic uncertainty is at chance: the highest mean AUROC in the
tables below is {best:.2f}. BLoB's averaged answers have a better likelihood and a lower ECE; as many or fewer of them
are right.
"""

NUMBERS_TEXT = """## Numbers

The target is the Flesch-Kincaid grade of the text of an ARC-Easy question, `0.39 words / sentences + 11.8 syllables /
words - 15.59`, computed by the library textstat. It stands for the US school year whose students should be able to
read the text. It is a formula, not a human judgment: a model that counts well could predict it without error. MiniLM
trains on 300 rows in 120 updates of 16; 100 rows choose the scale and the temperatures, and 500 rows are scored
(`benchmarks/regression.py`).
"""

PREFERENCES_TEXT = """## Preferences

A pair is the right choice of an ARC-Easy question and a wrong one. MiniLM with a scalar head trains on 300 pairs; 100
pairs choose the scale, and 300 are scored. For the questions with four choices, the last two columns show how often
the right choice has the largest mean reward, or the largest mean minus one standard deviation over the draws
(`benchmarks/preference.py`).
"""


if __name__ == "__main__":
    write_text(ROOT / "docs" / "task_results.md", "\n".join([INTRODUCTION, words(), numbers(), preferences()]))
