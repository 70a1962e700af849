"""Checkpoints: a resumed run is the uninterrupted one, bit for bit, and no pickle is written or opened."""

import json
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from bayestune.errors import BayestuneWarning, PosteriorError, TrainingError
from bayestune.tasks import Row
from bayestune.training import BayesTrainer, KLSettings
from bayestune.training.checkpoint_files import last_complete, seal
from bayestune.training.checkpoint_state import load_random_state, save_random_state
from training.toys import TASK, arguments, double_blob, lora, rows, trained

STEPS = 8  # 10 rows, 2 a micro-batch, 2 micro-batches an update: 3 updates an epoch, the last of one micro-batch
CANARIES = (
    "adapter_model.bin", "pytorch_model.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth",
    "rng_state_0.pth", "training_args.bin", "scaler.pt",
)  # fmt: skip


def run(
    output: Path, *, resume: Path | None = None, method: str = "blob", start: int = 0, **settings: Any
) -> BayesTrainer:
    """Train for `STEPS` updates, saving after each; `start` seeds the adapter before training."""
    model = double_blob(start, lora_dropout=0.3) if method == "blob" else lora(start, lora_dropout=0.3)
    args = arguments(output, **{"max_steps": STEPS, "gradient_accumulation_steps": 2, "save_strategy": "steps",
                                "save_steps": 1, "warmup_steps": 2, **settings})  # fmt: skip
    kl = KLSettings(cycle=3) if method == "blob" else None
    trainer = BayesTrainer(model, task=TASK, args=args, train_rows=rows(10), eval_rows=rows(3), kl=kl)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


