"""The report of some cells: tables, reliability, risk against coverage, detection of other data, and how it was made.

Cells of several seeds are put together: the rows of all seeds in one reliability diagram or histogram, the mean of
their risks in one risk-coverage curve.
"""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from bayestune.errors import ConfigError
from bayestune.report.charts import area_key, histogram_chart, line_key, line_look, reliability_chart, risk_chart
from bayestune.report.views import Chart, Group, Page, Section, Table, shown
from bayestune.tables.cell_fields import BINS, COVERAGES, HISTOGRAM_BINS, HISTOGRAM_ENDS, Cell
from bayestune.tables.details import run_listings, threshold_listing
from bayestune.tables.layouts import Column, Layout, layout, line_keys, line_label
from bayestune.tables.summary import AURC, DETECTION, MEASURES, Measure, spread
from bayestune.tables.view import Published, in_column, measure_block, table_view

_ECE = MEASURES[1]
_AUROC = {measure.path[1]: measure for measure in DETECTION if measure.path[-1] == "auroc"}
_SCORES = {"total": "total uncertainty", "epistemic": "epistemic uncertainty"}


class _Part(NamedTuple):
    """The cells of one line of one column of a table: one for each seed."""

    key: tuple[str, int]
    cells: list[Cell]

    @property
    def label(self) -> str:
        return line_label(*self.key)


class _Place(NamedTuple):
    """One column of a table that has cells."""

    heading: str
    column: Column
    parts: list[_Part]


def report_page(cells: Sequence[Cell], *, published: Sequence[Published] = ()) -> Page:
    """The report of `cells`, which are as `read_cells` gives them, of one table or of several.

    Raises:
        ConfigError: no cells, a table that does not exist, or a cell that its table has no column for.
    """
    if not cells:
        raise ConfigError("report: found no cells, expected some.")
    names = sorted({cell["table"] for cell in cells})
    tables = {layout(name).title: table_view(cells, name, published=published) for name in names}
    places = [place for name in names for place in _places(cells, name, alone=len(names) == 1)]
    models = sorted({shown(cell["experiment"]["model"]) for cell in cells})
    seeds = sorted({cell["seed"] for cell in cells})
    sections = (
        Section(
            heading="Scores",
            text="One line a method, one column a data set; means over seeds.",
            tables=tuple(tables.values()),
        ),
        _reliability(places),
        _risk(cells, names, places),
        *_detection(places),
        Section(
            heading="How it was made",
            text="What is needed to repeat the numbers. Folders of the machine are cut to their last part.",
            listings=run_listings(cells),
        ),
    )
    facts = (
        f"{len(cells)} {'cell' if len(cells) == 1 else 'cells'}: {', '.join(tables)}",
        f"Model: {', '.join(models)}",
        f"Seeds: {', '.join(map(str, seeds))}",
    )
    return Page(title="bayestune report", facts=facts, sections=sections)


def _places(cells: Sequence[Cell], name: str, *, alone: bool) -> Iterator[_Place]:
    """The columns of the table `name` that have cells, and their lines."""
    found, own = layout(name), [cell for cell in cells if cell["table"] == name]
    for column in found.columns:
        inside = [cell for cell in own if in_column(cell, column)]
        parts = [
            _Part(key, [cell for cell in inside if (cell["method"], cell["draws"]) == key])
            for key in line_keys(inside)
        ]
        if parts:
            yield _Place(column.label if alone else f"{_short(found)}, {column.label}", column, parts)


def _drawn(parts: Sequence[_Part]) -> list[_Part]:
    """Of each method the line with the most draws: a picture for each number of draws would be too many to read."""
    return list({part.key[0]: part for part in parts}.values())


def _short(found: Layout) -> str:
    return found.title.partition(":")[0]


def _reliability(places: Sequence[_Place]) -> Section:
    keys = (
        area_key("accuracy", "accuracy of the bin"),
        line_key("sure", "mean confidence of the bin"),
        area_key("over", "overconfident by"),
        area_key("under", "underconfident by"),
    )
    text = (
        f"Each bar is the share of right answers among those given with that confidence (largest probability), in "
        f"{BINS} bins from 0 to 1. Calibrated bars end on the dashed diagonal. ECE is the mean distance to the mean "
        "confidence, weighted by rows. Pale bins hold less than 1 % of the rows. Rows of all seeds together; each "
        "method with its most draws."
    )
    groups = [
        Group(
            heading=f"Reliability on {place.heading}",
            keys=keys,
            charts=tuple(_reliability_of(part) for part in _drawn(place.parts)),
        )
        for place in places
    ]
    return Section(heading="Does confidence mean what it says?", text=text, groups=tuple(groups))


