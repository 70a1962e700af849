"""The report of some cells: scores, calibration, selective prediction, prediction sets, other data, and provenance.

Figures pool the seeds: reliability diagrams and histograms hold the rows of all seeds, and a risk-coverage curve is
the mean over seeds. Each method is drawn with its most draws.
"""

import bisect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from bayestune.errors import ConfigError
from bayestune.metrics import ReliabilityBins
from bayestune.report.plots import Histogram, histogram_panels, reliability_panels, risk_panels, svg
from bayestune.report.views import Figure, Page, Section, Table, shown
from bayestune.tables.details import run_listings, threshold_listing
from bayestune.tables.fields import ALPHA, BINS, COVERAGES, HISTOGRAM_ENDS, Cell
from bayestune.tables.layouts import Column, layout, line_keys, line_label
from bayestune.tables.summary import ANSWERED, AURC, AUROC, ECE, SETS, Measure, spread
from bayestune.tables.table import counted, measure_block, table_view

_SCORES = "One line per method and one column per data set; means over seeds."
_RELIABILITY = (
    "Each bar is the accuracy of the answers given with that confidence (largest probability), in "
    f"{BINS} bins from 0 to 1. The bars of a calibrated model end on the dashed diagonal. ECE is the distance between "
    "accuracy and mean confidence, averaged over bins weighted by rows. The lower plots show the share of rows per "
    "bin, with the accuracy (blue) and the mean confidence (black) of all rows."
)
_SELECTIVE = (
    "If only the most confident rows are answered, risk is the share of wrong answers among them, and coverage is the "
    "share of rows answered. Lower risk is better; AURC is the area under the curve. Curves are means over seeds. The "
    "rows answered at a given error are the largest share of the most confident rows that meets it on these same rows."
)
_SETS = (
    "Instead of one answer, a prediction set holds several classes, and the right one among them with "
    f"{100 * (1 - ALPHA):g} % probability. LAC makes the smallest sets on average, and APS makes larger sets for hard "
    "rows. The thresholds come from half of the evaluated rows, the same half for every method, and the sets of the "
    "other half are scored. Coverage is over all rows together, not per row. Records without sets are left out."
)
_OTHER_DATA = (
    "The model was trained on one data set and evaluated on a different one. AUROC is the probability that a row of "
    "the other data (orange) has a higher uncertainty than a row of the first (blue). 50 % is chance; below one half, "
    "the uncertainty is lower on the other data. Total uncertainty is an out-of-distribution score; epistemic "
    "uncertainty is not an out-of-distribution score. The last bin also holds everything above."
)
_PROVENANCE = "These details are needed to reproduce the numbers. Absolute paths are cut to their last part."


class _Place(NamedTuple):
    """One column of a table, with its cells by line: one cell per seed."""

    heading: str
    column: Column
    lines: Mapping[tuple[str, int], list[Cell]]

    @property
    def drawn(self) -> dict[str, list[Cell]]:
        """By label, the line with the most draws of each method."""
        return {line_label(*key): self.lines[key] for key in _most_draws(self.lines)}