Whole = tuple[Path, BayesTrainer]
"""The folder of an uninterrupted run, and its trainer."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    output = tmp_path_factory.mktemp("blob")
    return output, run(output)


def losses(trainer: BayesTrainer) -> list[dict[str, Any]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.property("P05")
@pytest.mark.parametrize("step", [1, 3, 5, STEPS - 1, STEPS])  # 3 is the end of an epoch
def test_a_resumed_run_is_the_whole_run(whole: Whole, tmp_path: Path, step: int) -> None:
    assert_same_when_resumed(whole, tmp_path, step, "blob")


@pytest.mark.property("P05")
def test_a_resumed_run_of_plain_lora_is_the_whole_run(tmp_path: Path) -> None:
    whole = tmp_path / "whole", run(tmp_path / "whole", method="lora")
    assert_same_when_resumed(whole, tmp_path / "resumed", 2, "lora")


def assert_same_when_resumed(whole: Whole, tmp_path: Path, step: int, method: str) -> None:
    output, trainer = whole
    torch.manual_seed(step)  # whatever the process did before
    resumed = run(tmp_path, resume=output / f"checkpoint-{step}", method=method, start=1)
    assert losses(resumed) == losses(trainer) and resumed.state.global_step == STEPS
    for name, parameter in trained(trainer.model).items():
        assert torch.equal(parameter, trained(resumed.model)[name]), name
    files = ["adapter_model.safetensors", "optimizer.safetensors", "training.json", "rng_0.safetensors"]
    for later in range(step + 1, STEPS + 1):
        theirs, ours = output / f"checkpoint-{later}", tmp_path / f"checkpoint-{later}"
        for name in files:
            assert (ours / name).read_bytes() == (theirs / name).read_bytes(), (later, name)
        # Python's own generator is moved by the type checks of the test suite: compare numpy's part alone.
        rests = [json.loads((folder / "rng_0.json").read_text())["numpy"] for folder in (ours, theirs)]
        assert rests[0] == rests[1]


def test_random_states_round_trip(tmp_path: Path) -> None:
    before = [random.getstate(), np.random.get_state(), torch.get_rng_state()]
    try:
        np.random.standard_normal()  # leaves a second normal number in numpy's cache
        save_random_state(tmp_path / "rng_0", torch.device("cpu"))
        expected = [np.random.standard_normal(), torch.rand(()).item()]
        saved = random.getstate()
        random.random()
        np.random.seed(1)
        load_random_state(tmp_path / "rng_0", torch.device("cpu"))
        assert [np.random.standard_normal(), torch.rand(()).item()] == expected
        assert random.getstate()[0] == saved[0] and random.getstate()[2] == saved[2]
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def test_optimiser_state_round_trips_before_its_first_step(whole: Whole) -> None:
    output, trainer = whole
    state = trainer.optimizer.state_dict()
    trainer._load_optimizer_and_scheduler(str(output / f"checkpoint-{STEPS}"))
    again = trainer.optimizer.state_dict()
    saved = json.loads((output / f"checkpoint-{STEPS}" / "training.json").read_text())
    assert [group["lr"] for group in saved["optimizer"]["param_groups"]] == [g["lr"] for g in state["param_groups"]]
    assert again["param_groups"] == [{**g, "betas": list(g["betas"])} for g in state["param_groups"]]
    for number, values in state["state"].items():
        for name, value in values.items():
            assert (
                torch.equal(value, again["state"][number][name]) and value.dtype == again["state"][number][name].dtype
            )


@pytest.mark.property("P05")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 6}, "seed=5"),
        ({"per_device_train_batch_size": 1}, "batch_size=2"),
    ],
)
def test_other_settings_are_refused_by_name(
    whole: Whole, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, resume=whole[0] / "checkpoint-2", **settings)


@pytest.mark.property("P05")
def test_other_rows_and_other_kl_are_refused(whole: Whole, tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=STEPS, gradient_accumulation_steps=2, warmup_steps=2)
    others = [Row(id=row.id, question=row.question[::-1], choices=row.choices, answer=row.answer) for row in rows(10)]
    kls = [KLSettings(cycle=3), KLSettings(cycle=4), KLSettings(cycle=3, schedule=lambda step, cycle: 0.3)]
    cases = [("row_sha256", others, kls[0]), ("kl_cycle", rows(10), kls[1]), ("kl_weight", rows(10), kls[2])]
    for message, data, kl in cases:
        other = BayesTrainer(double_blob(), task=TASK, args=args, train_rows=data, kl=kl)
        with pytest.raises(TrainingError, match=message):
            other.train(resume_from_checkpoint=str(whole[0] / "checkpoint-2"))


@pytest.mark.property("P04")
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "rng_0.json"])
def test_an_incomplete_checkpoint_is_refused(whole: Whole, tmp_path: Path, name: str) -> None:
    checkpoint = Path(shutil.copytree(whole[0] / "checkpoint-2", tmp_path / "checkpoint-2"))
    (checkpoint / name).unlink()
    with pytest.raises(TrainingError, match=name):
        run(tmp_path / "new", resume=checkpoint)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_adapter_that_does_not_fit_is_refused(whole: Whole, tmp_path: Path, fault: str) -> None:
    checkpoint = Path(shutil.copytree(whole[0] / "checkpoint-2", tmp_path / "checkpoint-2"))
    tensors = load_file(checkpoint / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        tensors["surplus"] = torch.zeros(1)
    else:
        tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, checkpoint / "adapter_model.safetensors")
    seal(checkpoint)
    with pytest.raises(PosteriorError, match="surplus" if fault == "extra" else name):
        run(tmp_path / "new", resume=checkpoint)


class Watch:
    """Names of the files opened while `active`; an audit hook, which Python has no way to remove."""

    def __init__(self) -> None:
        self.active = False
        self.opened: set[str] = set()
        sys.addaudithook(self._hook)

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if self.active and event == "open" and isinstance(args[0], str | Path):
            self.opened.add(Path(args[0]).name)


class PlantCanaries(TrainerCallback):
    """After each save, puts files that torch.load would take for its own into the checkpoint."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.watch.active = False
        plant(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.watch.active = True


class Payload:
    """Unpickling it makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def plant(checkpoint: Path) -> None:
    written = {path.name for path in checkpoint.iterdir()}
    assert {Path(name).suffix for name in written} <= {".safetensors", ".json", ".md"}, written
    for name in CANARIES:
        torch.save(Payload(checkpoint / "canary-ran"), checkpoint / name)


@pytest.mark.property("P09")
def test_no_pickle_is_written_or_opened(tmp_path: Path) -> None:
    watch = Watch()
    watch.active = True
    model = double_blob()
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    args = arguments(tmp_path, load_best_model_at_end=True, metric_for_best_model="loss", **settings)
    for resume in (None, str(tmp_path / "checkpoint-2")):
        trainer = BayesTrainer(
            model, task=TASK, args=args, train_rows=rows(6), eval_rows=rows(3), callbacks=[PlantCanaries(watch)]
        )
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.best_model_checkpoint is not None
        shutil.rmtree(tmp_path / "checkpoint-3")
    trainer.save_model(str(tmp_path / "final"))
    watch.active = False
    plant(tmp_path / "final")
    assert {"training.json", "rng_0.json", "trainer_state.json"} <= watch.opened
    assert watch.opened & set(CANARIES) == set()
    assert list(tmp_path.rglob("canary-ran")) == []


@pytest.mark.property("P09")
def test_pickled_checkpoint_is_refused_unopened(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    plant(checkpoint)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"global_step": 2}))
    watch = Watch()
    watch.active = True
    with pytest.raises(TrainingError, match="found no checkpoint.json"):
        run(tmp_path / "new", resume=checkpoint)
    watch.active = False
    assert watch.opened & set(CANARIES) == set()
    assert not (checkpoint / "canary-ran").exists()


def test_the_canary_sings(tmp_path: Path) -> None:
    """The planted files are seen, and run code, where something does open them: their silence means something."""
    plant(tmp_path)
    watch = Watch()
    watch.active = True
    torch.load(tmp_path / "optimizer.pt", weights_only=False)
    watch.active = False
    assert "optimizer.pt" in watch.opened
    assert (tmp_path / "canary-ran").exists()


@pytest.mark.property("P04")
def test_a_checkpoint_without_the_files_of_every_process_is_not_complete(whole: Whole, tmp_path: Path) -> None:
    """Killed while another process was writing: the one before is taken."""
    output, _ = whole
    first, second = (Path(shutil.copytree(output / f"checkpoint-{n}", tmp_path / f"checkpoint-{n}")) for n in (1, 2))
    assert last_complete(tmp_path) == second
    training = second / "training.json"
    content = json.loads(training.read_text())
    content["settings"]["processes"] = 2
    training.write_text(json.dumps(content))
    seal(second)
    with pytest.warns(BayestuneWarning, match=r"checkpoint-2 cannot be resumed: .*rng_1\.json"):
        assert last_complete(tmp_path) == first
    for kind in ("json", "safetensors"):
        shutil.copyfile(second / f"rng_0.{kind}", second / f"rng_1.{kind}")
    seal(second)
    assert last_complete(tmp_path) == second
    with pytest.raises(TrainingError, match="processes=2, this run has 1"):
        run(tmp_path / "new", resume=second)
    training.write_text(training.read_text()[:-1])
    with pytest.warns(BayestuneWarning, match=r"checkpoint-2 cannot be resumed: training\.json was cut or altered"):
        assert last_complete(tmp_path) == first
