"""Numbers through the command line: a run, its answers without the training data, its methods, and what is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bayestune.experiment import load_run
from bayestune.methods import METHODS
from bayestune_cli.app import invoke
from toys import pretrained_bert, pretrained_llama, write_data, write_rows

REFUSED = ("tfb", "distilled")
FLAGS = {
    "temperature": ("--temperature-split", "train"),
    "swag": ("--swag-steps", "4"),
    "ensemble": ("--members", "2"),
}
pytestmark = pytest.mark.filterwarnings("ignore:fit_scale. :bayestune.errors.BayestuneWarning")


def lengths(start: int, count: int, *, several: bool = False) -> list[dict[str, Any]]:
    """Rows with the number of their letters in some unit, or two such numbers."""
    rows = []
    for i in range(start, start + count):
        number = 500.0 + 40 * (i % 9)
        target = [number, -number / 100] if several else number
        rows.append({"id": f"r{i}", "text": "a" * (1 + i % 9) + f" {i}", "target": target})
    return rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/, llama/, data/, new.jsonl and run/, a BLoB run whose scale is chosen on held-out rows."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    pretrained_llama(folder / "llama")
    for name, several in (("lengths", False), ("pairs", True)):
        write_rows(folder / "data" / name / "train.jsonl", lengths(0, 100, several=several))
        write_rows(folder / "data" / name / "dev.jsonl", lengths(200, 10, several=several))
    write_rows(folder / "data" / "few" / "train.jsonl", lengths(0, 12))
    write_rows(folder / "data" / "lengths" / "fit.jsonl", lengths(250, 10))
    write_rows(folder / "data" / "few" / "dev.jsonl", lengths(200, 4))
    write_rows(folder / "data" / "other" / "dev.jsonl", lengths(300, 6))
    new = [{name: value for name, value in row.items() if name != "target"} for row in lengths(400, 6)]
    write_rows(folder / "new.jsonl", new)
    write_data(folder / "data")
    assert invoke(training(folder, folder / "run")) == 0
    return folder


def training(world: Path, output: Path, *flags: str, task: str = "lengths", model: str = "bert") -> list[str]:
    command = ["train", "--model", str(world / model), "--task", task, "--data", str(world / "data"), "--steps", "3"]
    command += ["--batch-size", "4", "--draws", "2", "--max-tokens", "200", "--learning-rate", "0.01"]
    return [*command, "--output", str(output), *flags]


def predicting(run: Path, source: Path, output: Path, *flags: str) -> list[str]:
    return ["predict", str(run), "--input", str(source), "--output", str(output), *flags]


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_keeps_its_units_and_answers_without_its_data(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((world / "run" / "result.json").read_text())
    targets = torch.tensor([row["target"] for row in lengths(0, 100)], dtype=torch.float64)
    assert record["experiment"]["target_mean"] == pytest.approx([targets.mean().item()])
    assert record["experiment"]["target_std"] == pytest.approx([targets.std(correction=0).item()])
    assert record["fitted"]["rows"] == 20 and "0.25" in record["fitted"]["nll_by_scale"]
    for scores in record["methods"].values():
        assert {"rmse", "nll", "crps", "coverage", "coverage_error", "intervals"} <= scores.keys()
    run = shutil.copytree(world / "run", tmp_path / "run")
    (tmp_path / "none").mkdir()
    assert invoke(predicting(run, world / "new.jsonl", tmp_path / "a", "--data", str(tmp_path / "none"))) == 0
    found = answers(tmp_path / "a")
    assert [answer["id"] for answer in found] == [f"r{i}" for i in range(400, 406)]
    std = record["experiment"]["target_std"][0]
    for answer in found:
        assert answer["interval"][0] < answer["mean"] < answer["interval"][1]
        assert abs(answer["mean"] - targets.mean().item()) < 3 * std and 0.1 < answer["total"] / std**2 < 10
    capsys.readouterr()
    assert invoke(["evaluate", str(world / "run"), "--json", "--ood", "other"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["nll"] == pytest.approx(record["methods"]["blob_n2"]["nll"], abs=1e-5)
    assert {"rmse", "auroc_total", "auroc_epistemic", "auroc_novelty"} <= evaluated["ood"]["other"].keys()
    assert "auroc_largest_probability" not in evaluated["ood"]["other"] and "diagnostics" not in evaluated
    assert invoke(["evaluate", str(world / "run"), "--predictive", "linearised", "--ood", "other"]) == 0
    out = capsys.readouterr().out
    assert "RMSE" in out and "CRPS" in out and "other: RMSE" in out


def test_predict_resumes_with_the_same_answers_only(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = predicting(world / "run", world / "new.jsonl", tmp_path / "a")
    assert invoke(command) == 0
    whole = (tmp_path / "a").read_text()
    first = "".join(whole.splitlines(keepends=True)[:2])
    (tmp_path / "a").write_text(first)
    assert invoke([*command, "--resume"]) == 0
    assert (tmp_path / "a").read_text() == whole
    moved = [{**answer, "mean": answer["mean"] + 1.0} for answer in answers(tmp_path / "a")[:2]]
    write_rows(tmp_path / "a", moved)
    capsys.readouterr()
    assert invoke([*command, "--resume"]) == 2
    assert "found another answer for row 'r400' than this run gives" in capsys.readouterr().err


def test_several_numbers_with_constant_noise_on_a_causal_model(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The noise is one temperature, fitted on the training rows where no split is named; it is kept."""
    flags = training(world, tmp_path / "run", "--noise", "constant", "--method", "mle", task="pairs", model="llama")
    assert invoke(flags) == 0
    out = capsys.readouterr().out
    assert ", fitted on train" in out
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["temperature"] != 1 and record["experiment"]["temperature_split"] == "train"
    assert invoke(predicting(tmp_path / "run", world / "new.jsonl", tmp_path / "a")) == 0
    std = torch.tensor(record["experiment"]["target_std"])
    for answer in answers(tmp_path / "a"):
        assert len(answer["mean"]) == 2 and [len(ends) for ends in answer["interval"]] == [2, 2]
        torch.testing.assert_close(torch.tensor(answer["aleatoric"]), record["temperature"] * std**2)
        assert answer["epistemic"] == [0, 0]


