"""The report of some cells: what is pooled over seeds, what is said of each run, and texts that stay texts."""

import copy
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from bayestune.errors import ConfigError
from bayestune.report.html import page_html
from bayestune.report.views import Chart, Group, Page, Section
from bayestune.tables import pages
from bayestune.tables.cells import read_cells
from bayestune.tables.pages import report_page
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


def charts(groups: tuple[Group, ...]) -> Iterator[Chart]:
    return (chart for group in groups for chart in group.charts)


def drawn(monkeypatch: pytest.MonkeyPatch, name: str, cells: list[dict[str, Any]]) -> list[tuple[tuple, dict]]:
    """What the report hands to a function that draws."""
    calls: list[tuple[tuple, dict]] = []
    original = getattr(pages, name)

    def noted(*args: Any, **kwargs: Any) -> Chart:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    monkeypatch.setattr(pages, name, noted)
    report_page(cells)
    return calls


def test_a_page_has_every_part(cells: list[dict[str, Any]]) -> None:
    page = report_page(cells)
    assert page.facts[0] == "8 cells: Table 2: trained on OBQA, asked about other data"
    assert page.facts[1:] == ("Model: minilm", "Seeds: 1, 2")
    assert len(section(page, "Scores").tables) == 1
    reliability = section(page, "Does confidence").groups
    assert [group.heading for group in reliability] == ["Reliability on OBQA", "Reliability on ARC-C"]
    assert [chart.title for chart in charts(reliability)] == ["MLE", "BLoB, N = 10"] * 2
    [risk] = section(page, "What if").groups
    assert [chart.title for chart in risk.charts] == ["OBQA", "ARC-C"]
    assert [key.text for key in risk.keys] == ["MLE", "BLoB, N = 10"]
    [other] = section(page, "Does it notice").groups
    assert [key.text for key in other.keys] == ["rows of openbookqa", "rows of arc_challenge"]
    assert [chart.caption.partition(",")[0] for chart in other.charts] == ["total"] * 2 + ["epistemic"]


def test_without_other_data_there_is_no_such_part(cells: list[dict[str, Any]]) -> None:
    page = report_page([cell for cell in cells if cell["task"] == cell["eval_task"]])
    assert not any(section.heading.startswith("Does it notice") for section in page.sections)


