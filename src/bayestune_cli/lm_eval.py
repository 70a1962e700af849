"""`bayestune lm-eval`: the tasks of lm-evaluation-harness, answered by the averaged draws of a run."""

from pathlib import Path
from typing import Annotated

import typer

from bayestune_cli.arguments import (
    Data,
    Draws,
    Overwrite,
    RunFolder,
    Seed,
    check_output_file,
    check_run,
    draw_count,
    load,
)
from bayestune_cli.errors import FlagError

TaskNames = Annotated[
    str, typer.Option(help="Tasks, groups and tags of lm-eval, comma-separated; * stands for anything.")
]
Shots = Annotated[
    int | None, typer.Option(min=0, help="Rows shown with their answers, if the task does not fix their number.")
]


def lm_eval(
    run: RunFolder,
    tasks: TaskNames,
    output: Annotated[Path | None, typer.Option(help="File for the results, one JSON object.")] = None,
    draws: Draws = None,
    seed: Seed = 0,
    num_fewshot: Shots = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Rows per task, from the first; default: all.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts per forward pass.")] = 8,
    include_path: Annotated[
        Path | None, typer.Option(help="Folder with YAML files of further tasks, as lm-eval reads them.")
    ] = None,
    apply_chat_template: Annotated[
        bool, typer.Option("--apply-chat-template", help="Put every question into the model's chat template.")
    ] = False,
    data: Data = None,
    overwrite: Overwrite = False,
) -> None:
    """Score a causal run on tasks of lm-evaluation-harness by whole-sequence probabilities averaged over draws."""
    check_run(run)
    if output is not None:
        check_output_file(output, overwrite=overwrite)
    if include_path is not None and not include_path.is_dir():
        raise FlagError(f"--include-path {include_path}: found no folder, expected one with YAML files of tasks.")

    from bayestune.experiment.lm_eval import Tasks, ask, record, tables
    from bayestune.files import check_writable, write_json

    if output is not None:
        check_writable(output.parent, f"--output {output}")
    folder = None if include_path is None else str(include_path)
    known = Tasks(include_path=folder)
    names = known.named(tasks)  # before the model is loaded
    loaded = load(run, data, None)
    asked = {"draws": draw_count(loaded, draws), "seed": seed, "batch_size": batch_size}
    options = {"num_fewshot": num_fewshot, "limit": limit, "apply_chat_template": apply_chat_template}
    results = ask(loaded, known, names, **asked, **options)
    print(tables(results))
    if output is not None:
        write_json(output, record(results, loaded, run, tasks=names, include_path=folder, **asked, **options))
        print(f"{output}: {', '.join(names)} with {asked['draws']} draws of seed {seed}")
