"""Runs interrupted while they are scored, scored on fewer rows or not at all, and what is reported beside scores."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.integrations.integration_utils as integrations
from transformers import TrainerCallback

from bayestune.adapters import gaussian_layers
from bayestune.errors import ConfigError, DataError
from bayestune.experiment import Experiment, Result, load_run, other_task, run
from bayestune.functional import std
from bayestune.tables.grid import Grid, plan
from bayestune.tasks import TextRow
from bayestune.training import BayesTrainer
from bayestune_cli.app import invoke
from toys import pretrained_bert, questions, write_data, write_rows

runs: Any = importlib.import_module("bayestune.experiment.run")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/ and data/."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    write_data(folder / "data")
    return folder


def given(world: Path, **changes: Any) -> Experiment:
    settings = {"model": str(world / "bert"), "task": "colours", "data": str(world / "data"), "steps": 3}
    settings |= {"batch_size": 4, "draws": 2, "max_tokens": 200, "learning_rate": 0.01, "rho_init": 0.5, **changes}
    return Experiment.from_dict(settings, where="test")


def record(output: Path) -> dict[str, Any]:
    return json.loads((output / "result.json").read_text())


def interrupted(settings: Experiment, output: Path, monkeypatch: pytest.MonkeyPatch, *, at: str) -> None:
    """A run that is interrupted when it calls `at`, after training."""

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, at, interrupt)
        run(settings, output)
    assert not (output / "result.json").exists()


def resumed_without_training(settings: Experiment, output: Path, monkeypatch: pytest.MonkeyPatch) -> Result:
    with monkeypatch.context() as patch:
        patch.setattr(BayesTrainer, "train", None)
        return run(settings, output, resume=True)


def test_a_run_interrupted_while_scoring_can_be_used_and_resumes_at_its_scores(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "cut"
    whole = run(given(world), tmp_path / "whole")
    interrupted(given(world), output, monkeypatch, at="evaluate")
    rows = write_rows(tmp_path / "rows.jsonl", questions(0, 3))
    assert invoke(["evaluate", str(output)]) == 0
    assert invoke(["predict", str(output), "--input", str(rows), "--output", str(tmp_path / "answers.jsonl")]) == 0
    assert invoke(["export", str(output), "--output", str(tmp_path / "draws")]) == 0
    resumed = resumed_without_training(given(world), output, monkeypatch)
    for key, prediction in whole.predictions.items():
        assert torch.equal(prediction.draw_log_probs, resumed.predictions[key].draw_log_probs)
    one, other = record(tmp_path / "whole"), record(output)
    assert one | {"seconds": 0} == other | {"seconds": 0}
    assert {path.name for path in output.iterdir()} == {path.name for path in (tmp_path / "whole").iterdir()}


def test_a_run_interrupted_before_its_temperature_resumes_there(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, settings = tmp_path / "cut", given(world, method="mle", temperature_split="train")
    interrupted(settings, output, monkeypatch, at="temperature_of")
    with pytest.raises(ConfigError, match=r"temperature .* is not fitted yet.* --resume"):
        load_run(output)
    monkeypatch.setattr(runs, "temperature_of", lambda found: 2.0)
    assert resumed_without_training(settings, output, monkeypatch).temperature == 2
    assert load_run(output).posterior.temperature == record(output)["temperature"] == 2


def test_an_interrupted_run_is_not_scored_with_other_training_rows(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = shutil.copytree(world / "data", tmp_path / "data")
    settings, output = given(world, method="mle", data=str(data)), tmp_path / "cut"
    interrupted(settings, output, monkeypatch, at="evaluate")
    write_rows(data / "colours" / "train.jsonl", questions(0, 15))
    with pytest.raises(ConfigError, match="trained with different train_rows"):
        run(settings, output, resume=True)


def test_fewer_rows_are_scored_or_none(world: Path, tmp_path: Path) -> None:
    few = run(given(world, eval_rows=4), tmp_path / "few")
    assert {scores.rows for scores in few.scores.values()} == {4}
    assert few.predictions["blob_n0"].ids == tuple(f"q{i}" for i in range(16, 20))
    flags = ["--model", f"{world / 'bert'}", "--data", f"{world / 'data'}", "--task", "colours", "--steps", "3"]
    flags += ["--batch-size", "4", "--max-tokens", "200", "--learning-rate", "0.01", "--rho-init", "0.5"]
    assert invoke(["train", *flags, "--draws", "2", "--no-eval", "--output", str(tmp_path / "none")]) == 0
    found = record(tmp_path / "none")
    assert found["methods"] == {} and found["rows"] == {"train": 16, "eval": 0} and not found["experiment"]["eval"]
    drawn = load_run(tmp_path / "none").predict(load_run(tmp_path / "none").task.rows("dev")[:4], draws=2)
    assert torch.equal(drawn.draw_log_probs, few.predictions["blob_n2"].draw_log_probs)


def test_a_table_scores_all_rows(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"table": "table1", "seeds": [0], "methods": ["mle"], "tasks": None, "command": []}
    grid = Grid(settings={"model": "m", "eval_rows": 3}, results=tmp_path, runs=tmp_path, **shared)
    with pytest.raises(ConfigError, match="'eval_rows', expected none: a table scores all rows"):
        plan(grid)


@pytest.mark.parametrize("method", ["mle", "blob"])
def test_no_draws_are_the_mean_alone(method: str, world: Path, tmp_path: Path) -> None:
    result = run(given(world, method=method, draws=0), tmp_path / "run")
    key = {"mle": "mle", "blob": "blob_n0"}[method]
    assert result.scores.keys() == {key} and result.predictions[key].draws == 0


def test_the_std_of_the_posterior_is_reported(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(given(world, method="bbb", draws=1), tmp_path / "bbb")
    layers = gaussian_layers(load_run(tmp_path / "bbb").model).values()
    expected = torch.cat([std(layer.rho).flatten() for layer in layers]).mean().item()
    assert record(tmp_path / "bbb")["posterior_std"] == result.posterior_std == pytest.approx(expected)
    run(given(world, method="mle"), tmp_path / "mle")
    assert record(tmp_path / "mle")["posterior_std"] is None


def test_logs_go_to_the_tracker_that_is_named(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[dict[str, Any]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            logged.append(kwargs["logs"])

    monkeypatch.setattr(integrations, "is_trackio_available", lambda: False)
    with pytest.raises(ConfigError, match="report_to 'trackio' needs the package trackio: install it"):
        run(given(world, report_to="trackio"), tmp_path / "run")
    monkeypatch.setattr(integrations, "is_trackio_available", lambda: True)
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "trackio", Tracker)
    run(given(world, report_to="trackio"), tmp_path / "run")
    assert {"nll", "kl", "std"} <= set().union(*logged)


def moods(folder: Path, name: str, *labels: str) -> None:
    for split in ("train", "dev"):
        rows = [{"id": str(i), "text": f"{split} {i} {label}", "label": label} for i, label in enumerate(labels)]
        write_rows(folder / name / f"{split}.jsonl", rows)


def test_a_run_keeps_the_names_of_its_classes_and_answers_without_its_data(world: Path, tmp_path: Path) -> None:
    data, output = tmp_path / "data", tmp_path / "run"
    moods(data, "moods", "good", "bad", "good")
    result = run(given(world, task="moods", data=str(data)), output)
    assert result.experiment.labels == ("bad", "good") and record(output)["experiment"]["labels"] == ["bad", "good"]
    shutil.rmtree(data)
    loaded = load_run(output)
    assert loaded.task.labels == ("bad", "good")
    rows = [TextRow(id="a", text="It is good.", label="good"), TextRow(id="b", text="It is bad.")]
    answers = loaded.predict(rows, draws=2).records(rows)
    assert [each["label"] for each in answers] == [("bad", "good")[each["answer"]] for each in answers]
    source = write_rows(tmp_path / "rows.jsonl", [{"id": row.id, "text": row.text} for row in rows])
    assert invoke(["predict", str(output), "--input", str(source), "--output", str(tmp_path / "answers")]) == 0
    assert all(
        json.loads(line)["label"] in ("bad", "good") for line in (tmp_path / "answers").read_text().splitlines()
    )


def test_another_data_set_is_scored_by_the_names_of_the_run(world: Path, tmp_path: Path) -> None:
    moods(tmp_path, "moods", "good", "bad")
    moods(tmp_path, "films", "good", "bad", "good")
    write_rows(tmp_path / "meals" / "dev.jsonl", [{"id": "0", "text": "Mine is tasty.", "label": "tasty"}])
    run(given(world, task="moods", data=str(tmp_path), eval=False), tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert other_task(loaded, "films").labels == ("bad", "good")
    with pytest.raises(DataError, match="field 'label': found 'tasty', expected one of"):
        other_task(loaded, "meals").rows("dev")
    with pytest.raises(ConfigError, match="data set rte: found no class names, expected 'bad', 'good'"):
        other_task(loaded, "rte")
    rows = [{"id": str(i), "text": "It is so.", "label": i} for i in range(2)]
    write_rows(tmp_path / "counted" / "train.jsonl", rows)
    run(given(world, task="counted", data=str(tmp_path), eval=False), tmp_path / "counted-run")
    with pytest.raises(
        ConfigError, match="data set films: found sentence rows with 2 named classes, expected sentence"
    ):
        other_task(load_run(tmp_path / "counted-run"), "films")
