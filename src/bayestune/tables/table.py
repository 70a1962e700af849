"""Tables made from cells: mean and standard deviation over seeds, the best values marked, published figures added."""

from collections.abc import Iterator, Sequence

from bayestune.errors import ConfigError
from bayestune.report.views import Block, Line, Table, Value, shown
from bayestune.tables.fields import Cell
from bayestune.tables.layouts import Column, Layout, layout, line_keys, line_label
from bayestune.tables.paired import paired_blocks, paired_notes
from bayestune.tables.published import CAUTION, SOURCE, figures, is_published
from bayestune.tables.summary import AUROC, DETECTION, MEASURES, UNCERTAINTIES, Measure, Spread, ranks, spread

MISSING = Value(text="-")

_Key = tuple[str, int]


def table_view(cells: Sequence[Cell], table: str) -> Table:
    """Summarize the cells of one table.

    Each value is the mean over seeds with the sample standard deviation, and says how many seeds it has if there are
    fewer than in the rest of the table. In each column, the best and second best of the values with the most seeds are
    marked. The figures of the paper stand beside ours where model and rows are the same.

    Args:
        cells: cells from `read_cells`; those of different tables are ignored.
        table: name of the table.

    Raises:
        ConfigError: the table does not exist, has no cells, or has no column for the data set of a cell.
    """
    chosen = layout(table)
    own = [cell for cell in cells if cell["table"] == table]
    if not own:
        raise ConfigError(f"{table}: found no cells of this table, expected some.")
    for cell in own:
        if not any(column.has(cell) for column in chosen.columns):
            known = ", ".join(column.eval_task for column in chosen.columns)
            data_sets = f"{cell['task']!r} and evaluated on {cell['eval_task']!r}"
            raise ConfigError(f"{table}: found a cell trained on {data_sets}, expected one of {known}.")
    columns, seeds = chosen.present(own), sorted({cell["seed"] for cell in own})
    over = f"n = {len(seeds)}: mean ± sample standard deviation over seeds {', '.join(map(str, seeds))}."
    facts = (
        f"Made by: bayestune table {table} --rebuild, from {counted(own)}.",
        f"Model: {shown(own[0]['experiment']['model'])}.",
        over if len(seeds) > 1 else f"n = 1: one run, seed {seeds[0]}.",
    )
    measures = MEASURES + (DETECTION if chosen.detection else ())
    blocks = [*(measure_block(own, columns, measure) for measure in measures), *paired_blocks(own, columns)]
    notes = tuple(_notes(own, chosen, columns))
    return Table(title=chosen.title, facts=facts, blocks=(*blocks, _data_block(own, columns)), notes=notes)


def counted(cells: Sequence[Cell]) -> str:
    """Return "1 cell", "2 cells", ..."""
    return f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}"


def measure_block(cells: Sequence[Cell], columns: Sequence[Column], measure: Measure) -> Block:
    """Return one measure with a line per method, each followed by the published line if there is one."""
    if measure in DETECTION:
        columns = [column for column in columns if column.task != column.eval_task]
    keys, seeds = line_keys(cells), len({cell["seed"] for cell in cells})
    spreads = [_spreads(cells, measure, column) for column in columns]
    ranked = [ranks(measure, by_key) for by_key in spreads]
    lines: list[Line] = []
    for i, key in enumerate(keys):
        values = [
            Value(text=_text(measure, by_key[key], seeds), best=key in best, second=key in second)
            if key in by_key
            else MISSING
            for by_key, (best, second) in zip(spreads, ranked, strict=True)
        ]
        lines.append(Line(label=line_label(*key), values=tuple(values)))
        last = all(method != key[0] for method, _ in keys[i + 1 :])
        lines += _published_lines(cells, measure, key, columns, last=last)
    labels = tuple(column.label for column in columns)
    return Block(heading=measure.heading, corner="method", columns=labels, lines=tuple(lines))


