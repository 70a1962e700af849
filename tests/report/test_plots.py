"""Reliability diagrams: what is drawn is what the metrics say, the bytes are reproducible, nothing global moves."""

import importlib.util
import math
import sys

import matplotlib as mpl
import pytest
import torch

from bayestune import metrics
from bayestune.errors import DataError
from bayestune.report import plots


def predictions(temperature, seed, rows=300, classes=4):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, classes, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return (logits * temperature).log_softmax(1), labels


CURVES = {"MLE": predictions(3.0, 0), "BLoB, N = 0": predictions(0.4, 1), "BLoB, N = 10": predictions(1.0, 2)}


def panels(figure):
    """The upper and the lower axes of each panel, left to right."""
    return list(zip(figure.axes[::2], figure.axes[1::2], strict=True))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("diagram")
    plots.reliability_diagram(CURVES, folder / "a.png", folder / "a.svg")
    return folder


def test_one_panel_a_method_in_the_order_given_with_its_ece():
    found = panels(plots.reliability_figure(CURVES))
    expected = [f"{name}\nECE {100 * metrics.ece(*curve):.1f} %" for name, curve in CURVES.items()]
    assert [above.get_title() for above, _ in found] == expected
    left = [above.get_position().x0 for above, _ in found]
    assert left == sorted(left) and len(set(left)) == len(CURVES)


@pytest.mark.parametrize("name", list(CURVES)[:2])
def test_bars_are_accuracy_gap_and_share_of_each_bin(name):
    log_probs, labels = CURVES[name]
    bin_values = metrics.reliability_bins(log_probs, labels, bins=15)
    full = bin_values.counts > 0
    [(above, below)] = panels(plots.reliability_figure({name: (log_probs, labels)}))
    accuracy, over, under = above.containers
    assert [bar.get_height() for bar in accuracy] == pytest.approx(bin_values.accuracy[full].tolist())
    assert [bar.get_x() for bar in accuracy] == bin_values.edges[:-1][full].tolist()
    bottoms, gap = bin_values.accuracy[full], (bin_values.confidence - bin_values.accuracy)[full]
    for bars, side in ((over, gap > 0), (under, gap < 0)):
        assert [bar.get_height() for bar in bars] == pytest.approx(gap[side].tolist())
        assert [bar.get_y() for bar in bars] == bottoms[side].tolist()
    shares = torch.tensor([bar.get_height() for bar in below.containers[0]])
    assert shares.tolist() == pytest.approx((bin_values.counts / len(labels)).tolist())
    assert (gap.abs() * shares[full]).sum().item() == pytest.approx(metrics.ece(log_probs, labels))
    mean_accuracy, mean_confidence = (line.get_xdata()[0] for line in below.lines)
    assert mean_accuracy == pytest.approx(metrics.accuracy(log_probs, labels))
    assert mean_confidence == pytest.approx(log_probs.amax(1).exp().mean().item())


def test_the_diagonal_and_the_whole_unit_square_are_shown():
    for above, below in panels(plots.reliability_figure(CURVES)):
        diagonal = above.lines[0]
        assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
        assert above.get_xlim() == above.get_ylim() == below.get_xlim() == (0, 1)
        assert below.get_ylim()[0] == 0


def test_panels_have_the_same_scales():
    found = panels(plots.reliability_figure(CURVES))
    assert len({below.get_ylim() for _, below in found}) == 1
    for above, below in found:
        assert above.get_xticks().tolist() == below.get_xticks().tolist() == [0, 0.25, 0.5, 0.75, 1]
        largest = max(bar.get_height() for bar in below.containers[0])
        assert below.get_ylim()[1] >= largest


def test_bytes_are_the_same_again_whatever_the_user_has_set(saved):
    with mpl.rc_context({"svg.hashsalt": None, "font.size": 20, "axes.facecolor": "black"}):
        before = dict(mpl.rcParams)
        plots.reliability_diagram(dict(CURVES), str(saved / "b.png"), str(saved / "b.svg"))
        assert dict(mpl.rcParams) == before
    for suffix in ("png", "svg"):
        assert (saved / f"a.{suffix}").read_bytes() == (saved / f"b.{suffix}").read_bytes()


