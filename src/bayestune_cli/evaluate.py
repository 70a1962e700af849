"""`bayestune evaluate`."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayestune_cli.arguments import Data, Draws, Predictive, RunFolder, Seed, check_run, draw_count, load

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune.inference import Prediction
    from bayestune.tasks import AnyRow, TokenizedTask


def evaluate(
    run: RunFolder,
    data: Data = None,
    split: Annotated[str | None, typer.Option(help="Splits such as dev+test; default: the run's own.")] = None,
    draws: Draws = None,
    predictive: Predictive = None,
    seed: Seed = 0,
    ood: Annotated[
        str | None,
        typer.Option(
            help="Out-of-distribution data sets, comma-separated: name for its evaluation split, or name:split "
            "such as name:test."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a run: accuracy, NLL, ECE and Brier with 95 % intervals, and out-of-distribution detection."""
    check_run(run)

    from bayestune.experiment import score_table
    from bayestune.inference import evaluate as scores_of

    loaded = load(run, data, predictive)
    count = draw_count(loaded, draws, predictive)
    method, temperature = loaded.experiment.method.name, loaded.posterior.temperature
    chosen = split or loaded.experiment.eval_split
    assert chosen is not None
    rows = loaded.task.rows(chosen)
    others = {name: _other_rows(loaded, name) for name in (ood.split(",") if ood else [])}
    prediction = loaded.predict(rows, draws=count, seed=seed, progress=True)
    detected = {name: _compared(loaded, *other, prediction, seed) for name, other in others.items()}
    scores = scores_of(prediction)
    if as_json:
        answer = {**scores.as_dict(), "task": loaded.task.name, "split": chosen, "seed": seed}
        answer |= {"temperature": temperature, "predictive": predictive or "mc", "method": method}
        print(json.dumps({**answer, **({"ood": detected} if detected else {})}))
        return
    print(score_table({f"{method} N={count}{f' {predictive}' if predictive else ''}": scores}))
    if temperature != 1:
        print(f"temperature {temperature:.4g}")
    for name, other in detected.items():
        text = f"accuracy {other['accuracy']:.3f}, NLL {other['nll']:.3f}, epistemic {other['epistemic']:.4f} nats"
        print(f"{name}: {text} (here {prediction.epistemic.mean():.4f}), AUROC {other['auroc_epistemic']:.3f}")


def _other_rows(loaded: "Run", name: str) -> tuple["TokenizedTask", list["AnyRow"]]:
    """Return the task and the checked rows of another data set, `name` or `name:split`."""
    from bayestune.experiment import other_task

    dataset, _, split = name.partition(":")
    task = other_task(loaded, dataset)
    rows = task.rows(split or task.spec.evaluation)
    task.check(rows)
    return task, rows


def _compared(
    loaded: "Run", task: "TokenizedTask", rows: list["AnyRow"], known: "Prediction", seed: int
) -> dict[str, Any]:
    """Return scores on other rows, and the AUROC of detecting them (positive) among `known` by uncertainty."""
    import torch

    from bayestune import metrics
    from bayestune.inference import evaluate as scores_of

    prediction = loaded.predict(rows, draws=known.draws, seed=seed, task=task, progress=True)
    positive = torch.tensor([False] * len(known.ids) + [True] * len(rows))
    return {
        **scores_of(prediction).as_dict(),
        "epistemic": float(prediction.epistemic.mean()),
        "auroc_epistemic": metrics.auroc(torch.cat([known.epistemic, prediction.epistemic]), positive),
        "auroc_total": metrics.auroc(torch.cat([known.total, prediction.total]), positive),
    }
