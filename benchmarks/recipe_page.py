"""docs/recipe.md: the records of `recipe.py` as a table."""

import statistics
from collections.abc import Sequence
from typing import Any

from over_seeds import spread
from recipe_variants import HELD_OUT, SETTINGS, TRAIN_ROWS, TUNED_ON, VARIANTS, WARM_UP, updates

from bayestune.experiment import Experiment
from bayestune.methods import Blob
from bayestune.training import initial_std, kl_only_std

METRICS = {"accuracy": "accuracy", "nll": "NLL", "ece": "ECE", "brier": "Brier"}


def page(records: Sequence[dict[str, Any]]) -> str:
    """Return the records as Markdown: one line per variant, with the difference of its NLL from the paper's recipe."""
    heads = [
        "variant",
        "draws",
        *METRICS.values(),
        "NLL minus the paper's, by seed",
        "std",
        "std without data",
        "seconds",
    ]
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, variant in VARIANTS.items():
        paper = {r["seed"]: r["scores"]["n10"]["nll"] for r in records if r["variant"] == variant.against}
        mine = [r for r in records if r["variant"] == name]
        for key in ("mle", "n0", "n10"):
            found = [r for r in mine if key in r["scores"]]
            if not found:
                continue
            cells = [spread([r["scores"][key][m] for r in found]) for m in METRICS]
            less = ", ".join(f"{r['scores'][key]['nll'] - paper[r['seed']]:+.3f}" for r in found if r["seed"] in paper)
            width = "" if found[0]["std"] is None else f"{statistics.mean(r['std'] for r in found):.4f}"
            fixed = width and not (variant.empirical or variant.adaptive)
            alone = f"{std_without_data(found[0]):.4f}" if fixed else ""
            took = f"{statistics.mean(r['seconds'] for r in found):.0f}"
            draws = {"mle": "0", "n0": "0", "n10": "10"}[key]
            lines.append(f"| {variant.what} | {draws} | {' | '.join(cells)} | {less} | {width} | {alone} | {took} |")
    return INTRODUCTION + "\n" + "\n".join(lines) + "\n"


def std_without_data(record: dict[str, Any]) -> float:
    """Return the standard deviation that the KL alone reaches from the mean initial standard deviation."""
    experiment = Experiment.from_dict(
        {name: value for name, value in record["experiment"].items() if name != "train_draws"}, where="record"
    )
    method = experiment.method
    assert isinstance(method, Blob)
    kl = method.kl(updates(experiment, TRAIN_ROWS))
    return kl_only_std(
        kl.learning_rate,
        updates=experiment.steps,
        cycle=kl.cycle,
        schedule=kl.schedule,
        start=initial_std(method.rho_init),
        prior_std=method.prior_std,
        warmup=WARM_UP,
    )


INTRODUCTION = f"""# Changes to the recipe of BLoB

This page compares variants of BLoB, one change at a time, on little data. `python benchmarks/recipe.py --page` makes
it from the records in `results/recipe`: one per variant and seed, with its command.

MiniLM is trained on the first {TRAIN_ROWS} rows of OpenBookQA's train split, in {SETTINGS["steps"]} updates of
{SETTINGS["batch_size"]} rows, and scored on {HELD_OUT} other rows of that split. The settings of the baseline were
chosen on the {TUNED_ON} rows after those. The ARC-Easy lines train on {TRAIN_ROWS} rows of ARC-Easy's train split and
score 851 other rows. The lines "150 updates" and "600 updates" use a different number of updates. The lines of
ARC-Easy, 150 updates and 600 updates are each compared with the first line of their group.

All runs of a seed share rows, order and starting weights. The NLL (in nats) is therefore also given as the
difference from the paper's recipe with 10 draws for each seed. Scores are means, with the standard deviation over
seeds if there are several. The remaining columns are:

- **std**: the mean standard deviation of a weight of A.
- **std without data**: the standard deviation that the steps of the KL alone would reach.
- **seconds**: the training time on one core, which was sometimes shared.

## Width of the posterior

The two columns of standard deviations agree: in runs this short, the KL rate, the KL weights and the number of updates
determine the width of the posterior (its std), and the data hardly changes it.

While the std is small compared with the prior's, each update adds about 4 x rate x weight to std = G^2. A run of C
cycles, with a learning rate that falls linearly to 0, therefore ends near `std = start + 2 x rate x C`. A cycle is
`functional.cycle_steps(rows, batch_size)` updates, here 47, so 300 updates are 6.4 cycles. `start` is 0.0018
(`rho_init` 0.05). For the paper's rate this gives 0.0018 + 2 x 0.002 x 6.4 = 0.027.

The rate thus determines the width, so choose it on held-out rows (a separate split, with `--eval-split`). With
`posterior_std` you set the width instead, and the rate is derived exactly. In a run of one or two cycles, the paper's
weights produce the whole width in a few updates; `kl_schedule` "uniform" increases it steadily.

## Findings

- A wider posterior is the only change whose gain exceeds the differences between seeds. It helps with few rows and
  many passes, and does not help in 150 updates.
- At equal width, the KL weights make no difference.
- Flipout, two draws per update, AdamW for G, and different priors were run with one seed each. They change the scores
  by no more than a different seed does.
- The empirical-Bayes prior is about as bad as not training: the NLL of a guess among four is ln 4 = 1.386.
- Seed 2 of ARC-Easy also learned nothing, at both widths. The means and deviations of ARC-Easy therefore say little;
  compare seed by seed.

The default is the width 0.06 with uniform KL weights, because the paper's weights leave short runs with almost no
width. One width does not fit both few rows and many: on all of OpenBookQA's train split, in 600 updates, plain LoRA is
only mildly overconfident, and the width 0.06 does not lower the NLL and has a lower accuracy than the paper's rate
("BLoB, std 0.06" in [table 1](tables/table1.md)). `--recipe paper` uses the paper's settings.

## Results
"""