def _spreads(cells: Sequence[Cell], measure: Measure, column: Column) -> dict[_Key, Spread]:
    """Return one spread per line with cells in the column. A single draw has no epistemic uncertainty."""
    values: dict[_Key, list[float]] = {}
    for cell in cells:
        if column.has(cell) and not ("epistemic" in measure.path and cell["draws"] < 2):
            values.setdefault((cell["method"], cell["draws"]), []).append(measure.of(cell))
    return {key: spread(found) for key, found in values.items()}


def _text(measure: Measure, value: Spread, seeds: int) -> str:
    deviation = "" if value.deviation is None else f" ± {measure.text(value.deviation)}"
    fewer = f" (n = {value.seeds})" if value.seeds < seeds else ""
    return f"{measure.text(value.mean)}{deviation}{fewer}"


def _published_lines(
    cells: Sequence[Cell], measure: Measure, key: _Key, columns: Sequence[Column], *, last: bool
) -> Iterator[Line]:
    """Yield the published line of the same method and draws; after the `last` line of a method, also of any draws."""
    method, draws = key
    for number in (draws, None) if last else (draws,):
        by_task = figures().get((measure.path[-1], method, number), {})
        values = []
        for column in columns:
            ours = [cell for cell in cells if column.has(cell)]
            fits = ours and all(map(is_published, ours)) and column.eval_task in by_task
            values.append(Value(text=f"{by_task[column.eval_task]:.2f}") if fits else MISSING)
        if any(value is not MISSING for value in values):
            label = line_label(method, 0).partition(",")[0] if number is None else line_label(*key)
            yield Line(label=f"{label}: {SOURCE} [{CAUTION}]", values=tuple(values), published=True)


def _data_block(cells: Sequence[Cell], columns: Sequence[Column]) -> Block:
    """Return the training rows, evaluated rows and updates behind each column."""
    lines = []
    for label, field in (("training rows", "train_rows"), ("evaluated rows", "rows"), ("updates", "steps")):
        numbers = [sorted({cell[field] for cell in cells if column.has(cell)}) for column in columns]
        lines.append(Line(label=label, values=tuple(Value(text="/".join(map(str, values))) for values in numbers)))
    labels = tuple(column.label for column in columns)
    return Block(heading="Data", corner="", columns=labels, lines=tuple(lines))


def _below_half(cells: Sequence[Cell], columns: Sequence[Column], uncertainty: str) -> str:
    """Name the lines and columns in which the mean AUROC of an uncertainty is below one half."""
    places = []
    for column in columns:
        if column.task != column.eval_task:
            by_key = _spreads(cells, AUROC[uncertainty], column)
            low = [key for key in line_keys(cells) if key in by_key and by_key[key].mean < 50]
            places += [f"{line_label(*key)} on {column.label}" for key in low]
    return f"{UNCERTAINTIES[uncertainty]} of {', '.join(places)}" if places else ""


def _notes(cells: Sequence[Cell], chosen: Layout, columns: Sequence[Column]) -> Iterator[str]:
    absent = [column.label for column in chosen.columns if column not in columns]
    if absent:
        yield f"Data sets of the table that were not run: {', '.join(absent)}."
    yield (
        "Bold: best of the column. Underlined: second best. Only values with the column's largest number of seeds are "
        "ranked, and values that print the same are equal. (n = ...): fewer seeds than the table has. -: not run."
    )
    yield (
        "ECE: 15 bins of equal width on the largest probability. N: number of draws averaged; N = 0 is the posterior "
        "mean."
    )
    if chosen.detection:
        yield (
            "AUROC, AUPR (average precision): how well each uncertainty separates the rows of the column (positive) "
            "from the evaluation rows of the training task. With fewer than two draws, epistemic uncertainty is zero."
        )
        below = [text for name in AUROC if (text := _below_half(cells, columns, name))]
        if below:
            yield f"AUROC below 50 %, so lower uncertainty on the other data: {'; '.join(below)}."
    yield from paired_notes(cells, columns)
    if any(map(is_published, cells)):
        yield f"Lines [{CAUTION}]: figures of {SOURCE}, not measured here."
