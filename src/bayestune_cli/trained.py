"""`bayestune evaluate`, `predict` and `export`: what a trained run is for."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayestune_cli.console import FlagError, say

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune.inference import Prediction
    from bayestune.tasks import AnyRow, TokenizedTask

LINEARISED_DRAWS = 1000
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder that `bayestune train` made.")]
Data = Annotated[str | None, typer.Option(help="Folder of data sets; default: that of the run.")]
Draws = Annotated[
    int | None, typer.Option(help="Draws to average, 0 for the mean, if there is one; default: as trained.")
]
Predictive = Annotated[
    str | None,
    typer.Option(
        help="How to average, for blob, bbb, dropout and tfb: mc, independent draws (default); antithetic, pairs of "
        "opposite draws; linearised, Gaussian logits about the mean (not dropout), of which 1000 draws cost nothing."
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the draws.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --output.")]


def evaluate(
    run: RunFolder,
    data: Data = None,
    split: Annotated[str | None, typer.Option(help="Such as dev+test; default: that of the run.")] = None,
    draws: Draws = None,
    predictive: Predictive = None,
    seed: Seed = 0,
    ood: Annotated[
        str | None,
        typer.Option(help="Other data sets, with commas, as name or name:split, to be told apart."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a run: accuracy, NLL, ECE and Brier with 95 % intervals, and how well uncertainty finds other data."""
    from bayestune.experiment import score_table
    from bayestune.inference import evaluate as scores_of

    loaded = _load(run, data, predictive)
    count = _draws(loaded, draws, predictive)
    chosen = split or loaded.experiment.eval_split
    assert chosen is not None
    rows = loaded.task.rows(chosen)
    unknown = {name: _unknown(loaded, name) for name in (ood.split(",") if ood else [])}
    prediction = loaded.predict(rows, draws=count, seed=seed, progress=True)
    others = {name: _compared(loaded, *found, prediction, seed) for name, found in unknown.items()}
    scores = scores_of(prediction)
    if as_json:
        answer = {**scores.as_dict(), "task": loaded.task.name, "split": chosen, "seed": seed}
        answer["temperature"] = loaded.posterior.temperature
        answer["predictive"] = predictive or "mc"
        say(json.dumps({**answer, "method": loaded.experiment.method.name, **({"ood": others} if others else {})}))
        return
    say(score_table({f"{loaded.experiment.method.name} N={count}{f' {predictive}' if predictive else ''}": scores}))
    if loaded.posterior.temperature != 1:
        say(f"temperature {loaded.posterior.temperature:.4g}")
    for name, other in others.items():
        found = f"accuracy {other['accuracy']:.3f}, NLL {other['nll']:.3f}, epistemic {other['epistemic']:.4f} nats"
        say(f"{name}: {found} (here {prediction.epistemic.mean():.4f}), AUROC {other['auroc_epistemic']:.3f}")


def predict(
    run: RunFolder,
    input: Annotated[Path, typer.Option(help="Rows, .jsonl or .jsonl.gz; labels are not needed.")],
    output: Annotated[Path, typer.Option(help="File for the answers, one JSON object a row.")],
    data: Data = None,
    draws: Draws = None,
    predictive: Predictive = None,
    seed: Seed = 0,
    overwrite: Overwrite = False,
) -> None:
    """Answer rows: probabilities, the answer's index, and total, aleatoric and epistemic uncertainty in nats."""
    if output.exists() and not overwrite:
        raise FlagError(f"--output {output}: the file exists; choose another, or pass --overwrite.")
    if not output.parent.is_dir():
        raise FlagError(f"--output {output}: found no folder {output.parent}, expected one.")
    if output.is_dir() or output.resolve() == input.resolve():
        found = "a folder" if output.is_dir() else "the file of --input"
        raise FlagError(f"--output {output}: found {found}, expected another file to write.")

    from bayestune.experiment import write_text
    from bayestune.experiment.disk import check_writable
    from bayestune.tasks import read_rows

    check_writable(output.parent, f"--output {output}")
    rows = read_rows(input, labelled=False)
    loaded = _load(run, data, predictive)
    loaded.task.check(rows)
    prediction = loaded.predict(rows, draws=_draws(loaded, draws, predictive), seed=seed, progress=True)
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in prediction.records(rows)]
    write_text(output, "".join(lines))
    say(f"{output}: {len(lines)} rows")


def export(
    run: RunFolder,
    output: Annotated[Path, typer.Option(help="Folder to make: mean, draw_0, draw_1, ...")],
    draws: Annotated[
        int | None, typer.Option(help="Draws to write, 0 for the mean alone; default: as trained.")
    ] = None,
    seed: Seed = 0,
    data: Data = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the mean and draws of a run as ordinary LoRA adapters, for PEFT and for servers."""
    if output.exists() and not overwrite:
        raise FlagError(f"--output {output}: it exists; choose another, or pass --overwrite.")

    from bayestune.experiment import load_run
    from bayestune.experiment.disk import check_writable, writing
    from bayestune.serving.lora import export_lora

    check_writable(output.parent, f"--output {output}")
    loaded = load_run(run, data=data)
    count = _draws(loaded, draws)
    with writing(output):
        folders = export_lora(loaded.posterior, output, draws=count, seed=seed, overwrite=overwrite)
    for folder in folders:
        say(folder)


def _load(run: Path, data: str | None, predictive: str | None) -> "Run":
    """The run in a folder, its posterior averaged over as asked."""
    from bayestune.experiment import load_run
    from bayestune.methods import Variational

    loaded = load_run(run, data=data)
    if predictive is None:
        return loaded
    if not isinstance(loaded.posterior, Variational):
        method = loaded.experiment.method.name
        raise FlagError(f"--predictive: found it for a run of method {method!r}, expected blob, bbb, dropout or tfb.")
    posterior = Variational(loaded.model, temperature=loaded.posterior.temperature, predictive=predictive)
    return dataclasses.replace(loaded, posterior=posterior)


def _draws(loaded: "Run", draws: int | None, predictive: str | None = None) -> int:
    """What was asked for, or else the run's own number; many of linearised logits, which cost nothing."""
    if draws is not None and draws < 0:
        raise FlagError(f"--draws: found {draws}, expected 0 (the mean) or more.")
    if draws is not None:
        return draws
    return LINEARISED_DRAWS if predictive == "linearised" else loaded.default_draws


def _unknown(loaded: "Run", name: str) -> tuple["TokenizedTask", list["AnyRow"]]:
    """The task and the rows of another data set, `name` or `name:split`, checked."""
    from bayestune.experiment import other_task

    dataset, _, split = name.partition(":")
    task = other_task(loaded, dataset)
    rows = task.rows(split or task.spec.evaluation)
    task.check(rows)
    return task, rows


def _compared(
    loaded: "Run", task: "TokenizedTask", rows: list["AnyRow"], known: "Prediction", seed: int
) -> dict[str, Any]:
    """Scores on other rows, and the AUROC of telling them (positive) from `known` by their uncertainty."""
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
