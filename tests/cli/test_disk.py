"""Files that cannot be written, and devices that are lost: what is said, and what is left."""

import errno
import importlib
import os
import re
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from bayestune.training import BayesTrainer
from bayestune_cli.app import invoke
from cli.commands import adapter, make_world, predicting, processes, run_short_of_space, training

SECONDS = 120


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and whole/, a run that nothing came in the way of."""
    return make_world(tmp_path_factory.mktemp("world"))


def unfinished(world: Path, output: Path, step: int) -> list[str]:
    """Make `output` the whole run as it was after the checkpoint of `step`; the command that goes on with it."""
    shutil.copytree(world / "whole", output)
    shutil.rmtree(output / "posterior")
    (output / "result.json").unlink()
    for checkpoint in (output / "checkpoints").iterdir():
        if checkpoint.name != f"checkpoint-{step}":
            shutil.rmtree(checkpoint)
    return training(world, output, "--checkpoint-steps", "2", "--resume")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def beside_checkpoints(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if not name.startswith("checkpoints")}


def only_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line on stderr, which is an error without a traceback."""
    error = capsys.readouterr().err
    assert "Traceback" not in error
    line = error.rstrip("\n").rpartition("\n")[2]
    assert line.startswith("error: ")
    return line


def fails_within(
    patch: pytest.MonkeyPatch, module: str, name: str, call: str, number: int, file: str | None = None
) -> None:
    """While a function runs (for this `file`), `os.<call>` fails with the system's error `number`."""
    owner = importlib.import_module(module)
    real = getattr(owner, name)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(number, os.strerror(number))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if file not in (None, Path(str(args[0])).name):
            return real(*args, **kwargs)
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(os, call, fail)
            return real(*args, **kwargs)

    patch.setattr(owner, name, failing)


@pytest.mark.property("R03")
@pytest.mark.parametrize(
    ("record_call", "posterior_call", "number"),
    [
        ("fsync", "fsync", errno.ENOSPC),
        pytest.param("replace", "rename", errno.EDQUOT, marks=pytest.mark.nightly),
        pytest.param("fsync", "fsync", errno.EIO, marks=pytest.mark.nightly),
    ],
)
def test_a_full_disk_ends_a_run_and_leaves_the_last_checkpoint_and_posterior(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    record_call: str,
    posterior_call: str,
    number: int,
) -> None:
    """At the posterior first, when there are checkpoints; then at the record, when there is a posterior."""
    output = tmp_path / "run"
    command = unfinished(world, output, 4)
    unscored = beside_checkpoints(world / "whole").keys() - {"result.json"} | {"trained.json"}
    steps = [
        ("save_posterior", posterior_call, "posterior", {"experiment.json", "trained.json"}),
        ("write_json", record_call, "result.json", unscored),
    ]
    for place, call, file, left in steps:
        before = beside_checkpoints(output)
        with monkeypatch.context() as patch:
            only = file if place == "write_json" else None
            fails_within(patch, "bayestune.experiment.run", place, call, number, only)
            assert invoke(command) == 2
        line = only_line(capsys)
        assert line.startswith(f"error: {output / file}: cannot be written: {os.strerror(number)}")
        assert ("MB free" in line) == (number == errno.ENOSPC)
        after = beside_checkpoints(output)
        before.pop("trained.json", None)  # of another training
        assert {name: after[name] for name in before} == before
        assert after.keys() == left
    assert invoke(command) == 0
    assert adapter(output) == adapter(world / "whole")


@pytest.mark.property("R03")
def test_a_checkpoint_that_does_not_fit_ends_training_and_leaves_the_last(world: Path, tmp_path: Path) -> None:
    """With a real limit of the system on the size of a file, in a process of its own."""
    output = tmp_path / "run"
    command = unfinished(world, output, 4)
    before = contents(output)
    largest = max(len(content) for content in contents(output / "checkpoints").values()) - 1
    assert largest > 10_000  # bytes; other files are smaller
    child = processes().Process(
        target=run_short_of_space, args=(command, str(tmp_path / "out"), str(tmp_path / "err"), largest)
    )
    child.start()
    child.join(SECONDS)
    error = (tmp_path / "err").read_text()
    assert child.exitcode == 2 and "Traceback" not in error, error
    line = error.rstrip("\n").rpartition("\n")[2]
    assert line == f"error: {output / 'checkpoints'}: cannot be written: {os.strerror(errno.EFBIG)}."
    after = contents(output)
    assert {name: after[name] for name in before} == before
    assert not (output / "posterior").exists() and not (output / "result.json").exists()
    assert invoke(command) == 0
    assert adapter(output) == adapter(world / "whole")


