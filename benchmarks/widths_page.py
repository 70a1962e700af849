"""docs/width.md: the records of `widths.py` as tables."""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from over_seeds import difference, spread
from widths import HELD_OUT, RESULTS, SCORED, SEEDS, SETTINGS, TASKS, TRAINED, VARIANTS

from bayestune.files import read_json
from bayestune.methods.scale import chosen

RIVALS = {
    ("point", "mle"): "plain LoRA",
    ("point", "mle_temperature"): "plain LoRA, temperature",
    ("point", "ensemble"): "ensemble of three",
    ("paper", "n10"): "BLoB, the paper's recipe",
    ("paper", "n10_temperature"): "BLoB, the paper's recipe, temperature",
    ("paper", "scaled"): "BLoB, the paper's recipe, scale chosen",
    ("paper", "scaled_temperature"): "BLoB, the paper's recipe, scale chosen, temperature",
    ("default", "n10"): "BLoB, std 0.06",
    ("default", "n10_temperature"): "BLoB, std 0.06, temperature",
    ("default", "scaled"): "**BLoB, std 0.06, scale chosen (the default)**",
    ("default", "scaled_temperature"): "BLoB, the default, temperature",
}
DEFAULT, PAPER, SCALED = ("default", "scaled"), ("paper", "n10"), ("paper", "scaled")
METHODS = (("point", "mle"), ("point", "mle_temperature"), ("point", "ensemble"), PAPER, DEFAULT)

Scored = dict[tuple[str, str], dict[int, dict[str, float]]]
"""The scores on one data set, by rival and seed."""


def page() -> str:
    """Return the page as Markdown."""
    found = read_records()
    whole = complete(found)
    planned = len(TASKS) * len(VARIANTS) * len(SEEDS)
    parts = [INTRODUCTION]
    if len(found) < planned:
        parts += [f"{len(found)} of {planned} planned records exist; incomplete seeds are left out.\n"]
    parts += [_verdict(whole)]
    other = sum(
        chosen({float(factor): nll for factor, nll in made["nll_by_scale"].items()}) != made["scale"]
        for made in found.values()
        if "scale" in made
    )
    if other:
        parts += [f"In {other} records, the current rule of `fit_scale` would choose a different factor.\n"]
    parts += ["## NLL\n", *_table(whole, "nll"), "\n## Accuracy\n", *_table(whole, "accuracy")]
    parts += ["\n## ECE\n", *_table(whole, "ece"), "\n## The default against the others\n", AGAINST, *_against(whole)]
    used = {key: made for key, made in found.items() if key[2] in whole.get(key[0], {}).get(DEFAULT, {})}
    parts += ["\n## Chosen scales\n", *_scales(used)]
    return "\n".join(parts) + "\n"


def read_records() -> dict[tuple[str, str, int], dict[str, Any]]:
    """Return the records by data set, variant and seed."""
    records = [read_json(path, "a record") for path in sorted(RESULTS.glob("*.json"))]
    return {(made["task"], made["variant"], made["seed"]): made for made in records}


def complete(found: Mapping[tuple[str, str, int], dict[str, Any]]) -> dict[str, Scored]:
    """Return the scores by data set, of the seeds of which every variant has a record."""
    seeds = {task: [seed for seed in SEEDS if all((task, one, seed) in found for one in VARIANTS)] for task in TASKS}
    return {
        task: {
            (variant, key): {seed: found[task, variant, seed]["scores"][key] for seed in whole}
            for variant, key in RIVALS
        }
        for task, whole in seeds.items()
        if whole
    }


def _verdict(found: dict[str, Scored]) -> str:
    """Say how often the default is among the two best of five, and where its NLL is above the paper recipe's."""
    good = sum(_rank(scored, METHODS) <= 2 for scored in found.values())
    above = [task for task, scored in found.items() if _mean(scored, DEFAULT) > _mean(scored, PAPER)]
    where = f"on {' and '.join(above)} only" if above else "on none of them"
    return VERDICT.format(good=good, all=len(found), where=where)


def _rank(scored: Scored, among: Iterable[tuple[str, str]]) -> int:
    """Return the rank of the default's mean NLL; the lowest has rank 1."""
    return sorted(_mean(scored, rival) for rival in among).index(_mean(scored, DEFAULT)) + 1


def _mean(scored: Scored, rival: tuple[str, str]) -> float:
    return statistics.mean(one["nll"] for one in scored[rival].values())


