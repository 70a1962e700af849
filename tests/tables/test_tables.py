"""Tables against small records whose means, deviations and ranks are worked out by hand."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest

from bayestune.errors import ConfigError
from bayestune.report.html import table_html
from bayestune.report.markdown import markdown
from bayestune.report.views import Block, Table
from bayestune.tables.cells import read_cells
from bayestune.tables.layouts import TABLES
from bayestune.tables.published import figures
from bayestune.tables.summary import DETECTION, MEASURES, Spread, ranks, spread
from bayestune.tables.table import table_view
from tabled import answers, record, save

ACC, ECE, NLL = MEASURES


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return record(answers(rows=20))


@pytest.fixture(scope="module")
def other() -> dict[str, Any]:
    return record(answers("arc_easy", rows=20), known=answers(rows=20), table="table2")


def cell(base: dict[str, Any], method: str, seed: int, draws: int = 0, **changes: Any) -> dict[str, Any]:
    """A cell with chosen scores."""
    return copy.deepcopy(base) | {"method": method, "seed": seed, "draws": draws} | changes


def block(table: Table, heading: str) -> Block:
    [found] = [block for block in table.blocks if block.heading.startswith(heading)]
    return found


def line(found: Block, label: str) -> list[str]:
    [texts] = [[value.text for value in line.values] for line in found.lines if line.label == label]
    return texts


def looks(found: Block, column: int) -> dict[str, str]:
    """Of each line: its value in a column, "*" if best and "_" if second."""
    return {line.label: "*" * line.values[column].best + "_" * line.values[column].second for line in found.lines}


def test_a_value_is_the_mean_and_the_sample_deviation_over_seeds(plain: dict[str, Any]) -> None:
    # Accuracies 0.70, 0.73, 0.79: mean 0.74, squares 16 + 1 + 25 = 42 (1e-4), deviation sqrt(21)e-2 = 0.0458.
    cells = [
        cell(plain, "mle", seed, accuracy=accuracy, ece=0.1, nll=nll)
        for seed, accuracy, nll in ((1, 0.70, 1.0), (2, 0.73, 1.5), (3, 0.79, 2.0))
    ]
    table = table_view(cells, "table1")
    assert line(block(table, "ACC"), "MLE") == ["74.00 ± 4.58"]
    assert line(block(table, "ECE"), "MLE")[0] == "10.00 ± 0.00"
    assert line(block(table, "NLL"), "MLE")[0] == "1.500 ± 0.500"
    assert block(table, "ACC").columns == ("OBQA",)
    assert "Data sets of the table that were not run: WG-S, ARC-C, ARC-E, WG-M, BoolQ." in table.notes
    assert table.facts == (
        "Made by: bayestune table table1 --rebuild, from 3 cells.",
        "Model: minilm.",
        "n = 3: mean ± sample standard deviation over seeds 1, 2, 3.",
    )


def test_one_seed_has_no_deviation(plain: dict[str, Any]) -> None:
    table = table_view([cell(plain, "mle", 7, accuracy=0.5)], "table1")
    assert line(block(table, "ACC"), "MLE")[0] == "50.00"
    assert table.facts[0].endswith("from 1 cell.") and table.facts[2] == "n = 1: one run, seed 7."


def test_best_and_second_are_by_the_direction_of_the_measure(plain: dict[str, Any]) -> None:
    scores = {"mle": 0.2, "map": 0.3, "laplace": 0.4}
    cells = [cell(plain, m, seed, accuracy=v, ece=v, nll=v) for m, v in scores.items() for seed in (1, 2)]
    table = table_view(cells, "table1")
    assert looks(block(table, "ACC"), 0) == {"MLE": "", "MAP": "_", "Laplace, N = 0": "*"}
    for heading in ("ECE", "NLL"):
        assert looks(block(table, heading), 0) == {"MLE": "*", "MAP": "_", "Laplace, N = 0": ""}


def test_equal_as_printed_is_equal(plain: dict[str, Any]) -> None:
    # 0.70001 and 0.70004 both print 70.00; the third is second, not third.
    cells = [cell(plain, m, 1, accuracy=v) for m, v in (("mle", 0.70001), ("map", 0.70004), ("bbb", 0.6))]
    found = looks(block(table_view(cells, "table1"), "ACC"), 0)
    assert found == {"MLE": "*", "MAP": "*", "BBB, N = 0": "_"}


def test_fewer_seeds_are_marked_and_not_ranked(plain: dict[str, Any]) -> None:
    cells = [cell(plain, "mle", seed, accuracy=0.5) for seed in (1, 2, 3)]
    cells += [cell(plain, "map", seed, accuracy=0.4) for seed in (1, 2, 3)]
    cells += [cell(plain, "blob", seed, draws=10, accuracy=0.9) for seed in (1, 2)]
    found = block(table_view(cells, "table1"), "ACC")
    assert looks(found, 0) == {"MLE": "*", "MAP": "_", "BLoB, N = 10": ""}
    assert line(found, "BLoB, N = 10")[0] == "90.00 ± 0.00 (n = 2)"
    assert line(found, "MLE")[0] == "50.00 ± 0.00"


def test_a_value_alone_is_not_the_best_of_anything() -> None:
    alone = Spread(mean=0.5, deviation=None, seeds=2)
    fewer = Spread(mean=0.9, deviation=None, seeds=1)
    assert ranks(ACC, {"a": alone, "b": fewer}) == (set(), set())
    assert ranks(ACC, {}) == (set(), set())
    assert ranks(ACC, {"a": alone, "b": alone}) == ({"a", "b"}, set())


def test_spread_is_exact() -> None:
    assert spread([0.1] * 3) == Spread(mean=0.1, deviation=0.0, seeds=3)
    assert spread([1e16, 1.0, -1e16]).mean == pytest.approx(1 / 3, abs=1e-16)


def test_lines_are_in_the_papers_order_and_unknown_methods_last(plain: dict[str, Any]) -> None:
    keys = [("zeta", 3), ("blob", 10), ("blob", 0), ("alpha", 0), ("mle", 0), ("dropout", 10), ("blob", 5)]
    cells = [cell(plain, method, 1, draws=draws) for method, draws in keys]
    labels = [line.label for line in block(table_view(cells, "table1"), "ACC").lines]
    expected = [
        "MLE",
        "MC dropout, N = 10",
        "BLoB, N = 0",
        "BLoB, N = 5",
        "BLoB, N = 10",
        "alpha, N = 0",
        "zeta, N = 3",
    ]
    assert labels == expected


def test_table2_has_detection_of_the_other_data_only(plain: dict[str, Any], other: dict[str, Any]) -> None:
    detection = {name: {"auroc": 0.6, "aupr": 0.7} for name in ("max_prob", "total", "epistemic")}
    cells = [
        cell(other, "blob", 1, draws=10, detection=detection | {"total": {"auroc": 0.812, "aupr": 0.9}}),
        cell(other, "mle", 1, draws=0, detection=detection),
        cell(plain, "mle", 1, table="table2", accuracy=0.25),
    ]
    table = table_view(cells, "table2")
    assert [found.heading for found in table.blocks[:3]] == [measure.heading for measure in MEASURES]
    assert [found.heading for found in table.blocks[3:9]] == [measure.heading for measure in DETECTION]
    assert block(table, "ACC").columns == ("OBQA", "ARC-E")
    assert line(block(table, "ACC"), "MLE")[0] == "25.00"
    total = block(table, "Out-of-distribution AUROC by total")
    assert total.columns == ("ARC-E",)
    assert line(total, "BLoB, N = 10") == ["81.20"]
    assert looks(total, 0) == {"MLE": "_", "BLoB, N = 10": "*"}
    epistemic = block(table, "AUPR of epistemic")
    assert line(epistemic, "MLE") == ["-"] and line(epistemic, "BLoB, N = 10") == ["70.00"]


def test_epistemic_uncertainty_is_no_detection_score_and_what_is_below_one_half_is_named(
    other: dict[str, Any],
) -> None:
    def scores(total: float, epistemic: float) -> dict[str, Any]:
        values = {"max_prob": 0.5, "total": total, "epistemic": epistemic}
        return {name: {"auroc": value, "aupr": 0.3} for name, value in values.items()}

    cells = [cell(other, "bbb", seed, draws=10, detection=scores(0.45, 0.2)) for seed in (1, 2)]
    cells += [cell(other, "blob", seed, draws=10, detection=scores(0.6, 0.4)) for seed in (1, 2)]
    table = table_view(cells, "table2")
    named = [found for found in table.blocks if "epistemic" in found.heading]
    assert [found.heading.partition(",")[0] for found in named] == [
        "AUROC of epistemic uncertainty",
        "AUPR of epistemic uncertainty",
    ]
    assert not any(value.best or value.second for found in named for line in found.lines for value in line.values)
    assert [note for note in table.notes if "below 50 %" in note] == [
        "AUROC below 50 %, so lower uncertainty on the other data: total uncertainty of BBB, N = 10 on ARC-E; "
        "epistemic uncertainty of BBB, N = 10 on ARC-E, BLoB, N = 10 on ARC-E."
    ]


def test_data_says_what_was_trained_and_evaluated_on(plain: dict[str, Any]) -> None:
    found = block(table_view([cell(plain, "mle", 1)], "table1"), "Data")
    assert line(found, "training rows") == ["4952"] and line(found, "evaluated rows") == ["20"]
    assert line(found, "updates") == ["600"]


def test_tables_that_are_not_there_are_refused(plain: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="table: found 'table9', expected one of table1, table2, roberta"):
        table_view([plain], "table9")
    with pytest.raises(ConfigError, match="roberta: found no cells of this table"):
        table_view([plain], "roberta")
    with pytest.raises(ConfigError, match="table1: found a cell trained on 'everyday' and evaluated on 'everyday'"):
        table_view([plain, cell(plain, "mle", 1, task="everyday", eval_task="everyday")], "table1")


# Published figures.

LLAMA = "models/llama-2-7b-HF/"


def llama(plain: dict[str, Any], method: str, draws: int, **changes: Any) -> dict[str, Any]:
    settings = plain["experiment"] | {"model": changes.pop("model", LLAMA)}
    given = {"rows": 500, "train_rows": 4957, "experiment": settings} | changes
    return cell(plain, method, 1, draws=draws, **given)


def published_lines(cells: list[dict[str, Any]], heading: str = "ACC") -> dict[str, str]:
    """Label and value on OBQA of the published lines."""
    found = block(table_view(cells, "table1"), heading)
    return {line.label.partition(":")[0]: line.values[0].text for line in found.lines if line.published}


def test_the_papers_figures_stand_below_ours_for_its_model_and_data(plain: dict[str, Any]) -> None:
    cells = [llama(plain, "mle", 0), llama(plain, "blob", 10), llama(plain, "dropout", 7), llama(plain, "tfb", 10)]
    table = table_view(cells, "table1")
    assert published_lines(cells) == {"MLE": "81.52", "MC dropout": "81.72", "BLoB, N = 10": "81.52"}
    assert published_lines(cells, "ECE") == {"MLE": "12.55", "MC dropout": "13.10", "BLoB, N = 10": "3.77"}
    assert published_lines(cells, "NLL") == {"MLE": "0.73", "MC dropout": "0.77", "BLoB, N = 10": "0.50"}
    found = block(table, "ACC")
    assert [line.published for line in found.lines] == [False, True, False, True, False, False, True]
    assert all("[to be checked]" in line.label for line in found.lines if line.published)
    assert found.columns == ("OBQA",)  # and nothing of the paper on sets that were not run
    assert not any(value.best or value.second for line in found.lines if line.published for value in line.values)
    assert "to be checked" in table.notes[-1]


def test_a_method_of_several_draws_has_the_papers_line_once_or_each_its_own(plain: dict[str, Any]) -> None:
    cells = [llama(plain, method, draws) for method in ("dropout", "blob") for draws in (0, 5)]
    found = block(table_view(cells, "table1"), "ACC")
    expected = ["MC dropout, N = 0", "MC dropout, N = 5", "MC dropout"] + ["BLoB, N = 0"] * 2 + ["BLoB, N = 5"] * 2
    assert [line.label.partition(":")[0] for line in found.lines] == expected


@pytest.mark.parametrize(
    "changes",
    [{"model": "x/not-Llama-2-7b-hf"}, {"rows": 499}, {"train_rows": 4952}],
)
def test_the_papers_figures_are_not_shown_beside_anything_else(plain: dict[str, Any], changes: dict[str, Any]) -> None:
    cells = [llama(plain, "mle", 0, **changes)]
    assert published_lines(cells) == {}
    assert "to be checked" not in markdown(table_view(cells, "table1"))


def test_the_papers_figures_are_complete() -> None:
    columns = {column.task for column in TABLES["table1"].columns}
    by_score = {measure.path[-1]: (0.3, 3.2) if measure is NLL else (1, 100) for measure in MEASURES}
    assert len(figures()) == 3 * 9 and {score for score, _, _ in figures()} == set(by_score)
    for (score, _, _), values in figures().items():
        low, high = by_score[score]
        assert set(values) == columns and all(low <= value < high for value in values.values())


# Bytes.


def test_the_same_cells_give_the_same_bytes_wherever_they_lie(plain: dict[str, Any], tmp_path: Path) -> None:
    cells = [cell(plain, m, seed, accuracy=0.3 + seed / 7) for m in ("mle", "map") for seed in (1, 2, 3)]
    made = []
    for name, order in (("here", cells), ("elsewhere", cells[::-1])):
        save(tmp_path / name, *order)
        read = read_cells(tmp_path / name)
        view = table_view(read, "table1")
        made.append((markdown(view), table_html(view)))
    assert made[0] == made[1]
    for text in made[0]:
        assert str(tmp_path) not in text and not re.search(r"20\d\d-\d\d|home|/tmp", text)


@pytest.mark.parametrize("name", ["table1", "table2"])
def test_the_committed_tables_are_those_that_results_give(name: str) -> None:
    root = Path(__file__).parents[2]
    view = table_view(read_cells(root / "results" / name), name)
    for suffix, text in (("md", markdown(view)), ("html", table_html(view))):
        assert (root / "docs" / "tables" / f"{name}.{suffix}").read_text(encoding="utf-8") == text
