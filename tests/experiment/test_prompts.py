"""Prompts as settings of a run: their defaults, what a run records of them, and what is refused."""

import dataclasses
import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import AutoTokenizer

from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.experiment import Experiment, load_run, run
from bayestune.experiment.backbone import find_backbone
from bayestune.experiment.folder import check_output
from bayestune.experiment.rows import RunRows
from bayestune.experiment.trained import resolve
from bayestune.tasks import Prompt
from bayestune.tasks.causal import CausalChoice
from bayestune.tasks.text_choice import CausalTextChoice
from toys import pretrained_bert, pretrained_llama, write_data


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/, llama/, chat/ (the same Llama with a chat template) and data/."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    pretrained_llama(folder / "llama")
    shutil.copytree(folder / "llama", folder / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder / "chat")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder / "chat")
    write_data(folder / "data")
    return folder


def experiment(world: Path, model: str, **changes: Any) -> Experiment:
    settings = {"task": "colours", "data": str(world / "data"), "steps": 1, "batch_size": 4, "max_tokens": 250}
    return Experiment.from_dict({**settings, "model": str(world / model), "method": "mle", **changes}, where="test")


@pytest.mark.parametrize(
    ("model", "changes", "scoring", "prompt"),
    [
        ("llama", {}, "letters", "paper"),
        ("chat", {}, "letters", "chat"),
        ("chat", {"method": "blob"}, "letters", "chat"),
        ("chat", {"method": "blob", "recipe": "paper"}, "letters", "paper"),
        ("chat", {"scoring": "text", "prompt": "paper"}, "text", "paper"),
        ("chat", {"system": "Be brief."}, "letters", "chat"),
        ("bert", {}, None, None),
    ],
)
def test_the_prompt_by_default(
    model: str, changes: dict[str, Any], scoring: str | None, prompt: str | None, world: Path
) -> None:
    found, task = resolve(experiment(world, model, **changes), find_backbone(str(world / model)))
    assert (found.scoring, found.prompt) == (scoring, prompt)
    assert isinstance(task, CausalChoice) is (model != "bert")
    assert isinstance(task, CausalTextChoice) is (scoring == "text")
    assert resolve(found, find_backbone(str(world / model)))[0] == found  # a record that is read again


@pytest.mark.parametrize(
    "settings",
    [
        {"scoring": "text"},
        {"prompt": "chat"},
        {"system": "Be brief."},
        {"shots": 64},
        {"label_words": ("1", "2")},
        {"label_words": ("1", "2"), "scoring": "text"},
    ],
)
def test_an_encoder_has_no_prompt(settings: dict[str, Any], world: Path) -> None:
    with pytest.raises(ConfigError, match="a head of the model answers colours, without a prompt"):
        resolve(experiment(world, "bert", **settings), find_backbone(str(world / "bert")))


def test_a_run_asks_as_it_was_trained_whatever_became_of_its_rows(world: Path, tmp_path: Path) -> None:
    asked = experiment(world, "llama", scoring="text_per_byte", prompt="{question} ->", shots=2, seed=3)
    result = run(asked, tmp_path / "run", command=[])
    shutil.copytree(world / "data", tmp_path / "data")
    train = tmp_path / "data" / "colours" / "train.jsonl"
    train.write_text("\n".join(reversed(train.read_text().splitlines())) + "\n")
    trained = load_run(tmp_path / "run", data=tmp_path / "data")
    task = trained.task
    assert isinstance(task, CausalChoice)
    lines = [json.loads(line) for line in (tmp_path / "run" / "shots.jsonl").read_text().splitlines()]
    assert [shot.id for shot in task.worked] == [line["id"] for line in lines] and len(lines) == 2
    rows = resolve(asked, find_backbone(asked.model))[1].rows("train")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["rows"]["train"] == len(rows)
    assert len(rows) == len(train.read_text().splitlines()) - 2
    first, second = task.worked
    shown = [f"{shot.question} -> {shot.choices[shot.answer]}\n\n" for shot in (first, second)]
    assert task.prompt_text(rows[0]) == "".join(shown) + f"{rows[0].question} ->"
    again = trained.predict(result.predictions["mle"].ids and rows[:3], draws=0)
    assert again.ids == tuple(row.id for row in rows[:3])
    assert task.prompt == Prompt(scoring="text_per_byte", style="{question} ->", shots=task.worked)


def test_shots_that_were_changed_since_the_training_are_refused(world: Path, tmp_path: Path) -> None:
    run(experiment(world, "llama", scoring="text", prompt="{question} ->", shots=2), tmp_path / "run", command=[])
    file = tmp_path / "run" / "shots.jsonl"
    recorded = json.loads((tmp_path / "run" / "result.json").read_text())["sha256"]["shots_rows"]
    assert hashlib.sha256(file.read_bytes()).hexdigest() == recorded
    first, second = file.read_text().splitlines(keepends=True)
    file.write_text(second + first)
    changed = f"shots.jsonl: found rows with sha256 .*, expected {recorded}, as result.json has it; restore the file"
    with pytest.raises(ConfigError, match=changed):
        load_run(tmp_path / "run")
    started = experiment(world, "llama", method="tfb", adapter=str(tmp_path / "run"))
    with pytest.raises(ConfigError, match=changed):
        resolve(started, find_backbone(started.model))