def _table(found: dict[str, Scored], score: str) -> list[str]:
    """Return a table with a line per rival and a column per data set: mean and standard deviation over seeds."""
    seeds = {task: len(scored[DEFAULT]) for task, scored in found.items()}
    lines = [f"| | {' | '.join(f'{task} (seeds: {count})' for task, count in seeds.items())} |"]
    lines.append("|---" * (len(found) + 1) + "|")
    for rival, label in RIVALS.items():
        values = [[scores[score] for scores in scored[rival].values()] for scored in found.values()]
        lines.append(f"| {label} | {' | '.join(map(spread, values))} |")
    return lines


def _against(found: dict[str, Scored]) -> list[str]:
    """Return a table of the default's rank by mean NLL, and of its NLL minus that of three others of BLoB."""
    heads = "minus the paper's recipe | by seed | minus the paper's recipe, scale chosen | minus std 0.06, no scale"
    lines = [f"| data set | rank of all | rank of five | {heads} |", "|---|---|---|---|---|---|---|"]
    for task, scored in found.items():
        default, *others = (
            {seed: one["nll"] for seed, one in scored[rival].items()}
            for rival in (DEFAULT, PAPER, SCALED, ("default", "n10"))
        )
        (paper, by_seed), (scaled, _), (unscaled, _) = (difference(default, other) for other in others)
        cells = [_rank(scored, RIVALS), _rank(scored, METHODS), paper, by_seed, scaled, unscaled]
        lines.append(f"| {task} | {' | '.join(map(str, cells))} |")
    return lines


def _scales(found: dict[tuple[str, str, int], dict[str, Any]]) -> list[str]:
    """Return a table of the std in training and of the chosen factors."""
    lines = ["| data set | variant | std in training | factor, by seed |", "|---|---|---|---|"]
    for task in TASKS:
        for variant in ("paper", "default"):
            mine = {seed: found[task, variant, seed] for seed in SEEDS if (task, variant, seed) in found}
            if mine:
                std = statistics.mean(made["posterior"]["std"] for made in mine.values())
                factors = ", ".join(f"{seed}: {made['scale']:.3g}" for seed, made in mine.items())
                lines.append(f"| {task} | {variant} | {std:.4f} | {factors} |")
    return lines


INTRODUCTION = f"""# Comparison of the default width

This page compares BLoB with its default width (standard deviation) to the paper's recipe, plain LoRA and an ensemble
on little data. `python benchmarks/tables.py` makes it from the records in `results/widths`: one per data set,
variant and seed, with its command.

MiniLM is trained on {TRAINED} rows of each data set, in {SETTINGS["steps"]} updates of {SETTINGS["batch_size"]}:
about six passes. {HELD_OUT} further rows, on which no method trains, choose the scale of the standard deviations and
every temperature, with other draws than those that are scored. At most {SCORED} rows of dev and test are scored. For
each seed, all methods have the same rows. Rows of more than {SETTINGS["max_tokens"]} tokens are left out. Numbers
are means, with the standard deviation over seeds if there are several; NLL is in nats. A guess has an NLL of about
ln 4 = 1.386 on the first three data sets and of ln 2 = 0.693 on RTE and BoolQ; the constant answer that is right on
61 % of the rows of BoolQ has 0.667.

A user's default would take its held-out rows from the {TRAINED}; that was not run. Plain LoRA and the ensemble
without a temperature, and the paper's recipe without a scale, do not use the further rows.
"""

VERDICT = """**Of five methods (plain LoRA, plain LoRA with a temperature, the ensemble, BLoB by the paper's recipe
and the default), the default has the lowest or second-lowest mean NLL on {good} of {all} data sets.**
Its mean NLL is above that of the paper's recipe {where}. The ensemble costs three trainings, and has no
temperature here. On ARC-Challenge, RTE and BoolQ no method answers much better than a guess; a low NLL
there means that a method is not overconfident. On RTE every method is at the NLL of a guess or above it.

Most of the gain over the paper's recipe is that of the wider std and of a scale chosen on further rows:
if the paper's recipe gets a scale too, the difference is 0.02 nats or less. Choosing the scale helps the
std of 0.06 only on RTE; on the other data sets `--posterior-scale 1` is as good, and the choice moves
the NLL by 0.01 or less.
"""

AGAINST = f"""The lowest mean NLL has rank 1, among all {len(RIVALS)} lines of the tables, or among the five named
above. The differences are those of the default's NLL, as mean ± standard error over seeds. All seeds are scored on the
same rows, so the errors leave out the choice of rows.
"""
