"""What holds for every command: exit codes, errors of one line and as JSON, odd environments, runs made again."""

import errno
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import bayestune
from bayestune.errors import ConfigError, DataError, DiskError, TrainingError
from bayestune.training.checkpoint import SafeTrainer
from bayestune_cli.app import invoke
from bayestune_cli.signals import Stopped
from cli.commands import adapter, make_world, predicting, training


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and whole/, a run."""
    return make_world(tmp_path_factory.mktemp("world"))


def record(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text(encoding="utf-8"))


# Exit codes, and what is said.

FAILURES: list[tuple[BaseException, int, str]] = [
    (ZeroDivisionError("of\nour making"), 1, "internal error: ZeroDivisionError: of our making"),
    (ConfigError("a setting"), 2, "error: a setting"),
    (DataError("a row"), 2, "error: a row"),
    (DiskError("a file"), 2, "error: a file"),
    (OSError(errno.EACCES, "Permission denied"), 2, "error: [Errno 13] Permission denied"),
    (ModuleNotFoundError("jinja2"), 2, "error: jinja2"),
    (TrainingError("step 3"), 3, "training stopped: step 3"),
    (Stopped(signal.SIGINT), 130, "interrupted"),
    (Stopped(signal.SIGTERM), 143, "terminated"),
]


@pytest.mark.property("R09")
@pytest.mark.parametrize(
    ("failure", "code", "line"), FAILURES, ids=[type(f).__name__ + str(c) for f, c, _ in FAILURES]
)
def test_each_failure_has_its_exit_code_one_line_and_valid_json(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
    line: str,
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise failure

    monkeypatch.setattr("bayestune.experiment.load_run", fail)
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("run", "result.json").touch()
    assert invoke(["evaluate", "run"]) == code
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(line) and err.count("\n") == 1 and "Traceback" not in err
    assert invoke(["evaluate", "run", "--json"]) == code
    out, again = capsys.readouterr()
    assert again == err
    expected = {"type": type(failure).__name__, "message": err.rstrip("\n").removeprefix("error: "), "exit_code": code}
    assert json.loads(out) == {"error": expected}
    assert invoke(["--debug", "evaluate", "run"]) == code
    shown = capsys.readouterr().err
    assert shown.endswith(err) and ("Traceback" in shown) == isinstance(failure, Exception)


@pytest.mark.property("R09")
def test_a_wrong_use_has_valid_json_too_and_done_is_0(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["evaluate", "run", "--json", "--drawz", "3"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)["error"]
    assert found["exit_code"] == 2 and "--draws" in found["message"] and err == f"error: {found['message']}\n"
    assert invoke(["evaluate", str(world / "whole"), "--json"]) == 0
    assert "error" not in json.loads(capsys.readouterr().out)


@pytest.mark.property("R09")
def test_a_program_started_without_a_stdout_or_a_stderr_still_ends_in_its_own_way() -> None:
    for arguments, code in (["--help"], 0), (["evaluate", "/nowhere", "--json"], 2):
        command = ["sh", "-c", 'exec "$0" -m bayestune_cli "$@" >&-', sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code
        assert "Traceback" not in done.stderr and ("/nowhere" in done.stderr) == (code == 2)
        closed = ["sh", "-c", 'exec "$0" -m bayestune_cli "$@" 2>&-', sys.executable, *arguments]
        assert subprocess.run(closed, capture_output=True).returncode == code


# Odd environments.

PROGRAM = """
import json, os, sys
from bayestune_cli.app import invoke
assert False
os.umask(0o077)
sys.exit(max(invoke(arguments) for arguments in json.loads(sys.argv[1])))
"""


@pytest.mark.property("R08")
def test_a_run_in_an_odd_environment_is_the_same_run(world: Path, tmp_path: Path) -> None:
    """No HOME, no terminal, C locale, asserts off, umask 077, spaces and other scripts in paths, a model of the Hub's
    cache, a full stderr: trained and asked in one process."""
    odd = tmp_path / "ein Weg mit Lücken" / "日本 🧪"
    snapshot = odd / "hub" / "models--some--llama" / "snapshots" / ("a" * 40)
    shutil.copytree(world / "llama", snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("a" * 40)
    shutil.copytree(world / "data", odd / "data")
    output, answers = odd / "läuft" / "run", odd / "antworten.jsonl"
    command = training(world, output)
    command[command.index("--model") + 1], command[command.index("--data") + 1] = "some/llama", str(odd / "data")
    asked = predicting(world, answers)
    asked[1] = str(output)
    kept = {name: os.environ[name] for name in ("PATH", "SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ}
    environment = {
        **kept,
        "PYTHONPATH": str(Path(bayestune.__file__).parent.parent),
        "PYTHONOPTIMIZE": "1",
        "LC_ALL": "C",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_CACHE": str(odd / "hub"),
        "OMP_NUM_THREADS": "1",
    }
    before = {path for path in odd.rglob("*")}
    with open("/dev/full" if Path("/dev/full").exists() else os.devnull, "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps([command, asked])],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=full,
            cwd=tmp_path,
        )
    assert done.returncode == 0, done.stdout.decode()
    assert str(answers) in done.stdout.decode("utf-8")
    made = [path for path in odd.rglob("*") if path not in before]
    assert made and not [path for path in made if path.stat().st_mode & 0o077]
    assert adapter(output) == adapter(world / "whole")
    found = record(output)
    weights = snapshot / "model.safetensors"
    assert found["sha256"]["base"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert len(answers.read_text(encoding="utf-8").splitlines()) == 4


@pytest.mark.property("R08")
def test_an_output_that_cannot_be_written_is_said_before_weights_are_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    closed, real = tmp_path / "closed", os.access
    closed.mkdir(mode=0o555)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    # The superuser may write there all the same; a file system mounted read-only refuses it too.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed and real(path, mode))
    for command in (training(world, closed / "a" / "run"), predicting(world, closed / "answers.jsonl")):
        assert invoke(command) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and f"{closed} cannot be written to" in err and err.count("\n") == 1
    assert not list(closed.iterdir())


@pytest.mark.property("R08")
def test_an_output_that_is_not_utf_8_is_said_before_weights_are_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors writes there, and cannot read back what it wrote: all that was trained would be lost."""

    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    assert invoke(training(world, tmp_path / os.fsdecode(b"out\xff") / "run")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: output ") and r"out\udcff/run': found a path that is not UTF-8" in err
    assert err.count("\n") == 1 and not os.listdir(tmp_path)


@pytest.mark.property("R08")
def test_a_clock_that_jumps_changes_nothing(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Back by a day at every look, and checkpoints that are older the newer they are."""
    now = time.time()
    real = SafeTrainer._save_checkpoint

    def clock() -> float:
        nonlocal now
        now -= 86_400
        return now

    def saved(self: SafeTrainer, *args: Any, **kwargs: Any) -> None:
        real(self, *args, **kwargs)
        for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"):
            os.utime(path, (clock(), 1e9 - 1e6 * int(path.name.rpartition("-")[2])))

    monkeypatch.setattr(time, "time", clock)
    monkeypatch.setattr(SafeTrainer, "_save_checkpoint", saved)
    assert invoke(training(world, tmp_path / "run", "--checkpoint-steps", "2")) == 0
    assert adapter(tmp_path / "run") == adapter(world / "whole")
    assert 0 <= record(tmp_path / "run")["seconds"] < 3600
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-6").is_dir()


@pytest.mark.property("P11")
def test_a_run_that_was_made_while_weights_were_loaded_is_not_replaced(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process began later, with a smaller model."""
    output = tmp_path / "run"

    def slow(*args: Any) -> dict[str, Any]:
        shutil.copytree(world / "whole", output)
        return {}

    monkeypatch.setattr(importlib.import_module("bayestune.experiment.run"), "provenance", slow)
    assert invoke(training(world, output)) == 2
    assert f"error: output {output}: the folder is not empty" in capsys.readouterr().err
    assert adapter(output) == adapter(world / "whole") and record(output) == record(world / "whole")
    assert os.listdir(tmp_path) == ["run"]


# Runs made again.

SETTINGS = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""What a rerun depends on in the folder of the model, beside the weights."""


@pytest.mark.property("R10")
def test_a_run_made_again_from_its_record_has_the_same_numbers(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = record(world / "whole")
    for name, file in (("a", "result.json"), ("b", "experiment.json")):
        run = ["train", "--config", str(world / "whole" / file), "--output", str(tmp_path / name)]
        assert invoke(run) == 0
        again = record(tmp_path / name)
        for part in ("methods", "sha256", "kl", "temperature", "experiment", "rows", "versions", "hardware"):
            assert again[part] == first[part]
        assert adapter(tmp_path / name) == adapter(world / "whole")
    assert "the record was made with different" not in capsys.readouterr().err


@pytest.mark.property("R10")
def test_a_record_holds_all_that_made_it(world: Path) -> None:
    found = record(world / "whole")
    assert found["seed"] == found["experiment"]["seed"] == 0 and found["processes"] == 1
    assert {"bayestune", "torch", "transformers", "peft", "python"} <= found["versions"].keys()
    assert {"machine", "cores", "threads", "device"} <= found["hardware"].keys()
    files = {"model.safetensors": hashlib.sha256((world / "llama" / "model.safetensors").read_bytes()).hexdigest()}
    assert found["sha256"]["base"] == files
    assert found["sha256"]["adapter"] == hashlib.sha256(adapter(world / "whole")).hexdigest()
    assert {"train_rows", "eval_rows"} <= found["sha256"].keys() and found["command"][0] == "bayestune"


@pytest.mark.property("R10")
def test_what_is_not_as_in_the_record_is_named_before_training(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*args: Any, **kwargs: Any) -> None:
        raise ConfigError("stop here")

    shutil.copytree(world / "data", tmp_path / "data")
    file = tmp_path / "data" / "colours" / "train.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    content = record(world / "whole")
    content["sha256"]["base"] = {"model.safetensors": "0"}
    content["versions"]["torch"] = "2.0"
    (tmp_path / "result.json").write_text(json.dumps(content))
    monkeypatch.setattr("bayestune.training.BayesTrainer.train", train)
    command = ["train", "--config", str(tmp_path / "result.json"), "--data", str(tmp_path / "data")]
    assert invoke([*command, "--output", str(tmp_path / "run")]) == 2
    warning = "the record was made with different sha256.base, sha256.train_rows, versions.torch: "
    assert f"warning: {warning}" in capsys.readouterr().err


@pytest.mark.property("R10")
def test_rows_of_other_uses_and_settings_of_the_base_are_in_the_record_too(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record is made, and then everything in it changes but the weights; records of before say nothing of these."""

    def train(*args: Any, **kwargs: Any) -> None:
        raise ConfigError("stop here")

    for name in ("llama", "data"):
        shutil.copytree(world / name, tmp_path / name)
    colours = tmp_path / "data" / "colours"
    lines = (colours / "train.jsonl").read_text().splitlines(keepends=True)
    files = {name: colours / f"{name}.jsonl" for name in ("heat", "fit")}
    for number, file in enumerate(files.values()):
        file.write_text("".join(lines[4 * number : 4 * number + 4]))
    splits = ("--method", "laplace", "--fit-split", "fit", "--temperature-split", "heat")
    command = training(tmp_path, tmp_path / "run", *splits)
    del command[command.index("--rho-init") : command.index("--rho-init") + 2]
    assert invoke(command) == 0
    found = record(tmp_path / "run")
    settings = {name: hashlib.sha256((tmp_path / "llama" / name).read_bytes()).hexdigest() for name in SETTINGS}
    assert found["sha256"]["base_settings"] == settings
    for file in files.values():
        file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    config = tmp_path / "llama" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "rms_norm_eps": 0.5}))
    monkeypatch.setattr("bayestune.training.BayesTrainer.train", train)
    capsys.readouterr()
    others = ("base_settings", "fit_rows", "temperature_rows")
    assert invoke(["train", "--config", str(tmp_path / "run" / "result.json"), "--output", str(tmp_path / "a")]) == 2
    named = ", ".join(f"sha256.{name}" for name in others)
    assert f"warning: the record was made with different {named}: " in capsys.readouterr().err
    before = {**found, "sha256": {name: value for name, value in found["sha256"].items() if name not in others}}
    (tmp_path / "before.json").write_text(json.dumps(before))
    assert invoke(["train", "--config", str(tmp_path / "before.json"), "--output", str(tmp_path / "b")]) == 2
    err = capsys.readouterr().err
    assert "stop here" in err and "the record was made with different" not in err