def test_pyplot_is_never_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    spec = importlib.util.spec_from_file_location("plots_without_pyplot", plots.__file__)
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    fresh.reliability_diagram({"MLE": CURVES["MLE"]}, tmp_path / "c.png", tmp_path / "c.svg")
    assert len(list(tmp_path.iterdir())) == 2


def test_curves_may_differ_in_rows_and_classes_and_names_are_not_mathematics():
    curves = {
        "p_0 costs $5 or $6": predictions(1.0, 0, rows=1),
        "one class": (torch.zeros(7, 1), torch.zeros(7).long()),
    }
    (first, first_below), (_, second_below) = panels(plots.reliability_figure(curves))
    assert first.get_title().startswith("p_0 costs $5 or $6\n") and not first.title.get_parse_math()
    assert first_below.get_xlabel() == "confidence (1 row)"
    assert second_below.get_xlabel() == "confidence (7 rows)"


def test_what_cannot_be_drawn_is_refused_and_nothing_is_written(tmp_path):
    log_probs, labels = predictions(1.0, 0)
    broken = log_probs.clone()
    broken[3] = math.nan
    paths = (tmp_path / "a.png", tmp_path / "a.svg")
    with pytest.raises(DataError, match="at least one method"):
        plots.reliability_diagram({}, *paths)
    with pytest.raises(DataError, match="row 3 "):
        plots.reliability_diagram({"good": (log_probs, labels), "bad": (broken, labels)}, *paths)
    assert list(tmp_path.iterdir()) == []


def test_panels_wrap_after_the_fourth():
    found = panels(plots.reliability_figure({f"m{i}": predictions(1.0, i, rows=30) for i in range(6)}))
    places = [above.get_position() for above, _ in found]
    assert places[4].y1 < places[3].y0 and places[4].x0 == pytest.approx(places[0].x0, abs=0.05)


def test_risk_curves_keep_their_look_in_every_panel():
    labels = [f"m{i}" for i in range(10)]
    curves = {label: ([0.5, 1.0], [0.1, 0.3]) for label in labels}
    figure = plots.risk_panels({"A": {"m9": curves["m9"]}, "B": curves}, labels)
    first, second = figure.axes
    assert [axes.get_title() for axes in figure.axes] == ["A", "B"]
    assert second.lines[0].get_xydata().tolist() == [[0.5, 0.1], [1.0, 0.3]]
    looks = [(line.get_color(), line.get_linestyle()) for line in second.lines]
    assert len(set(looks)) == 10 and (first.lines[0].get_color(), first.lines[0].get_linestyle()) == looks[9]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == labels
    assert first.get_ylim()[0] == 0 and first.get_xlim() == (0, 1)


def test_a_histogram_shows_shares_of_each_data_set():
    histogram = plots.Histogram(caption="c", known=[3, 1], other=[0, 10], end=2.0, label="nats")
    figure = plots.histogram_panels([("t", histogram)], known="a", other="b")
    [axes] = figure.axes
    values = [patch.get_data() for patch in axes.patches]
    assert [found.values.tolist() for found in values] == [[0.75, 0.25]] * 2 + [[0.0, 1.0]] * 2
    assert all(found.edges.tolist() == [0.0, 1.0, 2.0] for found in values)
    assert axes.get_title() == "t\nc" and axes.get_xlabel() == "nats" and axes.get_xlim() == (0, 2)


def test_an_svg_for_a_page_is_the_same_again_with_its_texts_as_text():
    first, second = (plots.svg(plots.reliability_figure(CURVES)) for _ in range(2))
    assert first == second and ">BLoB, N = 10<" in first and "<dc:date>" not in first


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    spec = importlib.util.spec_from_file_location("plots_without_matplotlib", plots.__file__)
    with pytest.raises(ModuleNotFoundError, match=r"pip install '\.\[report\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
