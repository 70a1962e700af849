"""The report of some cells: what is pooled over seeds, what is said of each run, and texts that stay texts."""

import copy
import json
import math
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bayestune.errors import ConfigError
from bayestune.report.html import page_html
from bayestune.report.views import Page, Section
from bayestune.tables import page as page_module
from bayestune.tables.cells import read_cells
from bayestune.tables.page import report_page
from tabled import answers, record, save


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    """Two methods and two seeds, trained on OBQA and asked about it and about ARC-C."""
    made = []
    for method, draws in (("mle", 0), ("blob", 10)):
        for seed in (1, 2):
            known = answers(draws=draws, rows=150, seed=seed, sharp=2.0)
            other = answers("arc_challenge", draws=draws, rows=60, seed=10 + seed)
            for prediction in (known, other):
                made.append(record(prediction, known=known, table="table2", method=method, seed=seed))
    return made


def section(page: Page, heading: str) -> Section:
    [found] = [section for section in page.sections if section.heading.startswith(heading)]
    return found


def drawn(monkeypatch: pytest.MonkeyPatch, name: str, cells: list[dict[str, Any]]) -> list[Any]:
    """The panels that the report hands to a function that draws, one entry per picture."""
    calls: list[Any] = []
    monkeypatch.setattr(page_module, name, lambda panels, *_, **__: calls.append(panels))
    monkeypatch.setattr(page_module, "svg", lambda figure: "")
    report_page(cells)
    return calls


def test_a_page_has_every_part(cells: list[dict[str, Any]]) -> None:
    page = report_page(cells)
    assert page.facts[0] == "8 cells: Table 2: trained on OBQA, evaluated on other data sets"
    assert page.facts[1:] == ("Model: minilm", "Seeds: 1, 2")
    assert len(section(page, "Scores").tables) == 1
    headings = {found.heading: [figure.heading for figure in found.figures] for found in page.sections}
    assert headings == {
        "Scores": [],
        "Calibration": ["Reliability on OBQA", "Reliability on ARC-C"],
        "Selective prediction": ["Risk against coverage: Table 2"],
        "Prediction sets": [],
        "Out-of-distribution detection": ["Uncertainty on ARC-C"],
        "Provenance": [],
    }
    [other] = section(page, "Out-of").figures
    for text in ("MLE", "BLoB, N = 10", "rows of openbookqa", "rows of arc_challenge", "epistemic uncertainty, nats"):
        assert f">{text}<" in other.svg


