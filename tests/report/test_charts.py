"""Charts: pixels worked out by hand from the box of the axes."""

import re

import pytest

from bayestune.report.charts import HEIGHT, WIDTH, Frame, histogram_chart, line_look, reliability_chart, risk_chart
from bayestune.report.views import Mark

LEFT, TOP, RIGHT, BOTTOM = Frame(WIDTH, HEIGHT, x=(0.0, 1.0), y=(0.0, 1.0)).box


def points(mark: Mark) -> list[tuple[float, float]]:
    """The corners of a path, as shares of the box from left and bottom."""
    numbers = re.findall(r"(-?[\d.]+),(-?[\d.]+)", mark.path)
    return [((float(x) - LEFT) / (RIGHT - LEFT), (BOTTOM - float(y)) / (BOTTOM - TOP)) for x, y in numbers]


def near(expected: list[tuple[float, float]]) -> list[object]:
    """Coordinates are rounded to a tenth of a pixel of a box of more than 160."""
    return [pytest.approx(pair, abs=0.05 / 160) for pair in expected]


def of(marks: tuple[Mark, ...], look: str) -> list[Mark]:
    return [mark for mark in marks if mark.look == look]


def test_the_bars_of_a_reliability_chart_are_its_bins() -> None:
    chart = reliability_chart(
        "t", "c", counts=[0, 50, 49, 1], confidence=[None, 0.4, 0.6, 0.9], accuracy=[None, 0.3, 0.7, 1.0]
    )
    bars = of(chart.marks, "accuracy")
    assert points(bars[0]) == near([(0.25, 0.0), (0.25, 0.3), (0.5, 0.3), (0.5, 0.0)])
    assert len(bars) == 3  # the empty bin has none; one row in a hundred is not pale
    [over] = of(chart.marks, "over")
    assert points(over) == near([(0.25, 0.3), (0.25, 0.4), (0.5, 0.4), (0.5, 0.3)])
    under = of(chart.marks, "under")
    assert points(under[0]) == near([(0.5, 0.6), (0.5, 0.7), (0.75, 0.7), (0.75, 0.6)])
    assert points(of(chart.marks, "sure")[0]) == near([(0.25, 0.4), (0.5, 0.4)])
    assert points(of(chart.marks, "diagonal")[0]) == near([(0, 0), (1, 1)])


def test_bins_of_few_rows_are_pale() -> None:
    chart = reliability_chart("t", "c", counts=[1, 200], confidence=[0.3, 0.8], accuracy=[1.0, 0.8])
    assert len(of(chart.marks, "accuracy faint")) == len(of(chart.marks, "accuracy")) == 1


def test_a_risk_curve_goes_through_its_points_and_the_axis_ends_above() -> None:
    chart = risk_chart("t", "", [("line0", [0.5, 1.0], [0.1, 0.3]), ("line3", [1.0], [0.25])])
    left, top, right, bottom = chart.box
    x, y = (left + right) / 2, bottom - (bottom - top) / 3
    assert chart.marks[0] == Mark(path=f"M{x:.1f},{y:.1f} {right:.1f},{top:.1f}", look="line0")
    assert [tick.text for tick in chart.y_ticks] == ["0 %", "15 %", "30 %"]
    assert [tick.text for tick in chart.x_ticks] == ["0 %", "25 %", "50 %", "75 %", "100 %"]
    assert [tick.place for tick in chart.x_ticks][::4] == [left, right]
    assert [tick.text for tick in risk_chart("", "", [("line0", [1.0], [0.0])]).y_ticks] == ["0 %", "5 %", "10 %"]


def test_a_histogram_shows_shares_of_each_data_set() -> None:
    chart = histogram_chart("t", "c", known=[3, 1], other=[0, 10], end=2.0, x_label="nats")
    known, other = of(chart.marks, "known"), of(chart.marks, "other")
    assert points(known[0]) == near([(0, 0), (0, 0.75), (0.5, 0.75), (0.5, 0.25), (1, 0.25), (1, 0)])
    assert points(other[0]) == near([(0, 0), (0, 0), (0.5, 0), (0.5, 1), (1, 1), (1, 0)])
    assert [tick.text for tick in chart.x_ticks] == ["0", "1", "2"]


def test_sixteen_lines_have_sixteen_looks() -> None:
    assert len({line_look(place) for place in range(16)}) == 16
