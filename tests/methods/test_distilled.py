"""Distillation: its loss in closed form, a student that comes nearer to its teacher, and the command."""

import hashlib
import json
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from bayestune.errors import ConfigError, DataError
from bayestune.experiment import Experiment, Run, load_run, run
from bayestune.inference import predict
from bayestune.methods import Distilled, Point, save_posterior, temperature_of
from bayestune.methods.distilled import Distillation
from bayestune.tasks import Row, read_rows
from bayestune.training.batches import Examples
from bayestune_cli.app import invoke
from inference.cases import Fixed
from toys import pretrained_bert, questions, write_data, write_rows

DRAWS = 40


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/, data/ and teacher/, a run whose draws and mean answer differently."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    write_data(folder / "data")
    settings = {"model": str(folder / "bert"), "task": "colours", "data": str(folder / "data"), "max_tokens": 250}
    wide = {"method": "blob", "prior_std": 2.0, "posterior_std": 0.5, "kl_schedule": "uniform", "posterior_scale": 3}
    sizes = {"steps": 100, "batch_size": 8, "rank": 4, "learning_rate": 0.03}
    asked = Experiment.from_dict({**settings, **wide, **sizes}, where="test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # so short a run cannot reach this std
        run(asked, folder / "teacher", command=[])
    return folder


def distance(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Mean KL(teacher || student), in nats."""
    present = teacher > 0
    terms = torch.where(present, teacher * (teacher.clamp(min=1e-300) / student.clamp(min=1e-300)).log(), 0.0)
    return terms.sum(-1).mean().item()


def test_the_loss_is_the_divergence_from_the_teacher() -> None:
    asked = [Row(id=str(i), question="?", choices=("a", "b", "c"), answer=0) for i in range(3)]
    logits = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, -math.inf], [math.log(3), 0.0, -math.inf]])
    teacher = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.75, 0.25, 0.0]])
    task = Distillation(Fixed(logits), asked, teacher)
    batch = task.collate([{**task.example(row)} for row in asked])
    outputs = logits.double().requires_grad_()
    loss = task.row_loss(outputs, batch)
    expected = [math.log(1 + 2 * math.exp(-2)), 0.0, 0.0]  # -log q of the one answer; the same distribution, twice
    assert loss.tolist() == pytest.approx(expected, abs=1e-7)  # the teacher is float32
    loss.sum().backward()
    gradient = outputs.grad
    assert gradient is not None
    assert torch.allclose(gradient, logits.double().softmax(-1) - teacher, atol=1e-7)


def tempered(world: Path, folder: Path) -> tuple[Run, dict[str, Any]]:
    """The teacher with the temperature 2.5, and the settings of a student that hardly leaves its start."""
    shutil.copytree(world / "teacher", folder)
    taught = load_run(folder)
    taught.posterior.temperature = 2.5
    save_posterior(taught.posterior, folder / "posterior", overwrite=True)
    return taught, {"method": Distilled(**{"teacher": str(folder)}), "steps": 1, "learning_rate": 1e-12}


def test_the_student_of_a_tempered_teacher_starts_at_its_tempered_mean(world: Path, tmp_path: Path) -> None:
    taught, own = tempered(world, tmp_path / "teacher")
    run(taught.experiment.replace(**own, eval=False), tmp_path / "student", command=[])
    student, asked = load_run(tmp_path / "student"), taught.task.rows("train")
    assert student.posterior.temperature == 2.5
    assert torch.allclose(student.predict(asked, draws=0).probs, taught.predict(asked, draws=0).probs, atol=1e-6)


def test_the_loss_is_that_of_the_tempered_answers() -> None:
    asked, logits = [Row(id="0", question="?", choices=("a", "b"), answer=0)], torch.tensor([[math.log(9), 0.0]])
    task = Distillation(Fixed(logits), asked, torch.tensor([[0.75, 0.25]]), temperature=2.0)
    loss = task.row_loss(logits, task.collate([task.example(asked[0])]))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)  # softmax(log 9 / 2) is 3 to 1


@pytest.fixture(scope="module")
def student(world: Path) -> Run:
    command = ["distil", str(world / "teacher"), "--output", str(world / "student"), "--draws", str(DRAWS)]
    assert invoke([*command, "--steps", "100"]) == 0
    return load_run(world / "student")


def test_the_student_is_one_plain_adapter_nearer_to_the_average_than_the_mean(world: Path, student: Run) -> None:
    taught = load_run(world / "teacher")
    asked = taught.task.rows("train")
    teacher = taught.predict(asked, draws=200, seed=1).probs
    mean = taught.predict(asked, draws=0).probs
    assert isinstance(student.posterior, Point) and student.default_draws == 0
    assert distance(teacher, student.predict(asked, draws=0).probs) < 0.5 * distance(teacher, mean)
    record = json.loads((world / "student" / "result.json").read_text())
    assert (record["method"], record["fitted"]["teacher_draws"], record["steps"]) == ("distilled", DRAWS, 100)


def test_rows_without_labels_are_learned_too(world: Path, student: Run) -> None:
    further = [{**row, "answer": None} for row in questions(40, 6)]
    path = write_rows(world / "further.jsonl", further)
    command = ["distil", str(world / "teacher"), "--output", str(world / "wider"), "--steps", "100"]
    assert invoke([*command, "--rows", str(path), "--draws", str(DRAWS)]) == 0
    asked = read_rows(path, labelled=False)
    teacher = load_run(world / "teacher").predict(asked, draws=200, seed=1).probs
    near, far = (
        distance(teacher, found.predict(asked, draws=0).probs) for found in (load_run(world / "wider"), student)
    )
    assert near < far


def test_the_record_names_the_teacher_and_the_further_rows(world: Path, student: Run, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{**questions(40, 1)[0], "answer": None}])
    asked = student.experiment.replace(
        method=Distilled(**{"teacher": str(world / "teacher"), "distil_rows": str(rows)}), steps=1, eval=False
    )
    run(asked, tmp_path / "out", command=[])
    hashes = json.loads((tmp_path / "out" / "result.json").read_text())["sha256"]
    manifest = (world / "teacher" / "posterior" / "bayestune_manifest.json").read_bytes()
    assert hashes["source_run"] == hashlib.sha256(manifest).hexdigest() and "distil_rows" in hashes
    write_rows(rows, [{**questions(40, 1)[0], "question": "long " * 300, "answer": None}])
    with pytest.raises(DataError, match="rows.jsonl:1"):
        run(asked, tmp_path / "none", command=[])
    assert not (tmp_path / "none").exists()


def test_an_unfinished_teacher_is_refused(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "teacher", tmp_path / "teacher")
    (tmp_path / "teacher" / "result.json").unlink()
    asked = load_run(world / "teacher").experiment
    with pytest.raises(ConfigError, match="teacher: found no result.json, expected a finished run"):
        run(asked.replace(method=Distilled(**{"teacher": str(tmp_path / "teacher")})), tmp_path / "out", command=[])


def test_a_temperature_that_is_asked_for_is_fitted_in_place_of_the_teachers(world: Path, tmp_path: Path) -> None:
    taught, own = tempered(world, tmp_path / "teacher")
    asked = taught.experiment.replace(**own, temperature_split="train")
    made = run(asked, tmp_path / "student", command=[])
    student = load_run(tmp_path / "student")
    found = student.predict(taught.task.rows("train"), draws=0)
    assert made.temperature not in (1.0, 2.5)
    assert temperature_of(found) == pytest.approx(1.0, abs=1e-3)  # the best divisor is in the answers already


def test_a_resumed_run_is_the_same_although_the_last_bits_of_the_answers_differ() -> None:
    asked = [Row(id="0", question="?", choices=("a", "b"), answer=0)]
    model, probs = torch.nn.Linear(1, 1), torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    tasks = [Distillation(Fixed(torch.zeros(1, 2)), asked, each) for each in (probs, probs - 1e-16)]
    first, second = (Examples(task, asked, model).sha256 for task in tasks)
    assert first == second


@pytest.mark.parametrize("method", ["mle", "ensemble"])
def test_a_teacher_without_draws_of_weights_answers_as_it_does(method: str, world: Path, tmp_path: Path) -> None:
    record = json.loads((world / "teacher" / "experiment.json").read_text())
    kept = {name: record[name] for name in ("model", "task", "data", "max_tokens", "batch_size", "rank")}
    run(Experiment.from_dict({**kept, "method": method, "steps": 2}, where="test"), tmp_path / "taught", command=[])
    own: dict[str, Any] = {"method": Distilled(**{"teacher": str(tmp_path / "taught")}), "steps": 1, "eval": False}
    made = run(
        Experiment.from_dict({**kept, "method": "mle"}, where="test").replace(**own), tmp_path / "out", command=[]
    )
    assert made.fitted["teacher_draws"] == {"mle": 0, "ensemble": 3}[method]


def test_a_student_without_a_teacher_or_of_other_sizes_is_refused(world: Path, tmp_path: Path) -> None:
    record = json.loads((world / "teacher" / "experiment.json").read_text())
    kept = {name: record[name] for name in ("model", "task", "data", "max_tokens", "batch_size")}
    asked = Experiment.from_dict({**kept, "method": "distilled", "steps": 1}, where="test")
    with pytest.raises(ConfigError, match="teacher: found none, expected the folder of a run"):
        run(asked, tmp_path / "out", command=[])
    with pytest.raises(ConfigError, match=r"found an adapter with different layers or another rank \(.*lora_A"):
        run(asked.replace(method=Distilled(**{"teacher": str(world / "teacher")})), tmp_path / "out", command=[])


def test_the_command_checks_its_paths_first(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher = str(world / "teacher")
    for arguments, expected in [
        (["distil", str(world / "none"), "--output", "x"], "found no result.json"),
        (["distil", teacher, "--output", str(world / "data")], "it exists; choose another"),
        (["distil", teacher, "--output", teacher, "--overwrite"], "found the run itself, expected another folder"),
        (["distil", teacher, "--output", "x", "--rows", "none.jsonl"], "--rows none.jsonl: found no file"),
    ]:
        assert invoke(arguments) == 2
        assert expected in capsys.readouterr().err


def test_a_student_of_ivon_trains_at_the_rate_of_its_own_optimizer(world: Path, tmp_path: Path) -> None:
    record = json.loads((world / "teacher" / "experiment.json").read_text())
    kept = {name: record[name] for name in ("model", "task", "data", "max_tokens", "batch_size", "rank")}
    asked = Experiment.from_dict({**kept, "method": "ivon", "steps": 2, "eval": False}, where="test")
    run(asked, tmp_path / "ivon", command=[])
    assert invoke(["distil", str(tmp_path / "ivon"), "--output", str(tmp_path / "out"), "--draws", "2"]) == 0
    rates = [
        json.loads((tmp_path / name / "experiment.json").read_text())["learning_rate"] for name in ("ivon", "out")
    ]
    assert rates == [0.1, 5e-4]


def test_labels_are_not_looked_at(world: Path) -> None:
    taught = load_run(world / "teacher")
    asked = [row for row in taught.task.rows("train") if isinstance(row, Row)]
    probs = predict(taught.posterior, taught.task, asked, draws=2).probs
    task = Distillation(taught.task, asked, probs)
    batch = task.collate(task.examples(asked, taught.model))
    outputs = task.outputs(taught.model, batch)
    wrong = {**batch, "labels": (batch["labels"] + 1) % 2}
    assert torch.equal(task.row_loss(outputs, batch), task.row_loss(outputs, wrong))