def test_a_reliability_diagram_holds_the_rows_of_all_seeds(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = drawn(monkeypatch, "reliability_panels", cells)[0]["MLE"]
    own = [cell for cell in cells if cell["method"] == "mle" and cell["task"] == cell["eval_task"]]
    for b in range(15):
        parts = [{name: cell["reliability"][name][b] for name in cell["reliability"]} for cell in own]
        count = sum(part["counts"] for part in parts)
        assert found.counts[b] == count
        for name in ("confidence", "accuracy"):
            expected = sum(part["counts"] * part[name] for part in parts if part["counts"]) / max(count, 1)
            value = getattr(found, name)[b].item()
            assert value == pytest.approx(expected, abs=1e-12) if count else math.isnan(value)
    assert found.counts.sum() == 300


def test_a_risk_curve_is_the_mean_over_seeds_at_each_percent(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    coverage, risk = drawn(monkeypatch, "risk_panels", cells)[0]["OBQA"]["BLoB, N = 10"]
    own = [cell for cell in cells if cell["method"] == "blob" and cell["task"] == cell["eval_task"]]
    assert coverage == [k / 100 for k in range(1, 101)]
    for k in (1, 7, 50, 99, 100):
        # The smallest number of 150 rows that is k percent of them.
        accepted = round(-(-k * 150 // 100) / 150, 6)
        values = [dict(zip(*cell["risk_coverage"].values(), strict=True))[accepted] for cell in own]
        assert risk[k - 1] == pytest.approx(sum(values) / 2, abs=1e-12)
    assert risk[-1] == pytest.approx(1 - sum(cell["accuracy"] for cell in own) / 2, abs=1e-6)


def test_a_histogram_holds_the_rows_of_all_seeds(cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    own = [cell for cell in cells if cell["method"] == "blob" and cell["task"] != cell["eval_task"]]
    title, found = drawn(monkeypatch, "histogram_panels", cells)[0][-1]
    sums = [
        [
            sum(counts)
            for counts in zip(*(holder["uncertainty"]["epistemic"]["counts"] for holder in holders), strict=True)
        ]
        for holders in ([cell["in_distribution"] for cell in own], own)
    ]
    assert [found.known, found.other] == sums and [sum(counts) for counts in sums] == [300, 120]
    assert title == "BLoB, N = 10" and found.end == 0.5 and found.label == "epistemic uncertainty, nats"
    aurocs = [100 * cell["detection"]["epistemic"]["auroc"] for cell in own]
    assert found.caption.startswith(f"AUROC {sum(aurocs) / 2:.1f} ± ")
    assert found.caption.endswith("\nbelow one half") == (sum(aurocs) < 100)


def test_a_histogram_says_that_its_auroc_is_below_one_half(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = copy.deepcopy(cells)
    for cell in changed:
        if "detection" in cell:
            cell["detection"]["total"]["auroc"] = 0.4 if cell["method"] == "mle" else 0.6
    [panels] = drawn(monkeypatch, "histogram_panels", changed)
    captions = {title: found.caption for title, found in panels if found.label.startswith("total")}
    assert captions == {"MLE": "AUROC 40.0 ± 0.0 %\nbelow one half", "BLoB, N = 10": "AUROC 60.0 ± 0.0 %"}
    text = section(report_page(changed), "Out-of").text
    assert "epistemic uncertainty is not an out-of-distribution score" in text


def test_thresholds_are_those_of_the_cells(cells: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(cells)
    own = [cell for cell in changed if cell["task"] == cell["eval_task"] and cell["method"] == "mle"]
    own[0]["selective"][0] |= {"threshold": None, "coverage": 0.0, "rows": 0, "error": None, "interval": [0.0, 1.0]}
    own[0]["selective"][1] |= {"threshold": 0.91234, "coverage": 0.25, "error": 0.08, "interval": [0.031, 0.155]}
    [listing, _] = section(report_page(changed), "Selective").listings
    assert listing.lines[0][:4] == (
        "MLE",
        "1",
        "no threshold reaches it",
        "answer from confidence 0.912: 25.0 % of rows, error 8.0 % [3.1, 15.5]",
    )
    assert [line[:2] for line in listing.lines] == [
        ("MLE", "1"),
        ("MLE", "2"),
        ("BLoB, N = 10", "1"),
        ("BLoB, N = 10", "2"),
    ]


def test_rows_answered_and_prediction_sets_are_those_of_the_cells(cells: list[dict[str, Any]]) -> None:
    own = [cell for cell in cells if cell["task"] == cell["eval_task"] and cell["method"] == "blob"]

    def shown(heading: str, table: int) -> str:
        [table_made] = section(report_page(cells), heading).tables
        block = table_made.blocks[table]
        assert [line.label for line in block.lines] == ["MLE", "BLoB, N = 10"] and block.columns == ("OBQA", "ARC-C")
        return block.lines[1].values[0].text

    for heading, table, values in (
        ("Selective", 1, [100 * cell["selective"][0]["coverage"] for cell in own]),
        ("Selective", 2, [100 * cell["selective"][1]["coverage"] for cell in own]),
        ("Prediction sets", 0, [cell["conformal"]["lac"]["size"] for cell in own]),
        ("Prediction sets", 1, [100 * cell["conformal"]["lac"]["coverage"] for cell in own]),
        ("Prediction sets", 2, [cell["conformal"]["aps"]["size"] for cell in own]),
        ("Prediction sets", 3, [100 * cell["conformal"]["aps"]["coverage"] for cell in own]),
    ):
        assert shown(heading, table).startswith(f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}")


def test_cells_without_prediction_sets_are_left_out(cells: list[dict[str, Any]]) -> None:
    older = [{name: value for name, value in cell.items() if name != "conformal"} for cell in cells]
    assert not [made for made in report_page(older).sections if made.heading == "Prediction sets"]
    some = [new if new["seed"] == 1 else old for new, old in zip(cells, older, strict=True)]
    [table] = section(report_page(some), "Prediction sets").tables
    assert table.blocks[0].lines[0].values[0].text == f"{cells[0]['conformal']['lac']['size']:.2f}"


def test_each_run_is_told_once_with_its_command(cells: list[dict[str, Any]]) -> None:
    runs, settings, data, versions = section(report_page(cells), "Provenance").listings
    assert len(runs.lines) == 4 and runs.lines[0][:5] == ("table2", "mle", "openbookqa", "1", "600")
    assert runs.lines[0][-1] == "bayestune table table1 --data data"
    assert settings.lines[0][-1] == '{"model": "minilm", "seed": 1, "steps": 600}'
    assert [line[3] for line in data.lines] == ["openbookqa", "arc_challenge"]
    assert data.lines[0][-1] == '{"model.safetensors": "ab12"}'
    assert versions.lines == (('{"python": "3.11.2", "torch": "2.13.0"}', '{"machine": "x86_64", "device": "cpu"}'),)


def test_several_tables_are_told_apart(cells: list[dict[str, Any]]) -> None:
    page = report_page([*cells, record(answers(rows=30))])
    assert [table.title.partition(":")[0] for table in section(page, "Scores").tables] == ["Table 1", "Table 2"]
    headings = [figure.heading for figure in section(page, "Calibration").figures]
    assert headings == [f"Reliability on {name}" for name in ("Table 1, OBQA", "Table 2, OBQA", "Table 2, ARC-C")]


def test_what_cannot_be_reported_is_refused(cells: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="found no cells"):
        report_page([])
    with pytest.raises(ConfigError, match="table: found 'table9'"):
        report_page([cells[0] | {"table": "table9"}])


@pytest.mark.property("X05")
@pytest.mark.parametrize(
    "payload", ["<script>alert(1)</script><!--", '" onmouseover="x', "x" * 100_000, "\u2028\x00\x1b[31m"]
)
def test_texts_in_cells_stay_texts(payload: str, tmp_path: Path) -> None:
    """Whatever a file may hold as free text, the page of the file has the same elements and attributes."""
    cell = record(answers(rows=20))

    def page(text: str) -> str:
        changed = cell | {
            "command": ["bayestune", text],
            "experiment": cell["experiment"] | {"model": f"m{text}", text: text, "list": [text, {text: text}]},
            "sha256": {"train_rows": f"t{text}", "eval_rows": f"e{text}", "base": {text: text}, "adapter": text},
            "versions": {text: text},
            "hardware": {text: text, "deep": {text: {text: text}}},
        }
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        (folder / "cell.json").write_text(json.dumps(changed), encoding="utf-8")
        return page_html(report_page(read_cells(folder)))

    def shape(text: str) -> list[tuple[str, list[str]]]:
        found: list[tuple[str, list[str]]] = []
        parser = HTMLParser()
        parser.handle_starttag = lambda tag, attrs: found.append((tag, [name for name, _ in attrs]))  # type: ignore[method-assign]
        parser.handle_comment = lambda data: found.append(("comment", [data]))  # type: ignore[method-assign]
        parser.feed(text)
        parser.close()
        return found

    made, plain = page(payload), page("plain")
    assert shape(made) == shape(plain)
    assert "\u2028" not in made and "\x00" not in made and "\x1b" not in made
    assert len(made) < len(plain) + 10_000


def test_the_report_is_the_same_again_and_names_no_folder(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    save(tmp_path, *cells)
    pages_made = [page_html(report_page(read_cells(tmp_path))) for _ in range(2)]
    assert pages_made[0] == pages_made[1]
    assert str(tmp_path) not in pages_made[0] and "someone" not in pages_made[0]


def test_pictures_are_of_the_most_draws_of_a_method_and_tables_of_all(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = [copy.deepcopy(cell) | {"draws": 5} for cell in cells if cell["method"] == "blob"]
    reliability = drawn(monkeypatch, "reliability_panels", [*cells, *fewer])
    assert [list(panels) for panels in reliability] == [["MLE", "BLoB, N = 10"]] * 2
    [histograms] = drawn(monkeypatch, "histogram_panels", [*cells, *fewer])
    assert [title for title, _ in histograms] == ["MLE", "BLoB, N = 10", "BLoB, N = 10"]
    [risks] = drawn(monkeypatch, "risk_panels", [*cells, *fewer])
    assert [list(curves) for curves in risks.values()] == [["MLE", "BLoB, N = 10"]] * 2
    page = report_page([*cells, *fewer])
    labels = [line.label for line in section(page, "Scores").tables[0].blocks[0].lines]
    assert labels == ["MLE", "BLoB, N = 5", "BLoB, N = 10"]