def _most_draws(keys: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return the (method, draws) with the most draws of each method: the last in the order of a table."""
    return list({method: (method, draws) for method, draws in keys}.values())


def report_page(cells: Sequence[Cell]) -> Page:
    """Make the report of cells from `read_cells`, of one or several tables.

    Raises:
        ConfigError: there are no cells, or a table does not exist or has no column for a cell.
    """
    if not cells:
        raise ConfigError("report: found no cells, expected some.")
    by_table = {name: [c for c in cells if c["table"] == name] for name in sorted({c["table"] for c in cells})}
    tables = {layout(name).title: table_view(own, name) for name, own in by_table.items()}
    places = {name: _places(own, name, alone=len(by_table) == 1) for name, own in by_table.items()}
    every = [place for found in places.values() for place in found]
    facts = (
        f"{counted(cells)}: {', '.join(tables)}",
        f"Model: {', '.join(sorted({shown(cell['experiment']['model']) for cell in cells}))}",
        f"Seeds: {', '.join(map(str, sorted({cell['seed'] for cell in cells})))}",
    )
    sections = (
        Section(heading="Scores", text=_SCORES, tables=tuple(tables.values())),
        Section(heading="Calibration", text=_RELIABILITY, figures=tuple(map(_reliability, every))),
        _selective(by_table, places),
        *_prediction_sets(by_table),
        *_other_data([place for place in every if place.column.task != place.column.eval_task]),
        Section(heading="Provenance", text=_PROVENANCE, listings=run_listings(cells)),
    )
    return Page(title="bayestune report", facts=facts, sections=sections)


def _places(own: Sequence[Cell], name: str, *, alone: bool) -> list[_Place]:
    """Return the columns that have cells, with the table in their headings unless it is the only one."""
    places = []
    for column in layout(name).present(own):
        lines = {
            (method, draws): [c for c in own if column.has(c) and (c["method"], c["draws"]) == (method, draws)]
            for method, draws in line_keys(filter(column.has, own))
        }
        places.append(_Place(column.label if alone else f"{_short(name)}, {column.label}", column, lines))
    return places


def _short(name: str) -> str:
    return layout(name).title.partition(":")[0]


def _reliability(place: _Place) -> Figure:
    panels = {label: (f"ECE {_spread(ECE, cells)}", _pooled_bins(cells)) for label, cells in place.drawn.items()}
    heading = f"Reliability on {place.heading}"
    return Figure(heading=heading, alt=f"{heading}: accuracy by confidence", svg=svg(reliability_panels(panels)))


def _pooled_bins(cells: Sequence[Cell]) -> ReliabilityBins:
    """Return the reliability bins of the rows of all cells together."""
    names = ("counts", "confidence", "accuracy")
    values = [[[math.nan if v is None else v for v in cell["reliability"][name]] for cell in cells] for name in names]
    counts, confidence, accuracy = torch.tensor(values, dtype=torch.float64)
    total = counts.sum(0)
    return ReliabilityBins(
        edges=torch.arange(BINS + 1, dtype=torch.float64) / BINS,
        counts=total.long(),
        confidence=(counts * confidence).nansum(0) / total,
        accuracy=(counts * accuracy).nansum(0) / total,
    )


def _selective(by_table: Mapping[str, Sequence[Cell]], places: Mapping[str, Sequence[_Place]]) -> Section:
    tables, figures, listings = [], [], []
    for name, own in by_table.items():
        columns = [place.column for place in places[name]]
        blocks = tuple(measure_block(own, columns, measure) for measure in (AURC, *ANSWERED))
        tables.append(Table(title=f"Risk and coverage: {_short(name)}", facts=(), blocks=blocks, notes=()))
        panels = {
            place.column.label: {label: _mean_curve(cells) for label, cells in place.drawn.items()}
            for place in places[name]
        }
        labels = [line_label(*key) for key in _most_draws(line_keys(own))]
        heading = f"Risk against coverage: {_short(name)}"
        figures.append(Figure(heading=heading, alt=heading, svg=svg(risk_panels(panels, labels))))
        for place in places[name]:
            listings.append(threshold_listing(place.heading, [c for cells in place.lines.values() for c in cells]))
    return Section(
        heading="Selective prediction",
        text=_SELECTIVE,
        tables=tuple(tables),
        figures=tuple(figures),
        listings=tuple(listings),
    )


def _prediction_sets(by_table: Mapping[str, Sequence[Cell]]) -> Iterator[Section]:
    """Yield the sizes and coverages of the prediction sets; nothing if no cell has any."""
    tables = []
    for name, own in by_table.items():
        cells = [cell for cell in own if cell.get("conformal")]
        blocks = tuple(measure_block(cells, layout(name).present(cells), measure) for measure in SETS)
        if cells:
            tables.append(Table(title=f"Prediction sets: {_short(name)}", facts=(), blocks=blocks, notes=()))
    if tables:
        yield Section(heading="Prediction sets", text=_SETS, tables=tuple(tables))


def _mean_curve(cells: Sequence[Cell]) -> tuple[list[float], list[float]]:
    """Return coverages of 1 % to 100 %, and the mean over cells of the risk where a cell first reaches them."""
    coverages = [k / COVERAGES for k in range(1, COVERAGES + 1)]
    risks = []
    for coverage in coverages:
        values = []
        for curve in (cell["risk_coverage"] for cell in cells):
            first = bisect.bisect_left(curve["coverage"], coverage - 1e-6)  # cells hold six decimals
            values.append(curve["risk"][min(first, len(curve["risk"]) - 1)])
        risks.append(spread(values).mean)
    return coverages, risks


def _other_data(places: Sequence[_Place]) -> Iterator[Section]:
    """Yield the histograms of the uncertainty on both data sets; nothing if there is no other data."""
    figures = []
    for place in places:
        panels = [
            (label, _pooled_histogram(cells, score))
            for score in ("total", "epistemic")
            for label, cells in place.drawn.items()
            if score != "epistemic" or cells[0]["draws"] > 1
        ]
        names = {"known": f"rows of {place.column.task}", "other": f"rows of {place.column.eval_task}"}
        picture = svg(histogram_panels(panels, **names))
        heading = f"Uncertainty on {place.heading}"
        figures.append(Figure(heading=heading, alt=f"{heading}: histograms of both data sets", svg=picture))
    if figures:
        yield Section(heading="Out-of-distribution detection", text=_OTHER_DATA, figures=tuple(figures))


def _pooled_histogram(cells: Sequence[Cell], score: str) -> Histogram:
    """Return the histogram of the rows of all cells together, with the AUROC as its caption."""
    known = [cell["in_distribution"]["uncertainty"][score]["counts"] for cell in cells]
    other = [cell["uncertainty"][score]["counts"] for cell in cells]
    below = "\nbelow one half" if spread([AUROC[score].of(cell) for cell in cells]).mean < 50 else ""
    return Histogram(
        caption=f"AUROC {_spread(AUROC[score], cells)}{below}",
        known=torch.tensor(known).sum(0).tolist(),
        other=torch.tensor(other).sum(0).tolist(),
        end=HISTOGRAM_ENDS[score],
        label=f"{score} uncertainty, nats",
    )


def _spread(measure: Measure, cells: Sequence[Cell]) -> str:
    value = spread([measure.of(cell) for cell in cells])
    return f"{value.mean:.1f} %" if value.deviation is None else f"{value.mean:.1f} ± {value.deviation:.1f} %"
