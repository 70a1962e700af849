"""Tables made from cells: mean and standard deviation over seeds, the best marked, published figures beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bayestune.errors import ConfigError
from bayestune.report.markdown import markdown
from bayestune.report.views import Block, Line, Table, Value, shown
from bayestune.tables.cell_fields import Cell
from bayestune.tables.layouts import Column, Layout, check_columns, layout, line_keys, line_label
from bayestune.tables.summary import DETECTION, EPISTEMIC, MEASURES, Measure, Spread, ranks, spread

MISSING = Value(text="-")

_Key = tuple[str, int]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Figures of a paper's table: accuracy and ece in %, nll in nats.

    Attributes:
        table: ours that they belong to. source: named with them. caution: printed with them.
        models: names of the model (the last part of a path or a Hub id, in lower case) that was measured.
        rows: of a data set, the training rows and the evaluated rows.
        values: by the last part of a measure's path, (method, draws) and data set; draws are None where the paper's
            line stands beside any number of ours.
    """

    table: str
    source: str
    caution: str
    models: tuple[str, ...]
    rows: Mapping[str, tuple[int, int]]
    values: Mapping[str, Mapping[tuple[str, int | None], Mapping[str, float]]]

    def fits(self, cell: Cell) -> bool:
        """Whether the cell is of the same model and as many rows, so that the figures may stand beside it."""
        model = str(cell["experiment"]["model"]).replace("\\", "/").rstrip("/").rpartition("/")[-1].lower()
        rows = (cell["train_rows"], cell["rows"])
        same_data = cell["task"] == cell["eval_task"] and self.rows.get(cell["task"]) == rows
        return self.table == cell["table"] and model in self.models and same_data


def markdown_table(cells: Sequence[Cell], table: str, *, published: Sequence[Published] = ()) -> str:
    """`table_view` as Markdown; the same cells give the same bytes."""
    return markdown(table_view(cells, table, published=published))


def html_table(cells: Sequence[Cell], table: str, *, published: Sequence[Published] = ()) -> str:
    """`table_view` as an HTML page; needs jinja2. The same cells give the same bytes."""
    from bayestune.report.html import table_html

    return table_html(table_view(cells, table, published=published))


def table_view(cells: Sequence[Cell], table: str, *, published: Sequence[Published] = ()) -> Table:
    """What `table` shows of those of `cells` that are its own, which are as `read_cells` gives them.

    A value is the mean over seeds with the sample standard deviation; one of fewer seeds than the table has says how
    many. The best of a column and the second are marked, among values of the column's largest number of seeds.

    Raises:
        ConfigError: no such table, no cell of it, or a cell about a data set that it has no column for.
    """
    found = layout(table)
    own = [cell for cell in cells if cell["table"] == table]
    if not own:
        raise ConfigError(f"{table}: found no cells of this table, expected some.")
    check_columns(own, table)
    absent = [column.label for column in found.columns if column not in _run(own, found)]
    measures = MEASURES + (DETECTION if found.detection else ())
    seeds = sorted({cell["seed"] for cell in own})
    facts = (
        f"Made by: bayestune table {table} --rebuild, from {len(own)} {'cell' if len(own) == 1 else 'cells'}.",
        f"Model: {shown(own[0]['experiment']['model'])}.",
        f"n = {len(seeds)}: mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}."
        if len(seeds) > 1
        else f"n = 1: one run, seed {seeds[0]}.",
    )
    blocks = [measure_block(own, found, measure, published=published) for measure in measures]
    return Table(
        title=found.title,
        facts=facts,
        blocks=(*blocks, _rows(own, found)),
        notes=_notes(own, found, published, absent),
    )


def measure_block(
    cells: Sequence[Cell], found: Layout, measure: Measure, *, published: Sequence[Published] = ()
) -> Block:
    """One measure of a table's cells: a line a method, each followed by the published one where there is one."""
    columns = [column for column in _run(cells, found) if measure not in DETECTION or column.task != column.eval_task]
    keys, seeds = line_keys(cells), len({cell["seed"] for cell in cells})
    spreads = {column: _spreads(cells, measure, column, keys) for column in columns}
    marked = {column: ranks(measure, spreads[column]) for column in columns}
    lines: list[Line] = []
    for i, key in enumerate(keys):
        values = [
            Value(
                text=_text(measure, spreads[column][key], seeds),
                best=key in marked[column][0],
                second=key in marked[column][1],
            )
            if key in spreads[column]
            else MISSING
            for column in columns
        ]
        lines.append(Line(label=line_label(*key), values=tuple(values)))
        last = all(method != key[0] for method, _ in keys[i + 1 :])
        lines += _published_lines(cells, measure, key, columns, published, last=last)
    labels = tuple(column.label for column in columns)
    return Block(heading=measure.heading, corner="method", columns=labels, lines=tuple(lines))


