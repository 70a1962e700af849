"""The folder of a run: killed at any moment of a replacement, the earlier run or the new one is there whole."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bayestune import demo
from bayestune.errors import ConfigError
from bayestune.experiment import Experiment
from bayestune.experiment import folder as folders
from bayestune.experiment.folder import check_output, earlier_run, run_folder
from bayestune.files import alone, read_json

GIVEN = Experiment(model="m", task="t")


class Killed(BaseException):
    """The process is gone: nothing more of it happens to the files."""


def write_run(output: Path, content: str) -> None:
    """A finished run whose files hold `content`."""
    (output / "posterior").mkdir(parents=True, exist_ok=True)
    (output / "posterior" / "weights").write_text(content)
    folders.write_json(output / "experiment.json", GIVEN.as_dict())
    (output / "result.json").write_text(content)


def replace(output: Path, *, fails: bool) -> None:
    """`--overwrite` with a run that finishes, or that is interrupted with nothing to show."""
    check_output(output, GIVEN, overwrite=True, resume=False)
    with run_folder(output, GIVEN, overwrite=True, resume=False):
        (output / "checkpoints" / "steps_0").mkdir(parents=True)  # a trainer makes its folder at once
        if fails:
            raise KeyboardInterrupt
        shutil.rmtree(output / "checkpoints")
        write_run(output, "new")


def whole(output: Path) -> str:
    """Whose run is in the folder; that it is all of one."""
    found = {(output / "result.json").read_text(), (output / "posterior" / "weights").read_text()}
    assert len(found) == 1 and (output / "experiment.json").is_file()
    return found.pop()


def killed_at(number: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """From the call `number` of the file system on, none has an effect; how many there were."""
    calls = 0

    def counted(module: Any, name: str) -> None:
        real = getattr(module, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= number:
                raise Killed
            return real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for module, name in ((os, "rename"), (os, "rmdir"), (os, "unlink"), (os, "mkdir"), (folders, "write_json")):
        counted(module, name)
    return lambda: calls


@pytest.mark.property("P02")
@pytest.mark.parametrize("fails", [False, True])
def test_a_replacement_killed_at_any_call_leaves_the_earlier_run_or_the_new_one(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    for number in range(1, 100):
        output = tmp_path / str(number) / "run"
        output.parent.mkdir()
        write_run(output, "old")
        with monkeypatch.context() as patch:
            calls = killed_at(number, patch)
            try:
                replace(output, fails=fails)
            except (Killed, KeyboardInterrupt):
                pass
        if calls() < number:
            break
        with pytest.raises(KeyboardInterrupt):  # the next attempt comes to nothing, and what was there is back
            replace(output, fails=True)
        seen.add(whole(output))
        assert not earlier_run(output).exists()
    assert number > 4 and "old" in seen and ("new" in seen) is not fails


def test_what_cost_time_is_kept_and_the_earlier_run_waits(tmp_path: Path) -> None:
    output = tmp_path / "run"
    write_run(output, "old")
    check_output(output, GIVEN, overwrite=True, resume=False)
    with pytest.raises(KeyboardInterrupt), run_folder(output, GIVEN, overwrite=True, resume=False):
        (output / "checkpoints" / "checkpoint-2").mkdir(parents=True)
        (output / "checkpoints" / "checkpoint-2" / "state").write_text("new")
        raise KeyboardInterrupt
    assert whole(earlier_run(output)) == "old" and not (output / "result.json").exists()
    check_output(output, GIVEN, overwrite=False, resume=True)
    with run_folder(output, GIVEN, overwrite=False, resume=True):
        write_run(output, "new")
    assert whole(output) == "new" and not earlier_run(output).exists()


def test_an_unfinished_run_is_kept_until_the_next_one_starts(tmp_path: Path) -> None:
    output = tmp_path / "run"
    write_run(output, "old")
    with pytest.raises(KeyboardInterrupt), run_folder(output, GIVEN, overwrite=True, resume=False):
        (output / "checkpoints" / "checkpoint-2").mkdir(parents=True)
        (output / "checkpoints" / "checkpoint-2" / "state").write_text("new")
        raise KeyboardInterrupt
    (output / "notes.txt").write_text("mine")
    check_output(output, GIVEN, overwrite=True, resume=False)  # a setting may be refused after this
    assert (output / "checkpoints" / "checkpoint-2" / "state").is_file()
    with pytest.raises(KeyboardInterrupt):
        replace(output, fails=True)
    assert whole(output) == "old" and (output / "notes.txt").read_text() == "mine"


def test_files_of_others_stay(tmp_path: Path) -> None:
    output = tmp_path / "run"
    write_run(output, "old")
    (output / "notes.txt").write_text("mine")
    replace(output, fails=False)
    assert whole(output) == "new" and (output / "notes.txt").read_text() == "mine"


def test_a_folder_in_the_way_is_not_touched(tmp_path: Path) -> None:
    output = tmp_path / "run"
    write_run(output, "old")
    earlier_run(output).mkdir()
    (earlier_run(output) / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="files that are not a run"):
        check_output(output, GIVEN, overwrite=True, resume=False)
    assert whole(output) == "old" and (earlier_run(output) / "notes.txt").is_file()


def test_overwrite_and_resume_are_not_both(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="overwrite and resume"):
        check_output(tmp_path / "run", GIVEN, overwrite=True, resume=True)


def test_a_run_that_waits_is_named(tmp_path: Path) -> None:
    from bayestune.experiment import load_run

    write_run(earlier_run(tmp_path / "run"), "old")
    with pytest.raises(ConfigError, match=r"kept in .*\.run\.before"):
        load_run(tmp_path / "run")


@pytest.mark.property("P11")
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("finished", [False, True])
def test_a_folder_in_which_a_run_is_being_made_is_not_touched(finished: bool, overwrite: bool, tmp_path: Path) -> None:
    """Neither its run, nor the one that waits until that is finished; before weights are loaded, and after."""
    output = tmp_path / "run"
    write_run(earlier_run(output), "old")
    if finished:
        write_run(output, "new")
    before = {path for path in tmp_path.rglob("*")}
    with alone(output):
        with pytest.raises(ConfigError, match="run: another process is saving to it"):
            check_output(output, GIVEN, overwrite=overwrite, resume=False)
        with pytest.raises(ConfigError, match="run: another process is saving to it"):
            with run_folder(output, GIVEN, overwrite=overwrite, resume=False):
                pass
    assert {path for path in tmp_path.rglob("*")} == before


@pytest.mark.property("P11")
def test_a_run_has_its_folder_alone_until_it_ends(tmp_path: Path) -> None:
    output = tmp_path / "new" / "run"
    for fails in (True, False):
        replace_alone(output, fails=fails)
        assert os.listdir(output.parent) == ["run"]
    assert whole(output) == "new"


def replace_alone(output: Path, *, fails: bool) -> None:
    """A run in the midst of which nobody else gets the lock."""
    try:
        with run_folder(output, GIVEN, overwrite=True, resume=False):
            with pytest.raises(ConfigError, match="another process"), alone(output):
                pass
            if fails:
                raise KeyboardInterrupt
            write_run(output, "new")
    except KeyboardInterrupt:
        pass


@pytest.mark.property("P11")
def test_who_comes_second_to_a_folder_does_not_replace_the_run_there(tmp_path: Path) -> None:
    """Both looked at the folder while it was empty."""
    output = tmp_path / "run"
    check_output(output, GIVEN, overwrite=False, resume=False)
    write_run(output, "first")
    with pytest.raises(ConfigError, match="not empty"), run_folder(output, GIVEN, overwrite=False, resume=False):
        pass
    assert whole(output) == "first" and os.listdir(tmp_path) == ["run"]


@pytest.mark.property("P11")
def test_a_lock_that_was_left_is_no_file_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the folder; or in it, where the one that it lies in cannot be written to, as with a mounted folder."""
    output, real = tmp_path / "run", os.access
    (tmp_path / ".run.lock").touch()
    output.mkdir()
    check_output(output, GIVEN, overwrite=False, resume=False)
    assert os.listdir(tmp_path) == ["run"]
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    (output / ".run.lock").touch()
    check_output(output, GIVEN, overwrite=False, resume=False)
    (output / ".run.lock").touch()
    with run_folder(output, GIVEN, overwrite=False, resume=False):
        assert (output / ".run.lock").exists() and os.listdir(tmp_path) == ["run"]
        write_run(output, "new")
    assert whole(output) == "new" and not (output / ".run.lock").exists()


@pytest.mark.property("P11")
def test_what_a_killed_demo_left_is_no_file_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Trained(Exception):
        pass

    def train(*args: Any) -> None:
        raise Trained

    monkeypatch.setattr(demo, "_train", train)
    for name in (".mle.lock", ".blob.before"):
        (tmp_path / name).touch()
    with pytest.raises(Trained):
        demo.run_demo(tmp_path)


@pytest.mark.property("X07")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"seed": 1, "seed": 2}', "key 'seed' is given twice"),
        ('{"a": ' * 100_000, "nested too deeply"),
        ("{" + " " * (1 << 24) + "}", "bytes of JSON, expected at most 16777216"),
    ],
    ids=["twice", "deep", "long"],
)
def test_a_record_without_bounds_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"experiment\.json: cannot be read as a record: .*{words}"):
        read_json(tmp_path / "experiment.json", "a record")


@pytest.mark.property("X07")
def test_of_a_record_that_is_too_long_no_more_is_read(tmp_path: Path) -> None:
    """A file that takes no space and says that it has a terabyte."""
    with (tmp_path / "experiment.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ConfigError, match="expected at most 16777216"):
        read_json(tmp_path / "experiment.json", "a record")