def test_a_reliability_diagram_holds_the_rows_of_all_seeds(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = drawn(monkeypatch, "reliability_chart", cells)[0][1]
    own = [cell for cell in cells if cell["method"] == "mle" and cell["task"] == cell["eval_task"]]
    for b in range(15):
        parts = [{name: cell["reliability"][name][b] for name in cell["reliability"]} for cell in own]
        count = sum(part["counts"] for part in parts)
        assert first["counts"][b] == count
        for name in ("confidence", "accuracy"):
            expected = sum(part["counts"] * part[name] for part in parts if part["counts"]) / count if count else None
            assert first[name][b] == (None if expected is None else pytest.approx(expected, abs=1e-12))
    assert sum(first["counts"]) == 300


def test_a_risk_curve_is_the_mean_over_seeds_at_each_percent(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, curves = drawn(monkeypatch, "risk_chart", cells)[0][0]
    [_, (look, coverage, risk)] = curves
    own = [cell for cell in cells if cell["method"] == "blob" and cell["task"] == cell["eval_task"]]
    assert look == "line1" and coverage == [k / 100 for k in range(1, 101)]
    for k in (1, 7, 50, 99, 100):
        # The smallest number of 150 rows that is k percent of them.
        accepted = round(-(-k * 150 // 100) / 150, 6)
        values = [dict(zip(*cell["risk_coverage"].values(), strict=True))[accepted] for cell in own]
        assert risk[k - 1] == pytest.approx(sum(values) / 2, abs=1e-12)
    assert risk[-1] == pytest.approx(1 - sum(cell["accuracy"] for cell in own) / 2, abs=1e-6)


def test_a_histogram_holds_the_rows_of_all_seeds(cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    calls = drawn(monkeypatch, "histogram_chart", cells)
    own = [cell for cell in cells if cell["method"] == "blob" and cell["task"] != cell["eval_task"]]
    found = calls[-1][1]
    sums = [
        [
            sum(counts)
            for counts in zip(*(holder["uncertainty"]["epistemic"]["counts"] for holder in holders), strict=True)
        ]
        for holders in ([cell["in_distribution"] for cell in own], own)
    ]
    assert [found["known"], found["other"]] == sums and [sum(counts) for counts in sums] == [300, 120]
    assert found["end"] == 0.5
    aurocs = [100 * cell["detection"]["epistemic"]["auroc"] for cell in own]
    assert f"AUROC {sum(aurocs) / 2:.1f} ± " in calls[-1][0][1]


def test_thresholds_are_those_of_the_cells(cells: list[dict[str, Any]]) -> None:
    changed = copy.deepcopy(cells)
    own = [cell for cell in changed if cell["task"] == cell["eval_task"] and cell["method"] == "mle"]
    own[0]["selective"][0] |= {"threshold": None, "coverage": 0.0, "rows": 0, "error": None, "interval": [0.0, 1.0]}
    own[0]["selective"][1] |= {"threshold": 0.91234, "coverage": 0.25, "error": 0.08, "interval": [0.031, 0.155]}
    [listing, _] = section(report_page(changed), "What if").listings
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


def test_each_run_is_told_once_with_its_command(cells: list[dict[str, Any]]) -> None:
    runs, settings, data, versions = section(report_page(cells), "How it was made").listings
    assert len(runs.lines) == 4 and runs.lines[0][:5] == ("table2", "mle", "openbookqa", "1", "600")
    assert runs.lines[0][-1] == "bayestune table table1 --data data"
    assert settings.lines[0][-1] == "model: minilm, seed: 1, steps: 600"
    assert [line[3] for line in data.lines] == ["openbookqa", "arc_challenge"]
    assert data.lines[0][-1] == "model.safetensors: ab12"
    assert versions.lines == (("python: 3.11.2, torch: 2.13.0", "machine: x86_64, device: cpu"),)


def test_several_tables_are_told_apart(cells: list[dict[str, Any]]) -> None:
    page = report_page([*cells, record(answers(rows=30))])
    assert [table.title.partition(":")[0] for table in section(page, "Scores").tables] == ["Table 1", "Table 2"]
    headings = [group.heading for group in section(page, "Does confidence").groups]
    assert headings == [f"Reliability on {name}" for name in ("Table 1, OBQA", "Table 2, OBQA", "Table 2, ARC-C")]


def test_what_cannot_be_reported_is_refused(cells: list[dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="found no cells"):
        report_page([])
    with pytest.raises(ConfigError, match="table: found 'table9'"):
        report_page([cells[0] | {"table": "table9"}])


@pytest.mark.property("X05")
@pytest.mark.parametrize(
    "payload", ["<script>alert(1)</script>", '" onmouseover="x', "<!--", "\u2028", "x" * 100_000, "\x00\x1b[31m"]
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

    made = page(payload)
    assert shape(made) == shape(page("plain"))
    assert "\u2028" not in made and "\x00" not in made and "\x1b" not in made
    assert len(made) < 60_000


def test_the_report_is_the_same_again_and_names_no_folder(cells: list[dict[str, Any]], tmp_path: Path) -> None:
    save(tmp_path, *cells)
    pages_made = [page_html(report_page(read_cells(tmp_path))) for _ in range(2)]
    assert pages_made[0] == pages_made[1]
    assert str(tmp_path) not in pages_made[0] and "someone" not in pages_made[0]


def test_pictures_are_of_the_most_draws_of_a_method_and_tables_of_all(
    cells: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = [copy.deepcopy(cell) | {"draws": 5} for cell in cells if cell["method"] == "blob"]
    titles = {
        name: [args[0] for args, _ in drawn(monkeypatch, name, [*cells, *fewer])]
        for name in ("reliability_chart", "histogram_chart")
    }
    assert all("N = 5" not in title for found in titles.values() for title in found)
    assert sum("N = 10" in title for title in titles["reliability_chart"]) == 2
    page = report_page([*cells, *fewer])
    [risks] = [group for group in section(page, "What if").groups if group.heading.startswith("Risk")]
    assert [key.text for key in risks.keys] == ["MLE", "BLoB, N = 10"]
    labels = [line.label for line in section(page, "Scores").tables[0].blocks[0].lines]
    assert labels == ["MLE", "BLoB, N = 5", "BLoB, N = 10"]
