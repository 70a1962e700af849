"""`bayestune evaluate`."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayestune_cli.arguments import Data, Draws, Predictive, RunFolder, Seed, check_run, draw_count, load

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune.inference import Diagnostics
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
    """Score a run with 95 % intervals (of classes: accuracy, NLL, ECE, Brier), and detect out-of-distribution data."""
    check_run(run)

    from bayestune.experiment import detection, novelty_of, score_table
    from bayestune.inference import diagnostics
    from bayestune.inference import evaluate as scores_of

    loaded = load(run, data, predictive)
    count = draw_count(loaded, draws, predictive)
    method, temperature = loaded.experiment.method.name, loaded.posterior.temperature
    chosen = split or loaded.experiment.eval_split
    assert chosen is not None
    rows = loaded.task.rows(chosen)
    others = {name: _other_rows(loaded, name) for name in (ood.split(",") if ood else [])}
    prediction = loaded.predict(rows, draws=count, seed=seed, progress=True)
    far = novelty_of(loaded, loaded.task, rows) if others else None
    detected = {name: detection(loaded, prediction, rows, *one, known_novelty=far) for name, one in others.items()}
    scores = scores_of(prediction)
    diagnosed = None if prediction.spread() is None else diagnostics(loaded.posterior, prediction)
    if as_json:
        answer = {**scores.as_dict(), "task": loaded.task.name, "split": chosen, "seed": seed}
        averaged = predictive or loaded.posterior.settings().get("predictive", "mc")
        answer |= {"temperature": temperature, "predictive": averaged, "method": method}
        answer |= {"diagnostics": asdict(diagnosed)} if diagnosed else {}
        print(json.dumps({**answer, **({"ood": detected} if detected else {})}))
        return
    print(score_table({f"{method} N={count}{f' {predictive}' if predictive else ''}": scores}))
    if temperature != 1:
        print(f"temperature {temperature:.4g}")
    if diagnosed:
        print(_diagnosed(diagnosed, dict(loaded.experiment.method)))
    here = float(prediction.uncertainties()["epistemic"].mean()) if detected else 0.0
    _print_detected(detected, chosen, scores.headings, here)


def _diagnosed(found: "Diagnostics", settings: dict[str, Any]) -> str:
    """Return one line about the draws, and one about the width of the weights if they are Gaussian.

    The start and the prior are named if the method has settings for them.
    """
    factor = "" if found.softmax_factor is None else f" = {found.softmax_factor:.3f} x the logit variance"
    text = (
        f"draws: logit variance {found.logit_variance:.4g} (of the mean logits {found.mean_logit_variance:.4g}), "
        f"epistemic {found.epistemic:.4f} nats{factor}; draws needed for 0.01 nats: {found.draws_needed}"
    )
    if found.mean_std is None:
        return text
    start = f", of a new adapter {found.initial_std:.4g}" if "rho_init" in settings else ""
    prior = f", of the prior {found.prior_std:.4g}" if settings.keys() & {"prior_std", "ivon_prior_std"} else ""
    return f"{text}\nadapter: mean std {found.mean_std:.4g}{start}{prior}"


def _print_detected(
    detected: dict[str, dict[str, Any]], chosen: str, headings: Mapping[str, str], here: float
) -> None:
    """Print the scores on the other data sets, and how well each detector separates them from the run's own rows.

    `here` is the mean epistemic uncertainty on the run's own rows.
    """
    from bayestune.experiment.detection import DETECTORS

    for name, other in detected.items():
        text = ", ".join(f"{heading} {other[key]:.3f}" for key, heading in headings.items())
        print(f"{name}: {text}, epistemic {other['epistemic']:.4f} (here {here:.4f})")
        print(
            f"{'':4}AUROC, how well a score tells these rows from those of {chosen}; below 0.5 it is lower on these:"
        )
        for key, score in DETECTORS.items():
            if key in other:
                print(f"{'':4}{score:<44} {'none' if other[key] is None else format(other[key], '.3f')}")


def _other_rows(loaded: "Run", name: str) -> tuple["TokenizedTask", list["AnyRow"]]:
    """Return the task and the checked rows of another data set, `name` or `name:split`."""
    from bayestune.experiment import other_task

    dataset, _, split = name.partition(":")
    task = other_task(loaded, dataset)
    rows = task.rows(split or task.spec.evaluation)
    task.check(rows)
    return task, rows