@pytest.mark.property("R03")
def test_answers_that_do_not_fit_leave_the_earlier_ones(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("mine")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        assert invoke(predicting(world, output, "--overwrite")) == 2
    line = only_line(capsys)
    assert line.startswith(f"error: {output}: cannot be written: No space left on device (")
    found = re.search(r"\(([\d.]+) MB free, about ([\d.]+) MB needed\)", line)
    assert found and float(found[1]) > 0 and float(found[2]) < 1
    assert contents(tmp_path) == {"answers.jsonl": b"mine"}


@pytest.mark.property("R03")
def test_an_export_that_does_not_fit_leaves_nothing_and_is_said(world: Path, tmp_path: Path) -> None:
    """With a real limit of the system on the size of a file: it is safetensors that meets it."""
    output, first = tmp_path / "lora", tmp_path / "first"
    assert invoke(["export", str(world / "whole"), "--output", str(first)]) == 0
    largest = (first / "mean" / "adapter_model.safetensors").stat().st_size - 1
    arguments = ["export", str(world / "whole"), "--output", str(output)]
    child = processes().Process(
        target=run_short_of_space, args=(arguments, str(tmp_path / "out"), str(tmp_path / "err"), largest)
    )
    child.start()
    child.join(SECONDS)
    line = (tmp_path / "err").read_text().rstrip("\n").rpartition("\n")[2]
    assert child.exitcode == 2 and line == f"error: {output}: cannot be written: {os.strerror(errno.EFBIG)}."
    assert sorted(os.listdir(tmp_path)) == ["err", "first", "out"]


@pytest.mark.property("R03")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_log_on_a_full_disk_does_not_end_training_and_output_there_is_an_error(world: Path, tmp_path: Path) -> None:
    command = unfinished(world, tmp_path / "run", 4)
    runs = [
        (command, str(tmp_path / "out"), "/dev/full", 0),
        (["evaluate", str(world / "whole"), "--json"], "/dev/full", str(tmp_path / "err"), 2),
    ]
    for arguments, out, err, code in runs:
        child = processes().Process(target=run_short_of_space, args=(arguments, out, err, resource.RLIM_INFINITY))
        child.start()
        child.join(SECONDS)
        assert child.exitcode == code, [path.read_text() for path in tmp_path.glob("err*")]
    assert adapter(tmp_path / "run") == adapter(world / "whole")
    line = (tmp_path / "err").read_text().rstrip("\n").rpartition("\n")[2]
    assert line.startswith("error: ") and os.strerror(errno.ENOSPC) in line


@pytest.mark.property("R02")
def test_a_device_lost_on_the_way_leaves_the_last_checkpoint(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As torch tells it; and nothing is done on the device after it."""
    output = tmp_path / "run"
    command = training(world, output, "--checkpoint-steps", "2")
    real = BayesTrainer.training_step

    def lost(self: BayesTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 4:
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BayesTrainer, "training_step", lost)
        assert invoke(command) == 1
    assert "internal error: AcceleratorError: CUDA error" in capsys.readouterr().err
    assert invoke([*command, "--resume"]) == 0
    assert adapter(output) == adapter(world / "whole")


@pytest.mark.property("R02")
def test_what_a_machine_lacks_is_said_before_weights_are_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", load)
    monkeypatch.setattr("bayestune.experiment.backbone.importlib.util.find_spec", lambda name: None)
    assert invoke(training(world, tmp_path / "run", "--quantization", "nf4")) == 2
    assert "needs the package bitsandbytes" in only_line(capsys)
    assert not (tmp_path / "run").exists()
