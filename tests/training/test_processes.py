"""Several processes train what one trains on batches as large as theirs together (gloo, on a CPU)."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bayestune.errors import BayestuneWarning, ConfigError, TrainingError
from bayestune.training import BayesTrainer, checkpoint_state, last_complete
from bayestune.training.checks import check_same_settings
from training.launching import beside_one, launch
from training.process import KINDS, trainer_of
from training.toys import TASK, lora, rows, trained


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote after 20 updates of each kind."""
    folder = tmp_path_factory.mktemp("two")
    done = launch("process.py", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.property("R06")
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains(
    two: Path, tmp_path: Path, figure: Callable[..., None], kind: str
) -> None:
    """To rounding of float64; BLoB too, beside one process whose micro-batches see the noise of two processes."""
    _, written = beside_one(two, kind, tmp_path, figure, at_most=1e-12)
    assert [found["labels"] for found in written] == [[row.answer for row in rows(7)]] * 2


@pytest.mark.property("R06")
@pytest.mark.nightly
def test_two_processes_train_on_a_base_of_4_bits(tmp_path: Path, figure: Callable[..., None]) -> None:
    """To rounding of float32, in which bitsandbytes computes."""
    pytest.importorskip("bitsandbytes", reason="nf4 bases need bitsandbytes: pip install '.[quant]'")
    done = launch("process.py", tmp_path, "nf4")
    assert done.returncode == 0, done.stderr[-3000:]
    beside_one(tmp_path, "nf4", tmp_path, figure, at_most=1e-6)


@pytest.mark.property("P05")
def test_a_run_moves_between_one_and_two_processes(tmp_path: Path, figure: Callable[..., None]) -> None:
    """With as many rows per update; plain LoRA without dropout, which then trains the same, to rounding of float64."""
    settings = {"alone": True, "save_strategy": "steps", "save_steps": 10}
    whole = trainer_of("lora", tmp_path / "whole", **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-10", tmp_path / "more" / "checkpoint-10")
    assert launch("process.py", tmp_path / "fewer", "moved").returncode == 0
    done = launch("process.py", tmp_path / "more", "moved")
    assert done.returncode == 0 and "was written with processes=1, this run has 2" in done.stderr, done.stderr[-3000:]
    fewer = trainer_of("lora", tmp_path / "last", **settings)
    with pytest.warns(BayestuneWarning, match="processes=2, this run has 1: the rows of each update stay"):
        fewer.train(resume_from_checkpoint=str(tmp_path / "fewer" / "checkpoint-10"))
    odd = BayesTrainer(lora(), task=TASK, args=fewer.args, train_rows=rows(18))
    settings = {**odd.resume_settings(), "step": 10}
    before = {**settings, "processes": 2, "gradient_accumulation_steps": 1}
    with pytest.raises(TrainingError, match="processes=2, this run has 1: .* Start as many processes as before"):
        checkpoint_state._check_settings(tmp_path, before, settings)
    ends = {"1, then 2": load_file(tmp_path / "more" / "moved-1.safetensors"), "2, then 1": trained(fewer.model)}
    for processes, end in ends.items():
        difference = max((end[name] - tensor).abs().max().item() for name, tensor in trained(whole.model).items())
        figure(f"weights after 20 updates, 10 in each number of processes: {processes}", difference, at_most=1e-12)


@pytest.mark.property("P05")
def test_each_process_has_dropout_masks_of_its_own_and_resumes_with_them(tmp_path: Path) -> None:
    done = launch("process.py", tmp_path, "dropout")
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"dropout-{rank}.json").read_text()) for rank in (0, 1))
    assert first["same"] and second["same"]
    states = [*first["states"], *second["states"]]
    assert len(states) == 8 and len(set(map(tuple, states))) == 8


@pytest.mark.property("R07")
@pytest.mark.nightly
def test_a_killed_process_ends_the_run_and_leaves_a_checkpoint(tmp_path: Path, figure: Callable[..., None]) -> None:
    """Killed at update 5: the launcher names the rank and ends, nobody stays, checkpoint 4 is whole."""
    done = launch("process.py", tmp_path, "killed")
    ended = time.time()
    assert done.returncode != 0
    assert "SIGKILL" in done.stderr and "rank      : 1 (local_rank: 1)" in done.stderr, done.stderr[-3000:]
    died = (tmp_path / "killed").stat().st_mtime
    figure("seconds from the kill to the end of the launcher, ddp_timeout 60", ended - died, at_most=60 + 10)
    assert_gone(tmp_path)
    assert last_complete(tmp_path) == tmp_path / "checkpoint-4"
    for file in (tmp_path / "checkpoint-4").glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(file).values())


@pytest.mark.property("R07")
@pytest.mark.nightly
@pytest.mark.parametrize(
    ("fault", "rank", "message"),
    [
        ("rows", 0, "ConfigError: process 1 has rows=18, process 0 has 20"),
        ("rows", 1, "ConfigError: process 1 has rows=18, process 0 has 20"),
        ("memory", 1, "TrainingError: step 0: memory ran out on cpu:0 in micro-batch 1 of the update, process 1 of 2"),
    ],
)
def test_processes_that_cannot_go_on_together_end(
    faults: Callable[[str], Path], fault: str, rank: int, message: str
) -> None:
    assert (faults(fault) / f"{rank}.txt").read_text().startswith(message)


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run that failed with a fault, made once for each."""
    made: dict[str, Path] = {}

    def get(fault: str) -> Path:
        if fault not in made:
            made[fault] = tmp_path_factory.mktemp(fault)
            assert launch("process.py", made[fault], fault).returncode != 0
            assert_gone(made[fault])
        return made[fault]

    return get


def assert_gone(folder: Path) -> None:
    """No process of the run is left."""
    pids = [int(path.read_text()) for path in folder.glob("*.pid")]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.property("R07")
@pytest.mark.parametrize("name", ["rows", "prior_std"])
def test_processes_with_other_settings_are_refused_by_name(name: str) -> None:
    settings = {"seed": 1, "rows": 20, "row_sha256": "ab"}
    check_same_settings([settings, dict(settings)])
    with pytest.raises(ConfigError, match=f"process 2 has {name}=7, process 0 has "):
        check_same_settings([settings, settings, {**settings, name: 7}])
