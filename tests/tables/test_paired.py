"""Differences to MLE in tables: closed forms, and what is left out of them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from bayestune import metrics
from bayestune.errors import ConfigError
from bayestune.report.views import Block, Table
from bayestune.tables.cells import read_cells
from bayestune.tables.page import report_page
from bayestune.tables.table import table_view
from tabled import answers, record, save

ROWS = 16


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return record(answers(rows=ROWS))


def cell(base: dict[str, Any], method: str, seed: int, nll: float, correct: int, draws: int = 0) -> dict[str, Any]:
    """A cell whose row i has the NLL `nll` + i/8, and whose first `correct` rows are right."""
    scores = {"nll": [nll + i / 8 for i in range(ROWS)], "correct": [1] * correct + [0] * (ROWS - correct)}
    return copy.deepcopy(base) | {"method": method, "seed": seed, "draws": draws, "row_scores": scores}


def differences(table: Table) -> list[Block]:
    return [block for block in table.blocks if block.heading.startswith("Difference to MLE")]


def texts(block: Block) -> dict[str, list[str]]:
    return {line.label: [value.text for value in line.values] for line in block.lines}


def left_out(table: Table) -> list[str]:
    return [note for note in table.notes if note.startswith("Left out of the differences")]


def test_row_scores_are_those_of_each_row_in_order() -> None:
    prediction = answers()
    found = record(prediction)["row_scores"]
    assert prediction.labels is not None
    expected = metrics.row_nll(prediction.log_probs, prediction.labels).tolist()
    assert found["nll"] == pytest.approx(expected, abs=5e-7)
    assert found["correct"] == (prediction.answer == prediction.labels).int().tolist()


def test_a_constant_difference_is_printed_with_an_interval_of_no_width(plain: dict[str, Any]) -> None:
    """NLL differences of -1/4 and -1/2 in the two seeds: -0.375. Both answer the same rows: accuracy 0."""
    cells = [cell(plain, "mle", 1, 1.0, 8), cell(plain, "mle", 2, 2.0, 4)]
    cells += [cell(plain, "blob", 1, 0.75, 8, draws=10), cell(plain, "blob", 2, 1.5, 4, draws=10)]
    table = table_view(cells, "table1")
    nll, accuracy = differences(table)
    assert nll.heading == "Difference to MLE in NLL, nats (lower is better)"
    assert accuracy.heading == "Difference to MLE in ACC, % points (higher is better)"
    assert texts(nll) == {"BLoB, N = 10": ["-0.375 [-0.375, -0.375]"]}
    assert texts(accuracy) == {"BLoB, N = 10": ["+0.00 [+0.00, +0.00]"]}
    assert nll.columns == ("OBQA",) and left_out(table) == []
    assert any("95 % paired bootstrap" in note for note in table.notes)
    page = report_page(cells)
    assert differences(page.sections[0].tables[0]) == [nll, accuracy]


def test_a_difference_that_varies_has_the_interval_of_its_rows(plain: dict[str, Any]) -> None:
    """4 of 16 more rows are right: 25 points, and the interval is that of 4 ones and 12 zeros."""
    cells = [cell(plain, "mle", 1, 1.0, 8), cell(plain, "map", 1, 1.0, 12)]
    values = torch.zeros(ROWS, dtype=torch.float64)
    values[8:12] = 1
    low, high = (100 * end for end in metrics.bootstrap_interval(values))
    assert low < 25 < high
    assert texts(differences(table_view(cells, "table1"))[1]) == {"MAP": [f"+25.00 [+{low:.2f}, +{high:.2f}]"]}


def test_seeds_are_paired_and_fewer_seeds_are_marked(plain: dict[str, Any]) -> None:
    """MLE of seed 1 with the method of seed 2 would give another difference."""
    cells = [cell(plain, "mle", 1, 1.0, 8), cell(plain, "mle", 2, 3.0, 8)]
    cells += [cell(plain, "map", 2, 2.5, 8), cell(plain, "bbb", 3, 1.0, 8)]
    table = table_view(cells, "table1")
    assert texts(differences(table)[0]) == {"MAP": ["-0.500 [-0.500, -0.500] (n = 1)"]}
    assert left_out(table) == [
        "Left out of the differences to MLE: 1 of 2 cells (1 without an MLE cell of the same seed)."
    ]


def test_other_rows_and_cells_without_row_scores_are_left_out_and_counted(plain: dict[str, Any]) -> None:
    cells = [cell(plain, "mle", seed, 1.0, 8) for seed in (1, 2)]
    cells += [cell(plain, method, 1, 0.5, 8) for method in ("map", "dropout", "bbb")] + [cell(plain, "map", 2, 0.5, 8)]
    del cells[1]["row_scores"]  # the MLE cell of seed 2
    cells[3]["row_scores"] = None  # dropout
    cells[4]["sha256"]["eval_rows"] = "other"  # bbb
    table = table_view(cells, "table1")
    assert texts(differences(table)[0]) == {"MAP": ["-0.500 [-0.500, -0.500] (n = 1)"]}
    assert left_out(table) == [
        "Left out of the differences to MLE: 3 of 4 cells (1 evaluated on other rows, 2 without scores per row, in "
        "the cell or in its MLE cell)."
    ]


def test_a_table_of_older_cells_says_that_it_has_no_differences(plain: dict[str, Any]) -> None:
    cells = [cell(plain, method, 1, 1.0, 8) for method in ("mle", "map")]
    for older in cells:
        del older["row_scores"]
    table = table_view(cells, "table1")
    assert differences(table) == [] and len(left_out(table)) == 1
    alone = table_view(cells[:1], "table1")
    assert differences(alone) == left_out(alone) == []


def test_scores_per_row_that_do_not_fit_the_rows_are_refused(plain: dict[str, Any], tmp_path: Path) -> None:
    for scores, message in (
        ({"nll": [1.0] * 3, "correct": [1] * ROWS}, f"row_scores: found 3 values of nll, expected .* {ROWS} rows"),
        ({"nll": [1.0] * ROWS, "correct": [2] * ROWS}, "row_scores.correct.0: found 2, expected less than or equal"),
    ):
        save(tmp_path, plain | {"row_scores": scores})
        with pytest.raises(ConfigError, match=message):
            read_cells(tmp_path)
