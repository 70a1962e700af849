"""The scale of the posterior that a run chooses: its rows, its record, and how it is switched off."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.experiment import Experiment, Result, load_run, run
from bayestune.experiment.backbone import find_backbone
from bayestune.experiment.rows import RunRows
from bayestune.experiment.trained import resolve
from bayestune.functional import std
from bayestune.methods import Blob, fit_scale
from bayestune_cli.app import invoke
from bayestune_cli.train import _scale
from toys import pretrained_bert, questions, write_data, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/ and data/, with 120 training rows."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    write_data(folder / "data")
    write_rows(folder / "data" / "colours" / "train.jsonl", asked(100, 120))
    return folder


def asked(start: int, count: int) -> list[dict[str, Any]]:
    """Rows whose questions all differ."""
    return [{**row, "question": f"{row['question']} ({row['id']})"} for row in questions(start, count)]


def given(world: Path, **changes: Any) -> Experiment:
    settings = {"model": str(world / "bert"), "task": "colours", "data": str(world / "data"), "steps": 3}
    settings |= {"batch_size": 4, "draws": 2, "max_tokens": 200, "learning_rate": 0.01, **changes}
    return Experiment.from_dict(settings, where="test")


def widths(output: Path) -> torch.Tensor:
    return torch.cat([std(layer.rho.detach()).flatten() for layer in gaussian_layers(load_run(output).model).values()])


@pytest.fixture(scope="module")
def made(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(given(world), tmp_path_factory.mktemp("made") / "run")


def test_the_rows_that_choose_are_cut_from_train_by_the_seed(world: Path, made: Result) -> None:
    task = load_run(made.output).task
    found = {seed: RunRows.of(made.experiment.replace(seed=seed), task) for seed in (0, 1)}
    parts = {seed: {row.id for row in rows.more["fit_split"]} for seed, rows in found.items()}
    assert parts[0] != parts[1] and len(parts[0]) == len(parts[1]) == 24
    kept = [row.id for row in found[0].train]
    assert kept == [row.id for row in task.rows("train") if row.id not in parts[0]]
    written = json.loads((made.output / "result.json").read_text())
    assert written["rows"]["train"] == 96 and written["fitted"]["rows"] == 24


def test_the_run_has_the_scale_that_fit_scale_finds_for_the_trained_posterior(world: Path, made: Result) -> None:
    """And its record says so. The trained posterior is that of a run on the same rows without a scale."""
    held_out = [row.id for row in RunRows.of(made.experiment, load_run(made.output).task).more["fit_split"]]
    rows = [row for row in asked(100, 120) if row["id"] not in held_out]
    data = made.output.parent / "data"
    shutil.copytree(world / "data", data)
    write_rows(data / "colours" / "train.jsonl", rows)
    plain = made.output.parent / "plain"
    run(made.experiment.replace(data=str(data), method=Blob(posterior_scale=1.0)), plain)
    trained = load_run(plain)
    before = widths(plain)
    search = fit_scale(
        trained.posterior, trained.task, [r for r in load_run(made.output).task.rows("train") if r.id in held_out]
    )
    assert made.fitted["posterior_scale"] == search.scale
    assert made.fitted["nll_by_scale"] == pytest.approx({f"{k:.4g}": v for k, v in search.nll.items()}, rel=1e-6)
    assert made.fitted["trained_std"] == pytest.approx(before.double().mean().item(), rel=1e-6)
    assert torch.allclose(widths(made.output), before * search.scale, rtol=1e-5, atol=1e-10)


def test_it_is_switched_off_or_given(world: Path, tmp_path: Path) -> None:
    for name, settings in {
        "one": {"posterior_scale": 1.0},
        "two": {"posterior_scale": 2.0},
        "paper": {"recipe": "paper"},
    }.items():
        result = run(given(world, **settings), tmp_path / name)
        written = json.loads((tmp_path / name / "result.json").read_text())
        assert written["rows"]["train"] == 120 and "nll_by_scale" not in result.fitted
    assert torch.allclose(widths(tmp_path / "two"), 2 * widths(tmp_path / "one"), rtol=1e-5)


def test_a_split_of_its_own_leaves_train_whole(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_rows(world / "data" / "colours" / "fit.jsonl", asked(300, 30))
    flags = ["--model", f"{world / 'bert'}", "--data", f"{world / 'data'}", "--task", "colours", "--steps", "3"]
    flags += ["--batch-size", "4", "--max-tokens", "200", "--fit-split", "fit", "--output", str(tmp_path / "run")]
    assert invoke(["train", *flags]) == 0
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (written["rows"]["train"], written["fitted"]["rows"]) == (120, 30)
    nll, scale = written["fitted"]["nll_by_scale"], written["fitted"]["posterior_scale"]
    said = capsys.readouterr().out
    assert "of training, chosen on 30 rows that were not trained on" in said
    assert ("draws hardly change the answers" in said) == (abs(nll["0"] - nll[f"{scale:.4g}"]) < 1e-3)


@pytest.mark.parametrize(("mean", "says"), [(0.7002, True), (0.75, False)])
def test_draws_that_hardly_change_the_answers_are_named(mean: float, says: bool) -> None:
    fitted = {"posterior_scale": 2.0, "trained_std": 0.06, "rows": 30, "nll_by_scale": {"0": mean, "2": 0.7}}
    assert ("draws hardly change the answers, as in plain LoRA" in _scale(fitted)) == says


def test_rows_that_choose_are_none_of_those_trained_on_or_scored(world: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fit_split: found 'train', which the run is trained on"):
        run(given(world, fit_split="train"), tmp_path / "run")
    experiment, task = resolve(given(world, eval_split="test"), find_backbone(str(world / "bert")))
    rows = RunRows.of(experiment.replace(eval_split="dev"), task)
    repeating = dataclasses.replace(rows, evaluation=rows.more["fit_split"])
    with pytest.warns(BayestuneWarning, match="24 of the 24 rows of split test"):
        assert repeating.repeated(experiment)["train"]["rows"] == 24


def test_few_rows_are_all_trained_on() -> None:
    assert [Blob().held_out(rows) for rows in (99, 100, 500, 5000)] == [0, 20, 100, 200]
    with pytest.raises(ConfigError, match="posterior_scale and fit_split: found both"):
        Blob(posterior_scale=2.0, fit_split="dev")