@pytest.mark.parametrize("method", [name for name in METHODS if name not in REFUSED])
def test_a_run_of_each_method_is_loaded_with_the_same_answers(world: Path, tmp_path: Path, method: str) -> None:
    assert invoke(training(world, tmp_path / "run", "--method", method, *FLAGS.get(method, ()), task="few")) == 0
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    loaded = load_run(tmp_path / "run")
    rows = loaded.task.rows("dev")
    for key, draws in loaded.evaluations().items():
        again = loaded.predict(rows, draws=draws).scores(resamples=2)
        assert again.nll == pytest.approx(record["methods"][key]["nll"], abs=1e-5)
        assert again.rmse == pytest.approx(record["methods"][key]["rmse"], rel=1e-5)


def test_a_method_that_is_started_from_an_adapter_has_its_units(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    units = ("--target-mean", "400", "--target-std", "100")
    assert invoke(training(world, tmp_path / "mle", "--method", "mle", *units, task="few")) == 0
    start = ("--method", "laplace", "--adapter", str(tmp_path / "mle"))
    assert invoke(training(world, tmp_path / "laplace", *start, task="few")) == 0
    records = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("mle", "laplace")]
    assert [record["experiment"]["target_mean"] for record in records] == [[400.0], [400.0]]
    assert records[1]["methods"]["laplace_n0"]["rmse"] == pytest.approx(records[0]["methods"]["mle"]["rmse"], rel=1e-5)
    other = training(world, tmp_path / "other", *start, "--target-std", "3", task="few")
    assert "target_std: found (3.0,), expected (100.0,), as the run in" in refused(other, capsys)


def refused(command: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert invoke(command) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert out == "" and len(lines) == 1 and "Traceback" not in err
    return lines[0]


def test_what_means_nothing_for_numbers_is_refused_in_one_line(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, output = str(world / "run"), tmp_path / "out"
    cases = {
        "acquire: found score 'entropy' for a task without classes": [
            *("acquire", run, "--pool", str(world / "new.jsonl"), "--score", "entropy")
        ],
        "distilled: found task lengths without classes": ["distil", run, "--output", str(output)],
        "tfb: found task lengths without classes": training(world, output, "--method", "tfb"),
        "laplace: found predictive 'probit' for task lengths without classes": training(
            world, output, "--method", "laplace", "--laplace-predictive", "probit"
        ),
        "laplace: found precision 'validation'": training(world, output, "--method", "laplace", "--fit-split", "fit"),
        "noise: found 'constant', expected none: colours has multiple-choice rows": training(
            world, output, "--noise", "constant", task="colours"
        ),
        "--target-std: found 'a,2', expected comma-separated numbers": training(world, output, "--target-std", "a,2"),
        "target_mean and target_std: found one of them": training(world, output, "--target-mean", "3"),
        "(id r200): field 'target': found 2 numbers, expected 1 per row of pairs": [
            *("evaluate", run, "--ood", "pairs")
        ],
    }
    for words, command in cases.items():
        assert words in refused(command, capsys)
        assert not output.exists()
    assert invoke(["acquire", run, "--pool", str(world / "new.jsonl"), "--score", "random"]) == 0


@pytest.mark.property("D08")
@pytest.mark.parametrize("target", ["x", True, [1.0, None], [1.0, 2.0], []])
def test_a_bad_target_ends_train_and_predict_with_2_and_is_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], target: Any
) -> None:
    rows = [*lengths(0, 3), {"id": "bad", "text": "x", "target": target}]
    command = training(world, tmp_path / "run", "--data", str(tmp_path))
    write_rows(tmp_path / "lengths" / "train.jsonl", rows)
    write_rows(tmp_path / "lengths" / "dev.jsonl", lengths(10, 2))
    assert "train.jsonl:4 (id bad): field 'target': " in refused(command, capsys)
    asked = predicting(world / "run", tmp_path / "lengths" / "train.jsonl", tmp_path / "a")
    assert "train.jsonl:4 (id bad): field 'target': " in refused(asked, capsys)
    assert not (tmp_path / "a").exists() and not (tmp_path / "run").exists()
