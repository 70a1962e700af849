"""Small pictures as outlines in pixels, from numbers alone; `html` draws them as SVG."""

import math
from collections.abc import Sequence

from bayestune.report.views import Chart, Key, Mark, Tick

WIDTH, HEIGHT = 232, 214
WIDE, TALL = 460, 300
LINES = 8
"""Looks of lines: "line0" to "line7", then again from the first with dashes."""


class Frame:
    """The box of a picture's axes, and where a point of the data is in it.

    `x` and `y` are the values at the left or bottom and at the right or top.
    """

    def __init__(self, width: int, height: int, *, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.width, self.height, self.x, self.y = width, height, x, y
        self.box = (44.0, 10.0, width - 18.0, height - 38.0)

    def at(self, x: float, y: float) -> str:
        """The point as SVG writes it, to a tenth of a pixel."""
        return f"{self.across(x):.1f},{self.up(y):.1f}"

    def across(self, x: float) -> float:
        """Pixels from the left."""
        left, _, right, _ = self.box
        return left + (right - left) * (x - self.x[0]) / (self.x[1] - self.x[0])

    def up(self, y: float) -> float:
        """Pixels from the top."""
        _, top, _, bottom = self.box
        return bottom - (bottom - top) * (y - self.y[0]) / (self.y[1] - self.y[0])

    def bar(self, left: float, right: float, low: float, high: float, look: str) -> Mark:
        """A filled box."""
        corners = (self.at(left, low), self.at(left, high), self.at(right, high), self.at(right, low))
        return Mark(path=f"M{' '.join(corners)}z", look=look)

    def line(self, points: Sequence[tuple[float, float]], look: str) -> Mark:
        """A line through the points, in their order."""
        return Mark(path=f"M{' '.join(self.at(*point) for point in points)}", look=look)

    def chart(
        self,
        title: str,
        caption: str,
        *,
        marks: Sequence[Mark],
        x_label: str,
        y_label: str,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        x_percent: bool = False,
    ) -> Chart:
        """The picture, with ticks at these values; y is a share, written as 50 %, and so is x with `x_percent`."""
        return Chart(
            title=title,
            caption=caption,
            width=self.width,
            height=self.height,
            box=self.box,
            x_label=x_label,
            y_label=y_label,
            x_ticks=tuple(
                Tick(place=round(self.across(x), 1), text=f"{100 * x:.0f} %" if x_percent else f"{x:g}")
                for x in x_ticks
            ),
            y_ticks=tuple(Tick(place=round(self.up(y), 1), text=f"{100 * y:.0f} %") for y in y_ticks),
            marks=tuple(marks),
        )


def reliability_chart(
    title: str,
    caption: str,
    *,
    counts: Sequence[int],
    confidence: Sequence[float | None],
    accuracy: Sequence[float | None],
) -> Chart:
    """Accuracy of each bin as a bar, its distance to the mean confidence (a tick) over it, and the diagonal.

    The three lists are of bins of equal width on [0, 1]; where a count is 0 the other two are not read. Bins with less
    than one row in a hundred are drawn "faint".
    """
    frame = Frame(WIDTH, HEIGHT, x=(0.0, 1.0), y=(0.0, 1.0))
    bins, marks = len(counts), []
    for b, (count, sure, right) in enumerate(zip(counts, confidence, accuracy, strict=True)):
        if count == 0 or sure is None or right is None:
            continue
        left, end = b / bins, (b + 1) / bins
        faint = " faint" if 100 * count < sum(counts) else ""
        marks.append(frame.bar(left, end, 0.0, right, f"accuracy{faint}"))
        side = "over" if sure > right else "under"
        marks.append(frame.bar(left, end, min(right, sure), max(right, sure), f"{side}{faint}"))
        marks.append(frame.line([(left, sure), (end, sure)], f"sure{faint}"))
    marks.append(frame.line([(0.0, 0.0), (1.0, 1.0)], "diagonal"))
    halves = (0.0, 0.5, 1.0)
    return frame.chart(
        title, caption, marks=marks, x_label="confidence", y_label="accuracy", x_ticks=halves, y_ticks=halves
    )


def risk_chart(title: str, caption: str, curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Chart:
    """Risk against coverage, one line for each (look, coverage, risk)."""
    highest = max(risk for _, _, risks in curves for risk in risks)
    top = max(0.1, math.ceil(highest * 10 - 1e-9) / 10)
    frame = Frame(WIDE, TALL, x=(0.0, 1.0), y=(0.0, top))
    marks = [frame.line(list(zip(coverage, risk, strict=True)), look) for look, coverage, risk in curves]
    return frame.chart(
        title,
        caption,
        marks=marks,
        x_label="coverage: share of rows answered",
        y_label="risk: share of them wrong",
        x_ticks=(0.0, 0.25, 0.5, 0.75, 1.0),
        y_ticks=(0.0, top / 2, top),
        x_percent=True,
    )


def histogram_chart(
    title: str, caption: str, *, known: Sequence[int], other: Sequence[int], end: float, x_label: str
) -> Chart:
    """Shares of the rows of two data sets in bins of equal width on [0, end], one over the other."""
    shares = [[count / max(1, sum(counts)) for count in counts] for counts in (known, other)]
    top = max(0.1, math.ceil(max(map(max, shares)) * 10 - 1e-9) / 10)
    frame = Frame(WIDTH, HEIGHT, x=(0.0, end), y=(0.0, top))
    marks = []
    for heights, look in zip(shares, ("known", "other"), strict=True):
        width = end / len(heights)
        outline = [(0.0, 0.0)]
        for b, height in enumerate(heights):
            outline += [(b * width, height), ((b + 1) * width, height)]
        marks.append(frame.line([*outline, (end, 0.0)], look))
    return frame.chart(
        title,
        caption,
        marks=marks,
        x_label=x_label,
        y_label="share of rows",
        x_ticks=(0.0, end / 2, end),
        y_ticks=(0.0, top / 2, top),
    )


def line_look(place: int) -> str:
    """The look of the line at a place of a legend: eight colours, then the same dashed."""
    return f"line{place % LINES}{' dashed' if place >= LINES else ''}"


def line_key(look: str, text: str) -> Key:
    """A line and what it stands for."""
    return Key(look=look, outline="M0,6H22", text=text)


def area_key(look: str, text: str) -> Key:
    """A filled area and what it stands for."""
    return Key(look=look, outline="M1,1H21V11H1z", text=text)
