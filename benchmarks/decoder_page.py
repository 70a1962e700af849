"""Make docs/decoder.md from the records of decoder.py."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from over_seeds import difference, spread

from bayestune.files import read_json

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "decoder"
TUNING = RESULTS / "tuning"
MEASURES = {"accuracy": "accuracy", "nll": "NLL", "ece_corrected": "ECE corrected", "brier": "Brier"}
NAMES = {
    "mle": "plain LoRA",
    "ensemble": "ensemble of three",
    "dropout": "MC dropout",
    "laplace": "Laplace",
    "tfb": "TFB",
    "ivon": "IVON",
    "blob_paper": "BLoB, the paper's recipe",
    "blob": "BLoB, the default",
    "blob_tempered": "BLoB, scale and temperature chosen together",
    "blob_wide": "BLoB, std 0.3 under a prior of 1",
}
WHERE = {"cpu": "one of two busy cores", "NVIDIA H100 80GB HBM3": "an H100 shared by 15 such processes"}
SEEDS = (1, 2, 3)
TEMPERATURE = "_temperature"
RIVAL = ("mle", "mle_temperature")


def read_records() -> list[dict[str, Any]]:
    """Return the records of the comparison, which is on ARC-Easy."""
    return [read_json(path, "a record") for path in sorted(RESULTS.glob("arc_easy-*.json"))]


def page() -> str:
    """Return the page as Markdown."""
    records = read_records()
    lines = [(variant, key) for variant in NAMES for key in _keys(records, variant)]
    parts = [
        INTRODUCTION,
        *_cost(records),
        PICTURE,
        "## Scores\n",
        *score_lines(records, lines),
        VERDICT.format(**_beyond(records, lines), **_rows(records), brier=_lowest(records, lines, "brier")),
    ]
    parts += ["## Against plain LoRA with a temperature\n"]
    parts += [*_differences(records, lines), "\n## What the posteriors do\n", *_posteriors(records)]
    parts += [CURVE, *_curve(records), TUNED, *_tuned()]
    return "\n".join(parts) + "\n"


def _cost(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return how many of the planned records exist, what one of each variant took by device, and which are missing."""
    took: dict[str, dict[str, list[float]]] = {}
    for made in records:
        mine = took.setdefault(made["hardware"]["device"], {})
        mine.setdefault(made["variant"], []).append(made["score_seconds"] / 60)
    lines = [
        f"On {WHERE.get(device, device)}: "
        + "; ".join(f"{NAMES[variant]}: {statistics.mean(mine[variant]):.0f}" for variant in NAMES if variant in mine)
        for device, mine in sorted(took.items())
    ]
    there = (
        f"{len(records)} of {3 * len(NAMES)} planned records (ten variants, three seeds) exist. Means over different "
        "seeds are not\ncomparable; the differences below use the same seeds and rows."
    )
    missing = {
        variant: [str(seed) for seed in SEEDS if (variant, seed) not in {(m["variant"], m["seed"]) for m in records}]
        for variant in NAMES
    }
    left = "".join(f"{NAMES[variant]}, seeds {', '.join(seeds)}; " for variant, seeds in missing.items() if seeds)
    timed = took.get("cpu", {})
    hours = sum(len(SEEDS) * statistics.mean(minutes) for minutes in timed.values()) / 60
    not_run = (
        f"Not run: {left}and all of OpenBookQA (`--task openbookqa`), which has as many rows and updates: the "
        f"{len(timed)} variants timed on a CPU would take {hours:.0f} hours there; not timed were "
        f"{'; '.join(name for variant, name in NAMES.items() if variant not in timed)}. Records of one seed may come "
        "from different devices; each record names its device."
    )
    return [f"{there}\n", f"{COST} {'. '.join(lines)}.\n", f"{not_run}\n"]