def _spreads(cells: Sequence[Cell], measure: Measure, column: Column, keys: Sequence[_Key]) -> dict[_Key, Spread]:
    """One spread a line that has cells in the column; a single draw has no epistemic uncertainty to rank by."""
    found = {}
    for key in keys:
        values = [
            measure.of(cell) for cell in cells if in_column(cell, column) and (cell["method"], cell["draws"]) == key
        ]
        if values and not (measure in EPISTEMIC and key[1] < 2):
            found[key] = spread(values)
    return found


def _text(measure: Measure, found: Spread, seeds: int) -> str:
    deviation = "" if found.deviation is None else f" ± {measure.text(found.deviation)}"
    fewer = f" (n = {found.seeds})" if found.seeds < seeds else ""
    return f"{measure.text(found.mean)}{deviation}{fewer}"


def _published_lines(
    cells: Sequence[Cell],
    measure: Measure,
    key: _Key,
    columns: Sequence[Column],
    published: Sequence[Published],
    *,
    last: bool,
) -> Iterator[Line]:
    """The paper's line of the same method and draws, where it fits the cells; after our `last` of a method, any."""
    method, draws = key
    for figures in published:
        by_line = figures.values.get(measure.path[-1], {})
        for name in [(method, draws), *([(method, None)] if last else [])]:
            if name not in by_line:
                continue
            values = []
            for column in columns:
                ours = [cell for cell in cells if in_column(cell, column)]
                fits = bool(ours) and all(figures.fits(cell) for cell in ours) and column.eval_task in by_line[name]
                values.append(Value(text=f"{by_line[name][column.eval_task]:.2f}") if fits else MISSING)
            if any(value is not MISSING for value in values):
                text = line_label(*key) if name[1] is not None else line_label(method, 0).partition(",")[0]
                yield Line(label=f"{text}: {figures.source} [{figures.caution}]", values=tuple(values), published=True)


def _rows(cells: Sequence[Cell], found: Layout) -> Block:
    """Training rows, evaluated rows and updates behind each column."""
    lines = []
    for label, field in (("training rows", "train_rows"), ("evaluated rows", "rows"), ("updates", "steps")):
        texts = []
        for column in _run(cells, found):
            values = sorted({cell[field] for cell in cells if in_column(cell, column)})
            texts.append(Value(text="/".join(map(str, values))) if values else MISSING)
        lines.append(Line(label=label, values=tuple(texts)))
    labels = tuple(column.label for column in _run(cells, found))
    return Block(heading="Data", corner="", columns=labels, lines=tuple(lines))


def _notes(
    cells: Sequence[Cell], found: Layout, published: Sequence[Published], absent: Sequence[str]
) -> tuple[str, ...]:
    notes = [f"Data sets of the table that were not run: {', '.join(absent)}."] if absent else []
    notes += [
        "Best of a column bold, second underlined, among methods with the column's largest number of seeds; "
        "equal as printed is equal. (n = ...): fewer seeds than the table has. -: not run.",
        "ECE: 15 bins of equal width on the largest probability. N: draws averaged; N = 0 is the posterior's mean.",
    ]
    if found.detection:
        notes.append(
            "AUROC, AUPR (average precision): rows of the column are to be found among those of the training task's "
            "evaluation rows by their uncertainty; with fewer than two draws there is no epistemic part."
        )
    for figures in published:
        if any(figures.fits(cell) for cell in cells):
            notes.append(f"Lines [{figures.caution}]: figures of {figures.source}, not measured here.")
    return tuple(notes)


def _run(cells: Sequence[Cell], found: Layout) -> list[Column]:
    """The columns that have cells."""
    return [column for column in found.columns if any(in_column(cell, column) for cell in cells)]


def in_column(cell: Cell, column: Column) -> bool:
    """Whether the cell is of this data set."""
    return (cell["task"], cell["eval_task"]) == (column.task, column.eval_task)
