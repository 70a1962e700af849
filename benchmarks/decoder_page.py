"""docs/decoder.md from the records of decoder.py."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bayestune.files import read_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "decoder"
TUNING = RESULTS / "tuning"
MEASURES = {"accuracy": "accuracy", "nll": "NLL", "ece_corrected": "ECE", "brier": "Brier"}
NAMES = {
    "mle": "plain LoRA",
    "ensemble": "ensemble of three",
    "dropout": "MC dropout",
    "laplace": "Laplace",
    "tfb": "TFB",
    "ivon": "IVON",
    "blob_paper": "BLoB, the paper's recipe",
    "blob": "BLoB, std 0.06",
    "blob_wide": "BLoB, std 0.3 under a prior of 1",
}
RIVAL = ("mle", "mle_temperature")


def page() -> str:
    """The records as Markdown."""
    records = [read_json(path, "a record") for path in sorted(RESULTS.glob("*.json"))]
    lines = [(variant, key) for variant in NAMES for key in _keys(records, variant)]
    parts = [INTRODUCTION, "## Scores\n", *_scores(records, lines), "\n## Against plain LoRA with a temperature\n"]
    parts += [*_differences(records, lines), "\n## What the posteriors do\n", *_posteriors(records)]
    return "\n".join(parts) + "\n"


def _keys(records: Sequence[dict[str, Any]], variant: str) -> list[str]:
    mine = [made for made in records if made["variant"] == variant]
    return list(mine[0]["scores"]) if mine else []


def _values(records: Sequence[dict[str, Any]], variant: str, key: str, measure: str) -> dict[int, float]:
    return {made["seed"]: made["scores"][key][measure] for made in records if made["variant"] == variant}


def label(variant: str, key: str) -> str:
    """What a line of the tables is called."""
    name, base = NAMES[variant], key.removesuffix("_temperature")
    draws = f", N = {base.rpartition('_n')[2]}" if "_n" in base else ""
    return f"{name}{draws}{', temperature' if base != key else ''}"


def _scores(records: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str]]) -> list[str]:
    table = [f"| | {' | '.join(MEASURES.values())} | seeds |", "|---" * (len(MEASURES) + 2) + "|"]
    for variant, key in lines:
        found = [list(_values(records, variant, key, measure).values()) for measure in MEASURES]
        cells = [f"{statistics.mean(v):.3f}" + (f" ± {statistics.stdev(v):.3f}" if len(v) > 1 else "") for v in found]
        table.append(f"| {label(variant, key)} | {' | '.join(cells)} | {len(found[0])} |")
    return table


def _differences(records: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str]]) -> list[str]:
    """The NLL less the rival's, on the same rows and seed."""
    rival = _values(records, *RIVAL, "nll")
    table = ["| | NLL less its, mean ± standard error over seeds | by seed |", "|---|---|---|"]
    for variant, key in lines:
        found = _values(records, variant, key, "nll")
        less = [found[seed] - rival[seed] for seed in sorted(found.keys() & rival.keys())]
        if not less or (variant, key) == RIVAL:
            continue
        error = f" ± {statistics.stdev(less) / len(less) ** 0.5:.3f}" if len(less) > 1 else ""
        by_seed = ", ".join(f"{value:+.3f}" for value in less)
        table.append(f"| {label(variant, key)} | {statistics.mean(less):+.3f}{error} | {by_seed} |")
    return table


def _posteriors(records: Sequence[dict[str, Any]]) -> list[str]:
    table = ["| | seed | std of A | factor chosen | logit variance | epistemic (nats) |", "|---" * 6 + "|"]
    for variant in NAMES:
        for made in (made for made in records if made["variant"] == variant):
            key = [key for key in made["scores"] if not key.endswith("_temperature")][-1]
            found, fitted = made["scores"][key], made.get("fitted") or {}
            std = f"{made['posterior_std']:.4g}" if made.get("posterior_std") else ""
            factor = f"{fitted['posterior_scale']:.3g}" if "posterior_scale" in fitted else ""
            draws = (
                [f"{found['spread'][name]:.3g}" for name in ("logit_variance", "epistemic")] if found["spread"] else []
            )
            cells = [NAMES[variant], str(made["seed"]), std, factor, *(draws or ["", ""])]
            table.append(f"| {' | '.join(cells)} |")
    return table


INTRODUCTION = """# On a language model

`python benchmarks/decoder.py --page` makes this page from the records in `results/decoder`, each of which holds its
command.

SmolLM2-135M-Instruct (quantized to Q4_1, used in float32) learns ARC-Easy, scored by the texts of the choices: 400
training rows in 200 updates of 8, rank 8 on `q_proj` and `v_proj`, learning rate 1e-3. Plain LoRA is overconfident
there. 60 further training rows choose every temperature and BLoB's scale; the first 200 rows of dev are scored.
Numbers are means over seeds, with the standard deviation where there are several; NLL is in nats, and ECE is the
bias-corrected one.
"""
