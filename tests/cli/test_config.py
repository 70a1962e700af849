"""Files for --config: plain, small data, or an error."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bayestune.errors import ConfigError
from bayestune.experiment import Experiment
from bayestune_cli.app import invoke
from bayestune_cli.config import read_config, read_run_file
from bayestune_cli.errors import FlagError

REQUIRED = "model: m\ntask: t\n"


@pytest.mark.property("X07")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (REQUIRED + 'rank: !!int ""', "not YAML"),
        (REQUIRED + "seed: 1\nseed: 2", "found 'seed' twice"),
        (REQUIRED + f"target_modules: [{'q, ' * 10**6}]", "found more than 65536 bytes"),
        (REQUIRED + "data: !!python/object/apply:os.system ['true']", "could not determine a constructor"),
        (REQUIRED + "rank: 1\n---\nrank: 2", "single document"),
        ("[model]: m", "unhashable key"),
    ],
    ids=lambda value: value[:30],
)
def test_a_file_that_is_not_plain_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(FlagError, match=words) as caught:
        read_config(path)
    assert str(caught.value).startswith(f"--config {path}: ") and len(str(caught.value)) < 500


@pytest.mark.property("X07")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("rank: 1000000000", "rank: found 1000000000, expected at most 65536"),
        ("prior_std: .nan", "prior_std: found nan, expected a number above 0"),
        ("weight_decay: .inf", "weight_decay: found inf, expected a number"),
        ("learning_rate: 1e999", "learning_rate: found inf, expected a number above 0"),
        ("target_modules: [[q_proj]]", "expected a list of names"),
        ("data: [[[[]]]]", "data: found .*, expected a string"),
    ],
)
def test_absurd_values_are_refused_before_the_model_is_looked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, words: str
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(REQUIRED + line)
    with pytest.raises(ConfigError, match=words):
        Experiment.from_dict(read_config(path), where="run.yaml")
    assert invoke(["train", "--config", str(path), "--output", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.property("X07")
def test_a_whole_number_too_large_for_a_float_is_refused() -> None:
    for name in ("learning_rate", "weight_decay", "lora_alpha"):
        with pytest.raises(ConfigError, match=f"{name}: found 1000"):
            Experiment.from_dict({"model": "m", "task": "t", name: 10**400}, where="result.json")


def test_a_recipe_replaces_what_it_fills_in_the_record_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    default = Experiment(model="m", task="t").resolved("causal").as_dict()
    config = tmp_path / "experiment.json"
    config.write_text(json.dumps(default))
    made: list[Experiment] = []

    def run(experiment: Experiment, *args: Any, **kwargs: Any) -> None:
        made.append(experiment)
        raise ConfigError("stop here")

    monkeypatch.setattr("bayestune.experiment.run", run)
    for flags in ([], ["--recipe", "paper"]):
        assert invoke(["train", "--config", str(config), "--output", str(tmp_path / "run"), *flags]) == 2
    names = ("posterior_std", "kl_schedule", "kl_learning_rate", "estimator", "posterior_scale")
    same, paper = (experiment.resolved("causal").as_dict() for experiment in made)
    assert [same[name] for name in names] == [default[name] for name in names]
    assert [paper[name] for name in names] == [None, "paper", 0.01, "flipout_token", 1.0]


def test_wrong_settings_and_folders_are_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "experiment.json").touch()
    (tmp_path / "file").touch()
    (tmp_path / "rank.yaml").write_text(REQUIRED + "rank: 65537")
    complete = ["--model", "m", "--task", "t", "--output", str(tmp_path / "new")]
    cases = {
        ("--task", "t", "--output", "new"): "train: found no setting 'model', expected one.",
        (*complete, "--method", "blub"): "train: method: found 'blub', expected one of mle, map, ",
        (*complete, "--rank", "0"): "train: rank: found 0, expected a whole number, at least 1.",
        (*complete, "--prior-std", "nan"): "train: prior_std: found nan, expected a number above 0.",
        (*complete, "--precision", "fp8"): "train: precision: found 'fp8', expected one of float32, bf16.",
        (*complete, "--method", "mle", "--members", "3"): "--members: found it with method 'mle'",
        (*complete, "--data", "nowhere"): "--data nowhere: no such folder, expected the one with the data sets",
        (*complete, "--config", "none.yaml"): "--config none.yaml: cannot be read",
        ("--config", str(tmp_path / "rank.yaml"), "--output", "new"): "rank: found 65537, expected at most 65536.",
        (*complete, "--output", str(tmp_path / "file")): "file: found a file, expected a folder or nothing.",
        (*complete, "--output", str(tmp_path / "begun")): "the folder is not empty; choose another, or pass "
        "--overwrite. It holds an unfinished run: --resume continues it.",
        ("--resume", "--output", str(tmp_path / "new")): "experiment.json: cannot be read",
        (*complete, "--model", "./nowhere"): "--model ./nowhere: no such folder or file, expected a model",
    }
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").touch()
    cases = {("train", *given): words for given, words in cases.items()} | {
        ("evaluate", "run", "--data", "nowhere"): "--data nowhere: no such folder",
        ("generate", "run", "--input", "none", "--output", "new"): "none: found no such file, expected a file of rows",
        ("serve", "run", "--output", "new", "--base", "none"): "--base none: found no such file, expected the base",
        ("table", "table1", "--data", "nowhere"): "--data nowhere: no such folder",
    }
    code = "import json, sys; from bayestune_cli.app import invoke\n"
    code += "codes = [invoke(given) for given in json.loads(sys.argv[1])]\n"
    code += "print(json.dumps([codes, [m for m in ('torch', 'transformers', 'bayestune') if m in sys.modules]]))"
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(list(cases))], capture_output=True, text=True, cwd=tmp_path
    )
    assert json.loads(done.stdout) == [[2] * len(cases), []]
    for line, words in zip(done.stderr.splitlines(), cases.values(), strict=True):
        assert line.startswith("error: ") and words in line
    assert not (tmp_path / "new").exists()


def test_the_record_of_a_cell_with_many_rows_is_read(tmp_path: Path) -> None:
    record = {"experiment": {"model": "m"}, "sha256": {"train_rows": "0"}, "row_scores": [[0.5] * 5] * 10_000}
    path = tmp_path / "cell.json"
    path.write_text(json.dumps(record, indent=2))
    assert path.stat().st_size > 1 << 16 and read_run_file(path) == (record["experiment"], record)
    path.write_text('{"experiment": {}, "experiment": {}}')
    with pytest.raises(FlagError, match="not JSON: found 'experiment' twice"):
        read_run_file(path)