def test_shots_are_in_no_split_of_a_run(world: Path) -> None:
    """Whether they are drawn from it, or it repeats them; a row that asks the same under another id is counted."""
    splits = {"temperature_split": "train", "eval_split": "dev+train"}
    asked = experiment(world, "llama", scoring="text", shots=2, **splits)
    task = resolve(asked.replace(eval_split="dev"), find_backbone(asked.model))[1]
    rows = RunRows.of(asked, task)
    assert len(task.worked) == 2 and rows.worked == task.worked
    for used in (rows.train, rows.temperature, rows.evaluation):
        assert len(used) > 2 and not set(used) & set(task.worked)
    again = dataclasses.replace(rows, evaluation=[dataclasses.replace(task.worked[0], id="other")], temperature=[])
    with pytest.warns(BayestuneWarning, match="1 of the 1 rows of split dev.* are also in split train"):
        assert again.repeated(asked.replace(eval_split="dev"))["train"]["rows"] == 1


def test_more_shots_than_rows(world: Path) -> None:
    with pytest.raises(ConfigError, match="shots: found 64, expected fewer than the"):
        resolve(experiment(world, "llama", shots=64), find_backbone(str(world / "llama")))


def forget_prompts(path: Path) -> None:
    """Take the settings of prompts out of a record, as they were not there before."""
    fields = json.loads(path.read_text())
    for name in ("scoring", "prompt", "system", "shots", "label_words"):
        (fields.get("experiment") or fields).pop(name)
    path.write_text(json.dumps(fields))


def test_a_record_from_before_there_were_prompts_means_the_papers(world: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(experiment(world, "chat", prompt="paper"), output, command=[])
    for name in ("experiment.json", "result.json"):
        forget_prompts(output / name)
    assert load_run(output).experiment.prompt == "paper"
    record = json.loads((output / "result.json").read_text())
    again = run(experiment(world, "chat"), tmp_path / "again", command=[], record=record)
    assert again.experiment.prompt == "paper"
    started = experiment(world, "chat", method="tfb", adapter=str(output))
    assert resolve(started, find_backbone(started.model))[0].prompt == "paper"
    check_output(output.rename(tmp_path / "begun"), again.experiment, overwrite=True, resume=False)
    (tmp_path / "begun" / "result.json").unlink()
    check_output(tmp_path / "begun", again.experiment, overwrite=False, resume=True)
    with pytest.raises(ConfigError, match="cannot resume with scoring='text'"):
        other = again.experiment.replace(scoring="text")
        check_output(tmp_path / "begun", other, overwrite=False, resume=True)


@pytest.mark.filterwarnings("ignore:tfb")  # so small a model knows little
@pytest.mark.parametrize(("method", "setting"), [("tfb", "adapter"), ("distilled", "teacher")])
def test_a_run_that_is_only_scored_does_not_need_what_it_started_from(
    method: str, setting: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(experiment(world, "llama", scoring="text", shots=1, seed=5), tmp_path / "mle", command=[])
    asked = experiment(world, "llama", method=method, **{setting: str(tmp_path / "mle")})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(
            importlib.import_module("bayestune.experiment.run"), "_scored", Mock(side_effect=KeyboardInterrupt)
        )
        run(asked, tmp_path / "run", command=[])
    (tmp_path / "mle" / "result.json").unlink()
    shots = (tmp_path / "mle" / "shots.jsonl").read_text()
    (tmp_path / "mle" / "shots.jsonl").write_text("")
    again = run(asked, tmp_path / "run", command=[], resume=True)
    assert (again.experiment.scoring, again.experiment.shots) == ("text", 1)
    assert (tmp_path / "run" / "shots.jsonl").read_text() == shots


@pytest.mark.parametrize(("method", "setting"), [("tfb", "adapter"), ("distilled", "teacher")])
def test_a_run_asks_as_the_run_that_it_starts_from(method: str, setting: str, world: Path, tmp_path: Path) -> None:
    run(experiment(world, "llama", scoring="text", shots=1, seed=5), tmp_path / "mle", command=[])
    start = {"method": method, setting: str(tmp_path / "mle")}
    found, task = resolve(experiment(world, "llama", **start), find_backbone(str(world / "llama")))
    assert (found.scoring, found.shots) == ("text", 1) and isinstance(task, CausalTextChoice)
    assert task.worked == load_run(tmp_path / "mle").task.worked
    with pytest.raises(ConfigError, match="scoring: found 'letters', expected 'text', as the run in"):
        resolve(experiment(world, "llama", scoring="letters", **start), find_backbone(str(world / "llama")))
