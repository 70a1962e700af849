"""`bayestune report`."""

from pathlib import Path
from typing import Annotated

import typer

from bayestune_cli.arguments import Overwrite, check_output_file


def report(
    results: Annotated[
        list[Path], typer.Argument(metavar="RESULTS...", help="Folders of records, such as results/table1.")
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Write an HTML report of table records: scores, reliability, risk-coverage, OOD detection, provenance."""
    check_output_file(output, overwrite=overwrite)

    from bayestune.files import write_text
    from bayestune.report.html import page_html
    from bayestune.tables import read_cells
    from bayestune.tables.page import report_page

    cells = read_cells(*results)
    write_text(output, page_html(report_page(cells)))
    print(f"{output}: {len(cells)} cells")
