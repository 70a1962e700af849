"""Reliability diagrams: how often a model is right against how sure it is. The only file that imports matplotlib."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from bayestune import metrics
from bayestune.errors import DataError

try:
    import matplotlib.style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("diagrams need matplotlib: pip install 'bayestune[report]'", name=error.name) from error

Curves = Mapping[str, tuple[Tensor, Tensor]]

INK = "#333333"
ACCURACY = "#5b8ec4"
# Edge, face and hatch of the part of a bin between accuracy and confidence.
OVERCONFIDENT = ("#c23b4a", "#fbe3e4", "////")
UNDERCONFIDENT = ("#2a7f3e", "#e0f2e1", "\\\\\\\\")
_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#999999",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": "#e6e6e6",
    "hatch.linewidth": 0.6,
    # Ids in the SVG come from this salt instead of a random one: the same curves give the same bytes.
    "svg.hashsalt": "bayestune",
}


def reliability_diagram(curves: Curves, path_png: str | Path, path_svg: str | Path, *, bins: int = 15) -> None:
    """Write the picture of `reliability_figure` as PNG and SVG; the same curves give the same bytes.

    Raises DataError as `reliability_figure`, OSError where a file cannot be written.
    """
    with _own_style():
        figure = _figure(curves, bins)
        figure.savefig(path_png, format="png", dpi=200, metadata={"Software": None})
        figure.savefig(path_svg, format="svg", metadata={"Date": None})


def reliability_figure(curves: Curves, *, bins: int = 15) -> Figure:
    """One panel a method, side by side in the order of `curves`, from the bins of `metrics.reliability_bins`.

    `curves` maps the name of a method to its (log_probs [rows, classes], labels [rows]). Above: the accuracy of each
    bin as a bar, its distance to the mean confidence (the black tick) hatched over it, the diagonal of perfect
    calibration, and the ECE in the title. Below: the share of rows in each bin, with the accuracy and the mean
    confidence of all rows as lines. Raises DataError where `curves` is empty or a curve cannot be scored.
    """
    with _own_style():
        return _figure(curves, bins)


@contextmanager
def _own_style() -> Iterator[None]:
    """matplotlib's defaults and the style of this file, whatever the user's matplotlibrc says; put back at the end."""
    with matplotlib.style.context(["default", _STYLE]):
        yield


def _figure(curves: Curves, bins: int) -> Figure:
    if not curves:
        raise DataError("reliability diagram: no curves, expected at least one method")
    figure = Figure(figsize=(3.1 * len(curves) + 0.7, 5.4), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False, sharex=True, sharey="row", height_ratios=[3, 1])
    for column, (name, (log_probs, labels)) in enumerate(curves.items()):
        found = metrics.reliability_bins(log_probs, labels, bins=bins)
        above, below = axes[:, column]
        _draw_bins(above, found)
        _draw_shares(below, found)
        heading = f"{name}\nECE {100 * metrics.ece(log_probs, labels, bins=bins):.1f} %"
        above.set_title(heading, fontsize=10.5, fontweight="bold", pad=8, parse_math=False)
    axes[0, 0].set_ylabel("accuracy")
    axes[1, 0].set_ylabel("share of rows")
    axes[1, 0].set_ylim(bottom=0)
    handles = [
        Patch(facecolor=ACCURACY, label="accuracy"),
        Line2D([], [], color="black", linewidth=1.6, label="mean confidence"),
        _gap_patch(OVERCONFIDENT, "overconfident by"),
        _gap_patch(UNDERCONFIDENT, "underconfident by"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4 if len(curves) > 1 else 2, frameon=False)
    return figure


def _gap_patch(look: tuple[str, str, str], label: str) -> Patch:
    edge, face, hatch = look
    return Patch(facecolor=face, edgecolor=edge, hatch=hatch, label=label)


def _draw_bins(axes: Axes, found: metrics.ReliabilityBins) -> None:
    full = found.counts > 0
    left, width = found.edges[:-1][full].numpy(), found.edges.diff()[full].numpy()
    accuracy, confidence = found.accuracy[full].numpy(), found.confidence[full].numpy()
    axes.bar(left, accuracy, width, align="edge", color=ACCURACY, edgecolor="white", linewidth=0.8)
    for sign, (edge, face, hatch) in ((1, OVERCONFIDENT), (-1, UNDERCONFIDENT)):
        side = sign * (confidence - accuracy) > 0
        heights = (confidence - accuracy)[side]
        axes.bar(
            left[side], heights, width[side], accuracy[side], align="edge", color=face, edgecolor=edge, hatch=hatch
        )
    axes.plot([0, 1], [0, 1], color="#555555", linewidth=1, linestyle=(0, (4, 3)))
    axes.hlines(confidence, left, left + width, color="black", linewidth=1.6)
    ticks = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(0, 1), ylim=(0, 1), xticks=ticks, yticks=ticks)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.grid(True)


def _draw_shares(axes: Axes, found: metrics.ReliabilityBins) -> None:
    rows = int(found.counts.sum())
    shares = found.counts.double() / rows
    width = found.edges.diff().numpy()
    axes.bar(found.edges[:-1].numpy(), shares.numpy(), width, align="edge", color="#c4c4c4", edgecolor="white")
    axes.axvline((found.accuracy * shares).nansum().item(), color=ACCURACY, linewidth=2)
    axes.axvline((found.confidence * shares).nansum().item(), color="black", linewidth=1.6)
    axes.set_xlabel(f"confidence ({rows:,} {'row' if rows == 1 else 'rows'})")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(True)
