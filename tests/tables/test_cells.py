"""Cells: what is recorded of a prediction, and what is refused when a folder of them is read."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import sklearn.metrics
import torch

from bayestune import metrics
from bayestune.errors import ConfigError, DataError
from bayestune.inference import Prediction, evaluate
from bayestune.tables.cells import cell_path, read_cells
from bayestune.tables.fields import HISTOGRAM_ENDS, CellFields
from tabled import answers, record, save


def changed(cell: dict[str, Any], field: str, value: Any) -> dict[str, Any]:
    """The cell with one field, such as "reliability.counts", set; `...` removes it."""
    cell = copy.deepcopy(cell)
    *path, last = field.split(".")
    inner = cell
    for name in path:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return cell


# Making cells.


def test_the_scores_are_those_of_evaluate() -> None:
    prediction = answers()
    cell, scores = record(prediction), evaluate(prediction)
    for name in ("accuracy", "nll", "ece", "brier"):
        assert cell[name] == getattr(scores, name)
        assert cell["intervals"][name] == list(scores.intervals[name])
    assert cell["rows"] == 200 and cell["draws"] == 10 and cell["eval_task"] == cell["task"] == "openbookqa"
    assert cell.keys() == CellFields.model_fields.keys()
    assert cell_path("results", cell) == Path("results/table1/openbookqa/openbookqa/blob_n10_seed1.json")


def test_the_reliability_bins_give_the_ece_again() -> None:
    cell = record(answers(sharp=3.0))
    bins = zip(*cell["reliability"].values(), strict=True)
    ece = sum(n * abs(accuracy - confidence) for n, confidence, accuracy in bins if n) / cell["rows"]
    # Both means of a bin are rounded to 6 decimals.
    assert ece == pytest.approx(cell["ece"], abs=1e-6)
    empty = [i for i, n in enumerate(cell["reliability"]["counts"]) if n == 0]
    assert empty and all(cell["reliability"][name][i] is None for name in ("confidence", "accuracy") for i in empty)


def test_the_risk_at_each_percent_is_that_of_the_surest_rows() -> None:
    rows = 333
    prediction = answers(rows=rows)
    cell = record(prediction)
    confidence, correct = prediction.probs.amax(-1), prediction.answer == prediction.labels
    order = confidence.argsort(descending=True)
    curve = dict(zip(*cell["risk_coverage"].values(), strict=True))
    for percent in range(1, 101):
        accepted = -(-percent * rows // 100)  # the smallest number of rows with that coverage
        risk = 1 - correct[order[:accepted]].double().mean().item()
        assert curve[round(accepted / rows, 6)] == pytest.approx(risk, abs=5e-7 + 1e-15)
    assert cell["aurc"] == metrics.aurc(confidence, correct)


def test_selective_holds_the_thresholds_of_the_three_targets() -> None:
    prediction = answers(sharp=2.0)
    confidence, correct = prediction.probs.amax(-1), prediction.answer == prediction.labels
    found = record(prediction)["selective"]
    for entry, target in zip(found, (0.05, 0.1, 0.2), strict=True):
        expected = metrics.threshold_for_error(confidence, correct, target)
        assert entry == {**vars(expected), "interval": list(expected.interval)}


def test_prediction_sets_are_those_of_the_metrics_and_missing_where_rows_are_few(tmp_path: Path) -> None:
    prediction = answers(rows=200)
    cell = record(prediction)
    for score, found in cell["conformal"].items():
        expected = metrics.split_conformal(prediction.log_probs, prediction.labels, alpha=0.1, score=score)
        assert found == vars(expected)
    assert cell["conformal"].keys() == {"lac", "aps"}
    # Half of the rows must be at least the 9 that sets with 90 % coverage need.
    assert record(answers(rows=17))["conformal"] is None and record(answers(rows=18))["conformal"] is not None
    older = {name: value for name, value in cell.items() if name != "conformal"}
    save(tmp_path, older)
    assert read_cells(tmp_path) == [older]


def test_histograms_count_every_row_once_and_what_is_above_in_the_last_bin() -> None:
    # Probabilities 1, 0.5 and 1/8: total 0, log 2 and log 8 = 2.08 nats, the last above the range.
    log_probs = torch.full((1, 3, 8), -math.inf, dtype=torch.float64)
    log_probs[0, 0, 0] = 0.0
    log_probs[0, 1, :2] = math.log(0.5)
    log_probs[0, 2] = math.log(1 / 8)
    labels = torch.tensor([0, 0, 0])
    made = Prediction(ids=("a", "b", "c"), draw_log_probs=log_probs, labels=labels, draws=0, seed=0, task="openbookqa")
    found = record(made)["uncertainty"]
    nonzero = {name: [i for i, n in enumerate(found[name]["counts"]) if n] for name in HISTOGRAM_ENDS}
    assert nonzero == {"total": [0, 6, 19], "epistemic": [0], "max_prob": [2, 10, 19]}
    assert found["epistemic"]["counts"][0] == 3
    assert {name: found[name]["end"] for name in found} == {"total": 2.0, "epistemic": 0.5, "max_prob": 1.0}


def test_detection_finds_the_other_data_by_each_uncertainty() -> None:
    known, other = answers(sharp=3.0, seed=1), answers("arc_easy", sharp=1.0, rows=50, seed=2)
    cell = record(other, known=known)
    truth = [0] * 200 + [1] * 50
    by = {
        "max_prob": [-p for p in [*known.probs.amax(1).tolist(), *other.probs.amax(1).tolist()]],
        "total": [*known.total.tolist(), *other.total.tolist()],
        "epistemic": [*known.epistemic.tolist(), *other.epistemic.tolist()],
    }
    for name, scores in by.items():
        found = cell["detection"][name]
        assert found["auroc"] == pytest.approx(sklearn.metrics.roc_auc_score(truth, scores), abs=1e-12)
        assert found["aupr"] == pytest.approx(sklearn.metrics.average_precision_score(truth, scores), abs=1e-12)
    assert cell["detection"]["max_prob"]["auroc"] > 0.6
    assert cell["in_distribution"] == {"rows": 200, "uncertainty": record(known)["uncertainty"]}
    assert cell["uncertainty"] == record(other, task="arc_easy")["uncertainty"]


def test_detection_needs_answers_to_the_runs_own_task_with_the_same_draws() -> None:
    other = answers("arc_easy")
    for known, found in ((None, "none"), (answers(draws=5), "5 draws"), (answers("rte"), "for 'rte'")):
        with pytest.raises(
            ConfigError, match=f"known is .*{found}.*expected predictions for 'openbookqa' with 10 draws"
        ):
            record(other, known=known)


def test_rows_that_cannot_be_scored_make_no_cell() -> None:
    prediction = answers(rows=4)
    bare = Prediction(**{**vars(prediction), "labels": None})
    with pytest.raises(DataError, match="no label"):
        record(bare)
    log_probs = prediction.draw_log_probs.clone()
    log_probs[:, 2] = torch.tensor([0.0, -math.inf, -math.inf, -math.inf])
    impossible = Prediction(**{**vars(prediction), "draw_log_probs": log_probs, "labels": torch.tensor([0, 0, 1, 0])})
    with pytest.raises(DataError, match="1 rows whose label has probability 0"):
        record(impossible)


def test_the_machines_folders_stay_out_of_a_cell() -> None:
    command = [
        "bayestune",
        "--data",
        "/home/someone/data",
        "--model=~/models/Llama-2-7b-hf",
        "C:\\Users\\x\\out",
        "a=b",
    ]
    cell = record(answers(), command=command, settings={"model": "/srv/models/minilm/", "data": "../shared/data"})
    assert cell["command"] == ["bayestune", "--data", "data", "--model=Llama-2-7b-hf", "out", "a=b"]
    assert cell["experiment"]["model"] == "minilm" and cell["experiment"]["data"] == "../shared/data"
    assert "someone" not in json.dumps(cell)


def test_a_cell_is_deterministic_and_survives_json(tmp_path: Path) -> None:
    known = answers()
    cells = [record(known), record(answers("arc_easy", rows=30, seed=3), known=known)]
    assert cells == [record(known), record(answers("arc_easy", rows=30, seed=3), known=known)]
    save(tmp_path, *cells)
    assert read_cells(tmp_path) == sorted(cells, key=lambda cell: cell["eval_task"])


@pytest.mark.parametrize(
    ("name", "value"),
    [("table", "../up"), ("seconds", math.nan)],
)
def test_a_value_that_no_cell_may_have_is_refused_when_it_is_made(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"cell: field {name}: found .*, expected "):
        record(answers(), **{name: value})


# Reading cells.


@pytest.fixture(scope="module")
def cell() -> dict[str, Any]:
    return record(answers())


@pytest.fixture(scope="module")
def moved() -> dict[str, Any]:
    return record(answers("arc_easy", seed=4), known=answers())


FAULTS = [
    ("table", ..., "found no field 'table', expected only cells of a table here"),
    ("reliability", ..., "found no field reliability, expected one"),
    ("colour", "red", "unknown field colour, expected only"),
    ("detection", {}, "unknown field detection"),
    ("accuracy", math.nan, "field accuracy: found nan, expected a finite number"),
    ("accuracy", True, "field accuracy: found True"),
    ("accuracy", 1.1, "field accuracy: found 1.1, expected less than or equal to 1"),
    ("nll", 10**400, "field nll: found 1000"),
    ("method", "../blob", "field method: found '../blob'"),
    ("intervals.ece", [0.1], "field intervals.ece: found a list of 1, expected at least 2 items"),
    ("uncertainty.total.end", 3.0, "field uncertainty: found total.end = 3.0, expected 2.0"),
    ("experiment.rates", {"a": [math.nan]}, "field experiment.rates: found nan"),
]


@pytest.mark.parametrize(("field", "value", "message"), FAULTS, ids=[f"{f}-{str(v)[:9]}" for f, v, _ in FAULTS])
def test_a_faulty_cell_is_refused_with_file_and_field(
    cell: dict[str, Any], tmp_path: Path, field: str, value: Any, message: str
) -> None:
    path = tmp_path / "cell.json"
    path.write_text(json.dumps(changed(cell, field, value)))
    with pytest.raises(ConfigError, match=rf"cell\.json: {message}") as caught:
        read_cells(tmp_path)
    assert len(str(caught.value)) < 1500


def test_a_cell_about_other_data_needs_its_detection(moved: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "cell.json"
    for field, message in (
        ("detection", "no field detection"),
        ("detection.total.aupr", "field detection.total: found a dict of 1, expected at least 2 items"),
    ):
        path.write_text(json.dumps(changed(moved, field, ...)))
        with pytest.raises(ConfigError, match=message):
            read_cells(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "found a list"),
        ("[" * 100_000, "cannot be read"),
    ],
)
def test_a_file_that_is_no_cell_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"other\.json: {message}"):
        read_cells(tmp_path)


def test_deep_free_content_is_looked_through(cell: dict[str, Any], tmp_path: Path) -> None:
    deep = '{"a": ' * 600 + "NaN" + "}" * 600
    text = json.dumps(changed(cell, "hardware.more", "@")).replace('"@"', deep)
    (tmp_path / "cell.json").write_text(text)
    with pytest.raises(ConfigError, match=r"cell\.json: (field hardware.more: found nan|cannot be read)"):
        read_cells(tmp_path)


def test_no_folder_and_an_empty_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        read_cells(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="found no .json file"):
        read_cells(tmp_path)


def test_shares_may_be_one_rounding_above_one(cell: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "cell.json").write_text(json.dumps(changed(cell, "aurc", 1 + 2**-52)))
    assert len(read_cells(tmp_path)) == 1


def test_cells_of_several_folders_are_compared_too(tmp_path: Path) -> None:
    save(tmp_path / "a", record(answers(rows=20)))
    save(tmp_path / "b", record(answers(rows=20), seed=2, train_rows=7))
    with pytest.raises(ConfigError, match=r"b/.*seed2\.json: field train_rows: found 7, expected 4952 as in .*a/"):
        read_cells(tmp_path / "a", tmp_path / "b")


def test_the_same_cell_twice_is_refused_naming_both(cell: dict[str, Any], tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text(json.dumps(cell))
    with pytest.raises(ConfigError, match=r"b\.json: the same .*a\.json; remove one"):
        read_cells(tmp_path)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"settings": {"model": "llama"}}, "experiment.model"),
        ({"sha256": {"base": {}, "train_rows": "t", "eval_rows": "openbookqa"}}, "sha256.base"),
        (
            {"sha256": {"base": {"model.safetensors": "ab12"}, "train_rows": "u", "eval_rows": "e"}},
            "sha256.train_rows",
        ),
        (
            {"sha256": {"base": {"model.safetensors": "ab12"}, "train_rows": "t", "eval_rows": "e"}},
            "sha256.eval_rows",
        ),
        ({"train_rows": 7}, "train_rows"),
        ({"steps": 601}, "steps"),
        ({"settings": {"rank": 4}}, "experiment.rank"),
        ({"settings": {"prior_std": 0.3}}, "experiment.prior_std"),
    ],
)
def test_a_cell_of_another_configuration_is_refused(tmp_path: Path, changes: dict[str, Any], field: str) -> None:
    ours = {"rank": 8, "prior_std": 0.2}
    first = record(answers(rows=20), settings=ours)
    settings = ours | changes.get("settings", {})
    save(tmp_path, first, record(answers(rows=20), seed=2, **{**changes, "settings": settings}))
    with pytest.raises(ConfigError, match=rf"seed2\.json: field {field}: found .* as in .*seed1\.json"):
        read_cells(tmp_path)


def test_methods_share_the_budget_but_not_their_own_settings(tmp_path: Path) -> None:
    first = record(answers(rows=20), settings={"rank": 8, "learning_rate": 1e-4, "prior_std": 0.2})
    fine = record(answers(rows=20, draws=0), method="mle", settings={"rank": 8, "learning_rate": 5e-4})
    save(tmp_path, first, fine)
    assert [cell["method"] for cell in read_cells(tmp_path)] == ["blob", "mle"]
    save(tmp_path, record(answers(rows=20, draws=0), method="map", settings={"rank": 16}))
    with pytest.raises(ConfigError, match="field experiment.rank"):
        read_cells(tmp_path)


def test_tables_and_training_sets_are_apart(tmp_path: Path) -> None:
    other = {"base": {"model.safetensors": "ab12"}, "train_rows": "v", "eval_rows": "rte"}
    save(
        tmp_path,
        record(answers(rows=20)),
        record(answers("rte", rows=30), task="rte", sha256=other, steps=50, train_rows=9),
        record(answers(rows=20), table="table2", settings={"model": "llama"}),
    )
    assert len(read_cells(tmp_path)) == 3


def test_cells_come_sorted_whatever_their_files_are_called(tmp_path: Path) -> None:
    made = [record(answers(rows=20, draws=draws), seed=seed) for draws in (10, 0, 5) for seed in (10, 2)]
    for i, cell in enumerate(made):
        (tmp_path / f"{i}.json").write_text(json.dumps(cell))
    found = [(cell["draws"], cell["seed"]) for cell in read_cells(tmp_path)]
    assert found == [(0, 2), (0, 10), (5, 2), (5, 10), (10, 2), (10, 10)]
