"""Pictures of calibration and uncertainty; the same data gives the same bytes. Only this file imports matplotlib.

`reliability_diagram` writes files; `svg` returns a picture for a page.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bayestune import metrics
from bayestune.errors import DataError

try:
    import matplotlib
    import matplotlib.style
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("diagrams need matplotlib: pip install '.[report]'", name=error.name) from error

Curves = Mapping[str, tuple[Tensor, Tensor]]

ACCURACY = "#5b8ec4"
# Edge, face and hatch of the bar between the accuracy and the confidence of a bin.
OVERCONFIDENT = ("#c23b4a", "#fbe3e4", "////")
UNDERCONFIDENT = ("#2a7f3e", "#e0f2e1", "\\\\\\\\")
KNOWN, OTHER = "#2f6fb3", "#d9772b"
LINES = ("#8a3033", "#d9772b", "#b59b00", "#2a7f3e", "#1695a3", "#2f6fb3", "#6a4fb3", "#55606e")
TICKS = (0, 0.25, 0.5, 0.75, 1)
_STYLE = Path(__file__).with_name("plots.mplstyle")


class Histogram(NamedTuple):
    """Counts of the rows of two data sets in the same bins of equal width from 0 to `end`."""

    caption: str
    known: Sequence[int]
    other: Sequence[int]
    end: float
    label: str


def reliability_diagram(curves: Curves, path_png: str | Path, path_svg: str | Path) -> None:
    """Write the picture of `reliability_figure` as PNG and as SVG.

    Raises:
        DataError: as `reliability_figure`.
        OSError: a file cannot be written.
    """
    figure = reliability_figure(curves)
    with _own_style():
        figure.savefig(path_png, format="png", dpi=200, metadata={"Software": None})
        figure.savefig(path_svg, format="svg", metadata={"Date": None})


def reliability_figure(curves: Curves) -> Figure:
    """Draw `reliability_panels` of predictions in 15 bins, with the ECE as captions.

    Args:
        curves: log_probs [rows, classes] and labels [rows], by name of the method.

    Raises:
        DataError: `curves` is empty, or a curve cannot be scored.
    """
    if not curves:
        raise DataError("reliability diagram: no curves, expected at least one method")
    captions = {name: f"ECE {100 * metrics.ece(*curve):.1f} %" for name, curve in curves.items()}
    return reliability_panels(
        {name: (captions[name], metrics.reliability_bins(*curve)) for name, curve in curves.items()}
    )


def reliability_panels(panels: Mapping[str, tuple[str, metrics.ReliabilityBins]]) -> Figure:
    """Draw one panel per title, with its caption, in the order of `panels`.

    The upper axes show the accuracy of each bin as a bar, its distance to the mean confidence (the black tick) as a
    hatched bar, and the diagonal of perfect calibration. The lower axes show the share of rows per bin, with the
    accuracy and the mean confidence of all rows as lines.
    """
    with _own_style():
        titles = [f"{title}\n{caption}" for title, (caption, _) in panels.items()]
        figure, axes = _grid(titles, (2.9, 4.6), ratios=(3, 1))
        for (above, below), (_, bins) in zip(axes, panels.values(), strict=True):
            _draw_bins(above, bins)
            _draw_shares(below, bins)
            above.tick_params(labelbottom=False)
        highest = max(below.get_ylim()[1] for _, below in axes)
        for above, below in axes:
            below.set_ylim(0, highest)
            for ax in (above, below):
                ax.set_xticks(TICKS)
                ax.xaxis.set_major_formatter("{x:g}")
        confidence = Line2D([], [], color="black", linewidth=1.6, label="mean confidence")
        handles = [Patch(facecolor=ACCURACY, label="accuracy"), confidence]
        for (edge, face, hatch), label in ((OVERCONFIDENT, "overconfident"), (UNDERCONFIDENT, "underconfident")):
            handles.append(Patch(facecolor=face, edgecolor=edge, hatch=hatch, label=label))
        _legend(figure, handles)
    return figure


def risk_panels(
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], labels: Sequence[str]
) -> Figure:
    """Draw risk against coverage: one panel per title, one curve (coverage, risk) per label of the legend."""
    looks: dict[str, dict[str, Any]] = {
        label: {"color": LINES[i % len(LINES)], "linestyle": "-" if i < len(LINES) else "--", "linewidth": 1.5}
        for i, label in enumerate(labels)
    }
    with _own_style():
        figure, axes = _grid(list(panels), (4.3, 3.1), columns=2)
        for (ax,), curves in zip(axes, panels.values(), strict=True):
            for label, (coverage, risk) in curves.items():
                ax.plot(coverage, risk, **looks[label])
            ax.set(xlim=(0, 1), xlabel="coverage: share of rows answered", ylabel="risk: share of them wrong")
            ax.xaxis.set_major_formatter("{x:.0%}")
            _shares_from_zero(ax)
        _legend(figure, [Line2D([], [], label=label, **look) for label, look in looks.items()])
    return figure


def histogram_panels(panels: Sequence[tuple[str, Histogram]], *, known: str, other: str) -> Figure:
    """Draw the shares of rows of two data sets, labelled `known` and `other`, one panel per (title, histogram)."""
    with _own_style():
        figure, axes = _grid([f"{title}\n{histogram.caption}" for title, histogram in panels], (2.6, 2.6))
        for (ax,), (_, histogram) in zip(axes, panels, strict=True):
            for counts, color in ((histogram.known, KNOWN), (histogram.other, OTHER)):
                edges = [histogram.end * i / len(counts) for i in range(len(counts) + 1)]
                shares = [count / max(1, sum(counts)) for count in counts]
                ax.stairs(shares, edges, fill=True, facecolor=color, alpha=0.3)
                ax.stairs(shares, edges, color=color)
            ax.set(xlim=(0, histogram.end), xlabel=histogram.label, ylabel="share of rows")
            _shares_from_zero(ax)
        looks = ((KNOWN, known), (OTHER, other))
        _legend(figure, [Patch(facecolor=color, alpha=0.5, label=label) for color, label in looks])
    return figure


def svg(figure: Figure) -> str:
    """Return the figure as SVG for a page, with text kept as text; the same figure gives the same bytes."""
    content = io.StringIO()
    with _own_style(), matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return content.getvalue()


@contextmanager
def _own_style() -> Iterator[None]:
    """Use matplotlib's defaults and the style of this file, whatever the user's matplotlibrc says."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def _grid(
    titles: Sequence[str], size: tuple[float, float], *, columns: int = 4, ratios: Sequence[int] = (1,)
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with a panel of `size` inches per title, and the axes of each from top to bottom."""
    columns = min(columns, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(size[0] * columns + 0.5, size[1] * rows + 0.5), layout="constrained")
    grid, panels = figure.add_gridspec(rows, columns), []
    for i, title in enumerate(titles):
        inner = grid[i // columns, i % columns].subgridspec(len(ratios), 1, height_ratios=ratios)
        panels.append([figure.add_subplot(inner[row, 0]) for row in range(len(ratios))])
        panels[-1][0].set_title(title, fontweight="bold", pad=8, parse_math=False)
    return figure, panels


def _legend(figure: Figure, handles: Sequence[Artist]) -> None:
    columns = 4 if figure.get_figwidth() > 6 else 2
    figure.legend(handles=list(handles), loc="outside lower center", ncols=columns, frameon=False)


def _shares_from_zero(axes: Axes) -> None:
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(True)


def _draw_bins(axes: Axes, bins: metrics.ReliabilityBins) -> None:
    full = bins.counts > 0
    left, width = bins.edges[:-1][full].numpy(), bins.edges.diff()[full].numpy()
    accuracy, confidence = bins.accuracy[full].numpy(), bins.confidence[full].numpy()
    axes.bar(left, accuracy, width, align="edge", color=ACCURACY, edgecolor="white", linewidth=0.8)
    for sign, (edge, face, hatch) in ((1, OVERCONFIDENT), (-1, UNDERCONFIDENT)):
        side = sign * (confidence - accuracy) > 0
        look: dict[str, Any] = {"align": "edge", "color": face, "edgecolor": edge, "hatch": hatch}
        axes.bar(left[side], (confidence - accuracy)[side], width[side], accuracy[side], **look)
    axes.plot([0, 1], [0, 1], color="#555555", linewidth=1, linestyle=(0, (4, 3)))
    axes.hlines(confidence, left, left + width, color="black", linewidth=1.6)
    axes.set(xlim=(0, 1), ylim=(0, 1), yticks=TICKS, ylabel="accuracy")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(True)


def _draw_shares(axes: Axes, bins: metrics.ReliabilityBins) -> None:
    rows = int(bins.counts.sum())
    shares = bins.counts.double() / rows
    width = bins.edges.diff().numpy()
    axes.bar(bins.edges[:-1].numpy(), shares.numpy(), width, align="edge", color="#c4c4c4", edgecolor="white")
    axes.axvline((bins.accuracy * shares).nansum().item(), color=ACCURACY, linewidth=2)
    axes.axvline((bins.confidence * shares).nansum().item(), color="black", linewidth=1.6)
    axes.set(xlim=(0, 1), xlabel=f"confidence ({rows:,} {'row' if rows == 1 else 'rows'})", ylabel="share of rows")
    _shares_from_zero(axes)