def _reliability_of(part: _Part) -> Chart:
    """One diagram of the rows of all seeds."""
    counts, sums = [0] * BINS, {"confidence": [0.0] * BINS, "accuracy": [0.0] * BINS}
    for cell in part.cells:
        for b, count in enumerate(cell["reliability"]["counts"]):
            counts[b] += count
            for name, total in sums.items():
                total[b] += count * (cell["reliability"][name][b] or 0.0)
    means = {
        name: [total / count if count else None for total, count in zip(totals, counts, strict=True)]
        for name, totals in sums.items()
    }
    return reliability_chart(
        part.label, f"ECE {_spread_text(_ECE, part.cells)} %, {sum(counts):,} rows", counts=counts, **means
    )


def _risk(cells: Sequence[Cell], names: Sequence[str], places: Sequence[_Place]) -> Section:
    text = (
        "Answer only the rows of which the model is surest: risk, the share of wrong answers among them, against "
        "coverage, the share of rows answered. Lower is better; AURC is the area under the curve. "
        "Curves are means over seeds, of each method with its most draws."
    )
    tables = [
        Table(
            title=f"Area under the risk-coverage curve: {_short(layout(name))}",
            facts=(),
            blocks=(measure_block([cell for cell in cells if cell["table"] == name], layout(name), AURC),),
            notes=(),
        )
        for name in names
    ]
    groups = [_curves([cell for cell in cells if cell["table"] == name], name) for name in names]
    listings = tuple(threshold_listing(place.heading, [part.cells for part in place.parts]) for place in places)
    return Section(
        heading="What if it may stay silent?", text=text, tables=tuple(tables), groups=tuple(groups), listings=listings
    )


def _curves(cells: Sequence[Cell], name: str) -> Group:
    """Risk-coverage curves of a table, a picture a column; a method has the same look in all of them."""
    most = dict(line_keys(cells))  # the last of a method has the most
    looks = {key: line_look(k) for k, key in enumerate(most.items())}
    charts = []
    for place in _places(cells, name, alone=True):
        curves = [(looks[part.key], *_mean_curve(part.cells)) for part in place.parts if part.key in looks]
        charts.append(risk_chart(place.heading, "", curves))
    return Group(
        heading=f"Risk against coverage: {_short(layout(name))}",
        keys=tuple(line_key(look, line_label(*key)) for key, look in looks.items()),
        charts=tuple(charts),
    )


def _mean_curve(cells: Sequence[Cell]) -> tuple[list[float], list[float]]:
    """Coverages of 1 % to 100 %, and the mean over cells of the risk where each one's coverage first reaches them."""
    coverages = [k / COVERAGES for k in range(1, COVERAGES + 1)]
    risks = []
    for coverage in coverages:
        # Cells hold coverages with six decimals.
        found = [bisect.bisect_left(cell["risk_coverage"]["coverage"], coverage - 1e-6) for cell in cells]
        values = [
            cell["risk_coverage"]["risk"][min(place, len(cell["risk_coverage"]["risk"]) - 1)]
            for cell, place in zip(cells, found, strict=True)
        ]
        risks.append(spread(values).mean)
    return coverages, risks


def _detection(places: Sequence[_Place]) -> Iterator[Section]:
    """Histograms of the uncertainty on other data and on the training task's; nothing where there is no other data."""
    text = (
        "The model was trained on one data set and is asked about another. Where it is less certain of the other data "
        "(orange, right of blue), the two can be told apart: AUROC is the share of pairs in the right order, 50 % is "
        "chance. Entropies are in nats; the last bin also holds what lies above. Rows of all seeds together; each "
        "method with its most draws."
    )
    groups = []
    for place in places:
        if place.column.task == place.column.eval_task:
            continue
        keys = (
            area_key("known", f"rows of {place.column.task}"),
            area_key("other", f"rows of {place.column.eval_task}"),
        )
        charts = [
            _histogram(part, score)
            for score in _SCORES
            for part in _drawn(place.parts)
            if score != "epistemic" or part.cells[0]["draws"] > 1
        ]
        heading = f"Uncertainty on {place.heading}"
        groups.append(Group(heading=heading, keys=keys, charts=tuple(charts)))
    if groups:
        yield Section(heading="Does it notice other data?", text=text, groups=tuple(groups))


def _histogram(part: _Part, score: str) -> Chart:
    known, other = [0] * HISTOGRAM_BINS, [0] * HISTOGRAM_BINS
    for cell in part.cells:
        for total, found in ((known, cell["in_distribution"]["uncertainty"]), (other, cell["uncertainty"])):
            for b, count in enumerate(found[score]["counts"]):
                total[b] += count
    return histogram_chart(
        part.label,
        f"{score}, AUROC {_spread_text(_AUROC[score], part.cells)} %",
        known=known,
        other=other,
        end=HISTOGRAM_ENDS[score],
        x_label=f"{_SCORES[score]}, nats",
    )


def _spread_text(measure: Measure, cells: Sequence[Cell]) -> str:
    found = spread([measure.of(cell) for cell in cells])
    return f"{found.mean:.1f}" if found.deviation is None else f"{found.mean:.1f} ± {found.deviation:.1f}"
