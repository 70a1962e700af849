"""SIGINT and SIGTERM, sent to real processes that wait at a known place of a command."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from bayestune_cli.app import invoke
from cli.commands import adapter, make_world, predicting, processes, run, training

SECONDS = 120
"""How long a process may take to come to a place, on a busy machine."""
CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
Child = tuple[Any, Connection]
Start = Callable[..., Child]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and whole/, a run that no signal came to."""
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a command line in a process of its own, and return when it waits at the place."""
    context, children = processes(), []

    def started(place: str, call: int, arguments: list[str]) -> Child:
        talk, other = context.Pipe()
        child = context.Process(target=run, args=(place, call, arguments, other, str(tmp_path / "log")))
        children.append(child)
        child.start()
        wait([talk, child.sentinel], SECONDS)
        assert talk.poll() and talk.recv() == "there", (tmp_path / "log.err").read_text()
        return child, talk

    yield started
    for child in children:
        child.kill()
        child.join()
        child.close()


def ended(child: Child, number: int) -> tuple[int, float]:
    """Send the signal, let the process go on, and wait for its end: the exit code, and how long it took (s)."""
    process, talk = child
    sent = time.monotonic()
    os.kill(process.pid, number)
    talk.send("go on")
    process.join(SECONDS)
    return process.exitcode, time.monotonic() - sent


def check_stopped(folder: Path, code: int, number: int) -> str:
    """The exit code, one line (beside bars) that says it, no traceback, nothing half written; the line."""
    expected, word = CODES[signal.Signals(number)]
    error = (folder / "log.err").read_text()
    assert code == expected, error
    last = error.rstrip("\n").rpartition("\n")[2]
    assert last.startswith(word) and error.count(word) == 1 and "Traceback" not in error, error
    assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".before", ".removed"))]
    return last


PHASES = [
    ("tokenising", 3, None),
    ("loading", 1, None),
    ("step", 1, 1),
    ("update", 3, 3),
    ("checkpoint", 2, 4),
    ("posterior", 1, 6),
    ("evaluation", 1, 6),
    ("record", 1, 6),
]
"""Places in a training, which call of each is waited at, and the update that a checkpoint is of when it has ended."""
BY_SIGNAL = [
    pytest.param(*phase, number, marks=[] if i % 2 == j else [pytest.mark.nightly])
    for i, phase in enumerate(PHASES)
    for j, number in enumerate(CODES)
]


@pytest.mark.property("R04")
@pytest.mark.parametrize(("place", "call", "saved", "number"), BY_SIGNAL)
def test_a_signal_in_any_phase_of_training_ends_it_and_it_goes_on_to_the_same_adapter(
    world: Path, tmp_path: Path, start: Start, figure: Any, place: str, call: int, saved: int | None, number: int
) -> None:
    output = tmp_path / "run"
    command = training(world, output, "--checkpoint-steps", "2")
    code, seconds = ended(start(place, call, command), number)
    line = check_stopped(tmp_path, code, number)
    figure("seconds from the signal to the end", seconds, at_most=30)
    assert not (output / "result.json").exists()
    if saved is None:
        assert not output.exists()
    else:
        newest = max((output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        assert newest.name == f"checkpoint-{saved}"
        assert (f"checkpoint-{saved}, to resume from" in line) == (place in ("step", "update", "checkpoint"))
        command.append("--resume")
    assert invoke(command) == 0
    assert adapter(output) == adapter(world / "whole")


@pytest.mark.property("R04")
@pytest.mark.parametrize(
    ("number", "again"),
    [(signal.SIGTERM, "--resume"), pytest.param(signal.SIGINT, "--overwrite", marks=pytest.mark.nightly)],
)
def test_without_checkpoints_it_ends_at_once_and_starts_anew(
    world: Path, tmp_path: Path, start: Start, capsys: Any, number: int, again: str
) -> None:
    command = training(world, tmp_path / "run")
    code, _ = ended(start("update", 3, command), number)
    assert check_stopped(tmp_path, code, number) == CODES[signal.Signals(number)][1]
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"experiment.json", "checkpoints"}
    assert invoke(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert invoke([*command, again]) == 0
    assert adapter(tmp_path / "run") == adapter(world / "whole")


@pytest.mark.property("R04")
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc to see a handler go")
@pytest.mark.parametrize("place", ["checkpoint", pytest.param("update", marks=pytest.mark.nightly)])
def test_a_second_signal_ends_the_process_at_once(world: Path, tmp_path: Path, start: Start, place: str) -> None:
    """By the system's own hand, also within a library's long call; what was saved before is whole."""
    command = training(world, tmp_path / "run", "--checkpoint-steps", "2")
    process, talk = start(place, 2 if place == "checkpoint" else 4, command)
    os.kill(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS
    while caught(process.pid, signal.SIGINT):  # until the first one has come to the handler
        assert time.monotonic() < deadline
    os.kill(process.pid, signal.SIGINT)
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGINT
    assert "Traceback" not in (tmp_path / "log.err").read_text()
    assert invoke([*command, "--resume"]) == 0
    assert adapter(tmp_path / "run") == adapter(world / "whole")


def caught(pid: int, number: int) -> bool:
    """Whether the process has a handler for the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt"))
    return bool(int(mask, 16) >> (number - 1) & 1)


@pytest.mark.property("R04")
@pytest.mark.parametrize(
    ("place", "number"),
    [
        ("evaluation", signal.SIGINT),
        ("answers", signal.SIGTERM),
        *(
            pytest.param(place, number, marks=pytest.mark.nightly)
            for place, number in [
                ("tokenising", signal.SIGTERM),
                ("loading", signal.SIGINT),
                ("loading", signal.SIGTERM),
            ]
        ),
    ],
)
def test_a_signal_in_any_phase_of_predict_ends_it(
    world: Path, tmp_path: Path, start: Start, figure: Any, place: str, number: int
) -> None:
    output = tmp_path / "answers.jsonl"
    output.write_text("mine")
    code, seconds = ended(start(place, 1, predicting(world, output, "--overwrite")), number)
    check_stopped(tmp_path, code, number)
    figure("seconds from the signal to the end", seconds, at_most=30)
    assert output.read_text() == "mine" and {path.name for path in tmp_path.iterdir()} == {
        "answers.jsonl",
        "log.out",
        "log.err",
    }


@pytest.mark.property("R04")
def test_handlers_are_put_back_and_only_the_main_thread_has_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []

    def look(*args: Any, **kwargs: Any) -> None:
        seen.append([signal.getsignal(number) for number in CODES])

    monkeypatch.setattr("bayestune.demo.run_demo", look)
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in the background of a shell
    before = [signal.getsignal(number) for number in CODES]
    try:
        assert invoke(["demo", "--output", str(tmp_path)]) == 0
        thread = threading.Thread(target=invoke, args=(["demo", "--output", str(tmp_path)],))
        thread.start()
        thread.join()
        assert [signal.getsignal(number) for number in CODES] == before
    finally:
        signal.signal(signal.SIGINT, ignored)
    inside, in_thread = seen
    assert inside[0] is signal.SIG_IGN and inside[1] not in before
    assert in_thread == before