def picture(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the NLL of each line of the tables, a dot per seed, without and with a temperature."""
    import matplotlib.pyplot as plt

    shown = [(variant, key) for variant in NAMES for key in _keys(records, variant) if not key.endswith(TEMPERATURE)]
    figure, axes = plt.subplots(figsize=(9, 0.45 * len(shown) + 1.2), layout="constrained")
    for suffix, color, name in (("", "#b2182b", "as trained"), (TEMPERATURE, "#2166ac", "with a temperature")):
        dots = [
            (value, place)
            for place, (variant, key) in enumerate(shown)
            for value in _values(records, variant, key + suffix, "nll").values()
        ]
        axes.scatter(*zip(*dots, strict=True), color=color, label=name, s=28, alpha=0.8)
    axes.set_yticks(range(len(shown)), [label(*line) for line in shown])
    axes.invert_yaxis()
    axes.set_xlabel("NLL in nats (lower is better), one dot per seed")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


def _keys(records: Sequence[dict[str, Any]], variant: str) -> list[str]:
    mine = [made for made in records if made["variant"] == variant]
    return list(mine[0]["scores"]) if mine else []


def nlls(records: Sequence[dict[str, Any]], variant: str, key: str) -> dict[int, float]:
    """Return the NLL of a line of the tables by seed."""
    return _values(records, variant, key, "nll")


def _values(records: Sequence[dict[str, Any]], variant: str, key: str, measure: str) -> dict[int, float]:
    return {made["seed"]: made["scores"][key][measure] for made in records if made["variant"] == variant}


def label(variant: str, key: str) -> str:
    """Return the label of a line in the tables."""
    name, base = NAMES[variant], key.removesuffix(TEMPERATURE)
    draws = f", N = {base.rpartition('_n')[2]}" if "_n" in base else ""
    return f"{name}{draws}{', temperature' if base != key else ''}"


def score_lines(records: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str]]) -> list[str]:
    """Return a table of scores: mean and standard deviation over seeds, one line for each of `lines`."""
    table = [f"| | {' | '.join(MEASURES.values())} | seeds |", "|---" * (len(MEASURES) + 2) + "|"]
    for variant, key in lines:
        cells = [spread(_values(records, variant, key, measure).values()) for measure in MEASURES]
        seeds = ", ".join(map(str, sorted(nlls(records, variant, key))))
        table.append(f"| {label(variant, key)} | {' | '.join(cells)} | {seeds} |")
    return table


def _differences(records: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str]]) -> list[str]:
    """Return a table of the NLL minus that of plain LoRA with a temperature, on the same rows and seeds."""
    rival = nlls(records, *RIVAL)
    table = ["| | difference in NLL, mean ± standard error over seeds | by seed |", "|---|---|---|"]
    for variant, key in lines:
        less, by_seed = difference(nlls(records, variant, key), rival)
        if less and (variant, key) != RIVAL:
            table.append(f"| {label(variant, key)} | {less} | {by_seed} |")
    return table


def _beyond(records: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return which lines with a temperature differ from the rival by more than two standard errors over seeds."""
    rival, better, worse = nlls(records, *RIVAL), [], []
    for variant, key in lines:
        found = nlls(records, variant, key)
        less = [found[seed] - rival[seed] for seed in found.keys() & rival.keys()]
        if key.endswith(TEMPERATURE) and len(less) > 1:
            mean, error = round(statistics.mean(less), 3), statistics.stdev(less) / len(less) ** 0.5
            better += [label(variant, key)] if mean < -2 * error else []
            worse += [label(variant, key).removesuffix(", temperature")] if mean > 2 * error else []
    return {
        "below": f"{'; '.join(better)} has" if better else "no method has",
        "above": f"Above it by as much: {'; '.join(worse)}." if worse else "",
    }


def _rows(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the intervals over rows of plain LoRA's NLL with the first seed, and the range of its temperatures."""
    plain = {made["seed"]: made["scores"] for made in records if made["variant"] == RIVAL[0]}
    first, warm = (plain[SEEDS[0]][key]["intervals"]["nll"] for key in ("mle", RIVAL[1]))
    temperatures = [scores[RIVAL[1]]["temperature"] for scores in plain.values()]
    return {
        "untempered": f"[{first[0]:.2f}, {first[1]:.2f}]",
        "tempered": f"[{warm[0]:.2f}, {warm[1]:.2f}]",
        "temperatures": f"{min(temperatures):.1f} to {max(temperatures):.1f}",
    }


def _lowest(records: Sequence[dict[str, Any]], lines: Sequence[tuple[str, str]], measure: str) -> str:
    """Return the line with the lowest mean of a score, and that mean."""
    means = {line: statistics.mean(_values(records, *line, measure).values()) for line in lines}
    best = min(means, key=means.__getitem__)
    return f"{label(*best)} ({means[best]:.3f})"


def _posteriors(records: Sequence[dict[str, Any]]) -> list[str]:
    table = [
        "| | seed | temperature | std of A | factor chosen | logit variance | epistemic (nats) |",
        "|---" * 7 + "|",
    ]
    for variant in NAMES:
        for made in (made for made in records if made["variant"] == variant):
            key = [key for key in made["scores"] if not key.endswith(TEMPERATURE)][-1]
            found, fitted = made["scores"][key], made.get("fitted") or {}
            std = f"{made['posterior_std']:.4g}" if made.get("posterior_std") else ""
            factor = f"{fitted['posterior_scale']:.3g}" if "posterior_scale" in fitted else ""
            draws = (
                [f"{found['spread'][name]:.3g}" for name in ("logit_variance", "epistemic")] if found["spread"] else []
            )
            warm = f"{made['scores'][key + TEMPERATURE]['temperature']:.2f}"
            cells = [NAMES[variant], str(made["seed"]), warm, std, factor, *(draws or ["", ""])]
            table.append(f"| {' | '.join(cells)} |")
    return table


def _curve(records: Sequence[dict[str, Any]]) -> list[str]:
    """Return a table of the held-out NLL at each factor of the std that `fit_scale` tried."""
    tried = {
        (made["variant"], made["seed"]): {float(factor): value for factor, value in found["nll_by_scale"].items()}
        for made in records
        if (found := made.get("fitted") or {}).get("nll_by_scale")
    }
    factors = sorted({factor for curve in tried.values() for factor in curve})
    table = [f"| | seed | {' | '.join(f'{factor:g}' for factor in factors)} |", "|---" * (len(factors) + 2) + "|"]
    for (variant, seed), curve in tried.items():
        cells = [f"{curve[factor]:.3f}" if factor in curve else "" for factor in factors]
        table.append(f"| {NAMES[variant]} | {seed} | {' | '.join(cells)} |")
    return table


def _tuned() -> list[str]:
    """Return a table of the scores of each setting of the grid, for the mean and for the draws."""
    table = ["| | accuracy | NLL | with a temperature | logit variance |", "|---|---|---|---|---|"]
    for path in sorted(TUNING.glob("*.json")):
        made = read_json(path, "a record")
        for key, found in made["scores"].items():
            if key.endswith(TEMPERATURE):
                continue
            base, _, draws = key.partition("_n")
            name = f"{made['variant']}{f', N = {draws}' if draws else ''}"
            spread = f"{found['spread']['logit_variance']:.3g}" if found["spread"] else ""
            warm = made["scores"][key + TEMPERATURE]["nll"]
            table.append(f"| {name} | {found['accuracy']:.3f} | {found['nll']:.3f} | {warm:.3f} | {spread} |")
    return table


COST = (
    "Minutes to train, to choose the scale and the temperatures, and to score (Laplace and TFB: without plain LoRA's\n"
    "training)."
)
PICTURE = "![NLL of each method, without and with a temperature](images/decoder.png)\n"
VERDICT = """
**With a temperature for both, {below} an NLL below that of plain LoRA by more than two standard errors of the
difference.** {above} Two standard errors of three seeds are a rough guide, not a 95 % interval. All seeds are scored
on the same 200 rows, and train on 400 of the same 460, so these errors leave out the choice of rows: over rows, the
95 % bootstrap interval of plain LoRA's NLL is {untempered}, and {tempered} with a temperature (seed 1).

All fitted temperatures are well above 1: the summed log-probabilities of the texts, used as logits, are too large.
Noise in the weights does not replace the temperature at these settings: where it lowers the NLL much (ten draws of
Laplace), accuracy falls too. Only BLoB's scale is chosen on held-out rows; Laplace has the prior precision with the
largest marginal likelihood, TFB the largest width that keeps the NLL of training rows, and MC dropout and IVON have
their default widths.

Without a temperature, ten draws of the default BLoB have a lower NLL than plain LoRA for each of three seeds, but
are 2 to 5 points less accurate and have a higher Brier score. Their mean NLL is also below that of the ensemble, MC
dropout and IVON; only ten draws of Laplace have a lower one, and they lose more than a tenth of the accuracy. With a
temperature BLoB's NLL is higher than plain LoRA's: the std that is best without a temperature is too wide with one.
With `--temperature-split`, which chooses scale and temperature together, the difference is 0.01 nats. By the paper's
recipe and by TFB the posterior is so narrow that ten draws and the mean have the same NLL to 0.004 nats. Of IVON
only the learning rate was tuned; its mean is 9 points less accurate than plain LoRA, and the draws cost up to 4
points more.

**If the NLL matters, use a temperature here** (`--temperature-split`), with plain LoRA or with BLoB. A wider prior,
a posterior over both matrices, more layers and more updates (the last table) do not change that. A temperature does
not improve everything: it leaves plain LoRA's mean Brier score as it was, and the corrected ECE of the ensemble is
higher with one for two of three seeds. Nor do 60 rows determine it well: plain LoRA's temperatures are
{temperatures}. The lowest mean Brier score is that of this line: {brier}.
"""
CURVE = """
## The scale of the std

The table shows the NLL of the 60 held-out rows at each factor of the standard deviation, with 4 draws; 0 is the mean
alone. For "chosen together", each NLL is that with the temperature fitted at this factor. Among the factors within
0.001 nats of the lowest NLL, the one nearest to 1 is chosen. Judged with a temperature, no noise at all has the lowest
NLL for two of three seeds.
"""
TUNED = """
## Settings

`--tune` trains each setting below with seed 0, and scores it on 100 further rows of the train split with 4 draws. The
names give the method, the standard deviation of the prior and the learning rate; `all-layers` adapts all seven
matrices of a layer, `600-updates` trains twice as long, and `bbb` has a posterior over both matrices. The posterior's
std is 0.3 times the prior's, and its scale is 1. With one seed and 100 rows, the table shows what fails, not what is
best.
"""
INTRODUCTION = """# On a language model

This page compares the methods, each without and with a fitted temperature, on a small language model. It is made from
the records in `results/decoder`, each of which holds its command, by `python benchmarks/decoder.py --page`.

SmolLM2-135M-Instruct (quantized to Q4_1, used in float32) learns ARC-Easy, scored by the texts of the choices: 400
training rows in 300 updates of 4, rank 8 on `q_proj` and `v_proj`, learning rate 1e-3 (IVON: 3e-4). 60 further
training rows choose every temperature and BLoB's scale; the first 200 rows of dev are scored. Numbers are means over
seeds, with the standard deviation if there are several; NLL is in nats, and "ECE corrected" is the ECE without the
bias that few rows add to it. N is the number of draws; N = 0 is the mean adapter. "BLoB, the default" was trained
with a std of 0.06, which its scale then multiplies.
"""
