"""`bayestune table`."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayestune_cli.arguments import check_data
from bayestune_cli.config import read_config
from bayestune_cli.errors import FlagError
from bayestune_cli.signals import Stopped

if TYPE_CHECKING:
    from bayestune.tables.grid import Grid

_PLACES = ("data", "model", "steps")
"""Flags that are settings of every run."""

_TABLES = ("table1", "table2", "roberta")


def _check_table(name: str) -> str:
    if name not in _TABLES:
        raise FlagError(f"table: found {name!a}, expected one of {', '.join(_TABLES)}.")
    return name


def table(
    table: Annotated[str, typer.Argument(metavar="TABLE", callback=_check_table, help="table1, table2 or roberta.")],
    data: Annotated[
        str | None, typer.Option(callback=check_data, help="Folder of data sets; default: the Hugging Face Hub.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file, Hugging Face id, or package: minilm, smollm2.")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, comma-separated; default 1,2,3.")] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Lines of the table, comma-separated; default: all without a target posterior std."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates per run; default 1000.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Training sets, comma-separated; default: all of the table.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of `bayestune train` settings for every run; flags take precedence.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs, shared by all tables.")] = Path("runs/tables"),
    results: Annotated[Path, typer.Option(help="Folder of the records, one JSON file per cell.")] = Path("results"),
    output: Annotated[Path, typer.Option(help="Folder for TABLE.md and TABLE.html.")] = Path("tables"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what is missing.")] = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Make the runs on a Ray cluster: local (start Ray here), auto (this machine's), ray://host:10001.",
        ),
    ] = None,
    gpus_per_cell: Annotated[
        float | None, typer.Option(min=0, help="GPUs that Ray reserves per run; default 0.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Train nothing; build the table from --results.")] = False,
) -> None:
    """Reproduce a table of the paper as Markdown and HTML. Resumes automatically."""
    given = {"data": data, "model": model, "seeds": seeds, "methods": methods, "steps": steps, "tasks": tasks}
    given |= {"config": config, "dry-run": dry_run, "ray": ray, "gpus-per-cell": gpus_per_cell}
    if gpus_per_cell is not None and ray is None:
        raise FlagError("table: found --gpus-per-cell without --ray, expected both, or neither.")
    if rebuild:
        unused = next((name for name, value in given.items() if value), None)
        if unused:
            raise FlagError(f"table: found --{unused} with --rebuild, expected one of the two: it is for training.")
    else:
        _train(_grid(table, given, results=results, runs=runs), dry_run=dry_run, ray=ray, gpus=gpus_per_cell or 0.0)
    if not dry_run:
        _build(table, results, output)


def _grid(table: str, given: Mapping[str, Any], *, results: Path, runs: Path) -> "Grid":
    """Return the runs that the flags ask for."""
    settings = {} if given["config"] is None else read_config(given["config"])
    settings = {"recipe": "paper"} | settings | {name: given[name] for name in _PLACES if given[name] is not None}
    if "model" not in settings:
        raise FlagError("table: found no --model, expected one (or --rebuild, which trains nothing).")
    seeds = _seeds(given["seeds"] or "1,2,3")

    from bayestune.tables.grid import Grid
    from bayestune.tables.layouts import lines

    by_default = [name for name, (_, line) in lines().items() if line.by_default]
    return Grid(
        table=table,
        seeds=seeds,
        methods=given["methods"].split(",") if given["methods"] else by_default,
        tasks=given["tasks"].split(",") if given["tasks"] else None,
        settings=settings,
        results=results,
        runs=runs,
        command=["bayestune", *sys.argv[1:]],
    )


def _train(grid: "Grid", *, dry_run: bool, ray: str | None, gpus: float) -> None:
    """Print what is missing, and train it unless `dry_run`: here, or on the Ray cluster at an address."""
    from bayestune.tables.fill import run_table
    from bayestune.tables.grid import plan

    missing = plan(grid)
    took = "an unknown time" if missing.seconds is None else f"about {missing.seconds / 60:.0f} min"
    print(f"{grid.table}: {len(missing.runs)} runs missing, for {missing.cells} cells, {took}")
    for line in missing.left_out:
        print(f"left out: {line}")
    if dry_run:
        return
    try:
        if ray is None:
            run_table(grid, progress=True)
        else:
            from bayestune.tables.cluster import run_on_ray

            run_on_ray(grid, address=ray, gpus=gpus, progress=True)
    except Stopped:
        print("stopped: finished runs are kept; the same command resumes", file=sys.stderr)
        raise


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise FlagError(f"--seeds: found {text!r}, expected whole numbers from 0, comma-separated, such as 1,2,3.")
    return list(dict.fromkeys(seeds))


def _build(name: str, results: Path, output: Path) -> None:
    """Print the table made from the records under `results`, and write it to `output`."""
    from bayestune.files import write_text
    from bayestune.report.html import table_html
    from bayestune.report.markdown import markdown
    from bayestune.tables import read_cells
    from bayestune.tables.table import table_view

    view = table_view(read_cells(results / name), name)
    text, page = markdown(view), table_html(view)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / f"{name}.md", text)
    write_text(output / f"{name}.html", page)
    print(text)
    print(f"{output / name}.md, .html")
