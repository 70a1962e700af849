"""A checkpoint that is not exactly what was written is refused before any of it is used, or passed over by name."""

import errno
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model

from bayestune.errors import BayestuneWarning, ConfigError, TrainingError
from bayestune.files import alone, sealed
from bayestune.training import BayesTrainer, KLSettings, checkpoint_files, checkpoint_state, last_complete
from bayestune.training.checkpoint_files import MANIFEST, UNFINISHED, check_checkpoint, seal
from models import GPT2, scatter
from training.toys import TASK, arguments, double_blob, rows, trained

FILES = {
    "README.md", "adapter_config.json", "adapter_model.safetensors", "checkpoint.json", "optimizer.safetensors",
    "rng_0.json", "rng_0.safetensors", "trainer_state.json", "training.json",
}  # fmt: skip


def trainer(output: Path, model: PeftModel | None = None, **given: Any) -> BayesTrainer:
    args = arguments(output, **{"max_steps": 3, "save_strategy": "steps", "save_steps": 1, **given})
    model = double_blob(layers=1) if model is None else model
    return BayesTrainer(model, task=TASK, args=args, train_rows=rows(6), eval_rows=rows(3), kl=KLSettings(cycle=3))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three updates, each saved."""
    output = tmp_path_factory.mktemp("whole")
    trainer(output).train()
    assert {path.name for path in output.iterdir()} == {"checkpoint-1", "checkpoint-2", "checkpoint-3"}
    assert {path.name for path in (output / "checkpoint-3").iterdir()} == FILES
    return output


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# P8: tampering


def flips_taken(folder: Path, count: int, chance: random.Random) -> int:
    """How many of `count` flips of one bit, over the files in proportion to their sizes, were not refused."""
    bits = [(path, bit) for path in sorted(folder.iterdir()) for bit in range(8 * path.stat().st_size)]
    taken = 0
    for path, bit in chance.sample(bits, count):
        flip(path, bit)
        try:
            check_checkpoint(folder)
            taken += 1
        except TrainingError:
            pass
        flip(path, bit)
    check_checkpoint(folder)
    return taken


def cuts_taken(path: Path, lengths: list[int]) -> int:
    """How many of these lengths of a file, other than its own, were not refused."""
    data, taken = path.read_bytes(), 0
    for length in lengths:
        path.write_bytes(data[:length] + b" " * (length - len(data)))
        try:
            check_checkpoint(path.parent)
            taken += 1
        except TrainingError:
            pass
    path.write_bytes(data)
    check_checkpoint(path.parent)
    return taken


@pytest.mark.property("P08")
def test_no_bit_flip_of_a_checkpoint_is_taken(run: Path, figure: Callable[..., None]) -> None:
    figure(
        "bit flips of a checkpoint taken, of 300", flips_taken(run / "checkpoint-3", 300, random.Random(1)), at_most=0
    )


@pytest.mark.property("P08")
def test_no_cut_or_longer_file_of_a_checkpoint_is_taken(run: Path) -> None:
    for name in FILES:
        path = run / "checkpoint-3" / name
        size = path.stat().st_size
        assert cuts_taken(path, [0, 1, 8, size // 2, size - 1, size + 1]) == 0, name


@pytest.mark.property("P08")
@pytest.mark.nightly
def test_three_thousand_bit_flips_and_many_cuts(run: Path, nightly_seed: int, figure: Callable[..., None]) -> None:
    folder = run / "checkpoint-3"
    taken = flips_taken(folder, 3000, random.Random(nightly_seed))
    figure("bit flips of a checkpoint taken, of 3,000", taken, at_most=0)
    chance = random.Random(nightly_seed)
    lengths = {name: range((folder / name).stat().st_size) for name in FILES}
    cuts = sum(cuts_taken(folder / name, chance.sample(size, min(len(size), 300))) for name, size in lengths.items())
    figure("cuts of a checkpoint taken, of 300 a file", cuts, at_most=0)


@pytest.mark.property("P08")
def test_a_damaged_checkpoint_is_refused_before_a_tensor_is_read(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    load = checkpoint_state.load_file
    monkeypatch.setattr(checkpoint_state, "load_file", lambda path: (read.append(path), load(path))[1])
    fresh = trainer(tmp_path / "new")
    before, state = trained(fresh.model), torch.get_rng_state()
    for name in sorted(FILES - {"README.md"}):
        flip(run / "checkpoint-2" / name, 803)
        with pytest.raises(TrainingError, match=f"checkpoint-2 cannot be resumed: {name} was cut or altered"):
            fresh.train(resume_from_checkpoint=str(run / "checkpoint-2"))
        flip(run / "checkpoint-2" / name, 803)
    assert read == [] and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained(fresh.model).items())
    fresh.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert len(read) == 3 and fresh.state.global_step == 3


@pytest.mark.property("P08")
@pytest.mark.nightly
def test_no_manifest_makes_another_error(run: Path, nightly_seed: int) -> None:
    """Any bytes for a manifest, and any JSON under a right checksum."""
    folder, text = run / "checkpoint-3", (run / "checkpoint-3" / MANIFEST).read_bytes()
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
    names = st.sampled_from([*sorted(FILES), "../training.json", "/etc/passwd", ""]) | st.text()
    listing = st.dictionaries(names, json_values, max_size=4).map(lambda files: sealed({"format": 1, "files": files}))
    other = json_values.map(lambda value: sealed({"format": value, "files": value}))

    @seed(nightly_seed)
    @settings(max_examples=1500, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary() | listing | other)
    def fuzz(manifest: bytes) -> None:
        (folder / MANIFEST).write_bytes(manifest)
        with pytest.raises(TrainingError):
            check_checkpoint(folder)

    fuzz()
    (folder / MANIFEST).write_bytes(text)
    check_checkpoint(folder)


# P10: links and names


@pytest.mark.property("P10")
@pytest.mark.parametrize("name", ["adapter_model.safetensors", MANIFEST, "folder"])
def test_a_link_in_a_checkpoint_is_refused(run: Path, name: str) -> None:
    path, outside = run / "checkpoint-3" / name, run.parent / "outside"
    if path.exists():
        path.rename(outside)
    else:
        outside.mkdir()
    path.symlink_to(outside)
    with pytest.raises(TrainingError, match=f"{name} is a symbolic link"):
        check_checkpoint(run / "checkpoint-3")


@pytest.mark.property("P10")
def test_a_manifest_leads_to_no_file_outside(run: Path) -> None:
    (run / "outside").write_text("")
    manifest = {"format": 1, "files": {"../outside": {"sha256": "", "bytes": 0}}}
    (run / "checkpoint-3" / MANIFEST).write_bytes(sealed(manifest))
    with pytest.raises(TrainingError, match=r"found no \.\./outside"):
        check_checkpoint(run / "checkpoint-3")


@pytest.mark.property("P10")
def test_a_link_in_the_place_of_the_working_folder_is_not_followed(run: Path) -> None:
    (run.parent / "mine").mkdir()
    (run.parent / "mine" / "thesis.tex").write_text("mine")
    shutil.move(run / "checkpoint-3", run.parent / "mine")
    (run / UNFINISHED).symlink_to(run.parent / "mine")
    assert last_complete(run) == run / "checkpoint-2"
    trainer(run, save_total_limit=3).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert sorted(os.listdir(run.parent / "mine")) == ["checkpoint-3", "thesis.tex"]
    assert sorted(os.listdir(run)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


@pytest.mark.property("P10")
@pytest.mark.parametrize("name", ["a/b", "a\0"])
def test_an_adapter_name_unfit_for_a_path_is_refused_before_training(tmp_path: Path, name: str) -> None:
    model = get_peft_model(GPT2.build(), GPT2.config(), adapter_name=name)
    with pytest.raises(ConfigError, match="adapter name: found"):
        trainer(tmp_path / "run", model)
    assert os.listdir(tmp_path) == []


# P4: discovery and rotation


@pytest.mark.property("P04")
def test_broken_checkpoints_are_passed_over_by_name(run: Path) -> None:
    for name in ("checkpoint-final", "checkpoint-9.bak"):
        (run / name).mkdir()
    assert last_complete(run) == run / "checkpoint-3"
    flip(run / "checkpoint-3" / "optimizer.safetensors", 4000)
    with pytest.warns(BayestuneWarning, match=r"checkpoint-3 .*optimizer\.safetensors was cut or altered"):
        assert last_complete(run) == run / "checkpoint-2"
    (run / "checkpoint-2" / "README.md").unlink()
    (run / "checkpoint-10").mkdir()
    with pytest.warns(BayestuneWarning) as warned:
        assert last_complete(run) == run / "checkpoint-1"
    said = [str(warning.message) for warning in warned]
    for message, words in zip(said, ("10 .*no checkpoint", "3 .*optimizer", r"2 .*found no README\.md"), strict=True):
        assert re.search(f"checkpoint-{words}", message), message
    (run / "checkpoint-1" / MANIFEST).unlink()
    with pytest.warns(BayestuneWarning) as warned:
        assert last_complete(run) is None
    assert re.search(r"checkpoint-1 .*found no checkpoint\.json", str(warned[-1].message)) and len(warned) == 4
    assert last_complete(run / "none") is None


@pytest.mark.property("P04")
@pytest.mark.parametrize("text", ["{", '{"settings": {}}', '{"settings": {"processes": 9}}'])
def test_wrong_training_settings_under_right_sums_are_passed_over_by_name(run: Path, text: str) -> None:
    (run / "checkpoint-3" / "training.json").write_text(text)
    seal(run / "checkpoint-3")
    says = r"found no rng_1\.json" if "9" in text else r"training\.json does not say how many processes"
    with pytest.warns(BayestuneWarning, match=rf"checkpoint-3 cannot be resumed: {says}"):
        assert last_complete(run) == run / "checkpoint-2"


@pytest.mark.property("P04")
def test_a_scheduler_that_keeps_infinities_is_resumed(tmp_path: Path) -> None:
    plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "loss", "eval_strategy": "epoch"}
    trainer(tmp_path, **plateau).train()
    assert "Infinity" in (tmp_path / "checkpoint-2" / "training.json").read_text()
    trainer(tmp_path, **plateau).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert last_complete(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.property("P04")
def test_a_broken_checkpoint_is_replaced_when_its_step_comes_again(run: Path) -> None:
    names = ("adapter_model.safetensors", "optimizer.safetensors", "training.json")
    expected = [(run / "checkpoint-3" / name).read_bytes() for name in names]
    flip(run / "checkpoint-3" / "training.json", 100)
    trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    check_checkpoint(run / "checkpoint-3")
    assert [(run / "checkpoint-3" / name).read_bytes() for name in names] == expected


@pytest.mark.property("P04")
def test_the_new_one_stands_before_the_old_one_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every rename of a run that keeps one checkpoint there is a whole one to go on from."""
    rename, seen = os.rename, []

    def watched(source: Any, target: Any) -> None:
        seen.append(last_complete(tmp_path))
        rename(source, target)
        seen.append(last_complete(tmp_path))

    monkeypatch.setattr(os, "rename", watched)
    trainer(tmp_path, save_total_limit=1).train()
    assert len(seen) == 10 and None not in seen
    assert os.listdir(tmp_path) == ["checkpoint-3"]


@pytest.mark.property("P04")
@pytest.mark.parametrize(
    ("limit", "left"), [(1, ["checkpoint-1", "checkpoint-4"]), (3, [f"checkpoint-{n}" for n in (1, 3, 4)])]
)
def test_the_best_one_and_the_last_stay(tmp_path: Path, limit: int, left: list[str]) -> None:
    """A rate of learning that only does harm: the first is the best."""
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": 1}
    run = trainer(
        tmp_path, max_steps=4, save_total_limit=limit, learning_rate=3.0, lr_scheduler_type="constant", **best
    )
    remains: list[str] = []
    run._load_best_model = lambda load=run._load_best_model: (remains.extend(sorted(os.listdir(tmp_path))), load())[1]
    run.train()
    assert remains == left
    assert run.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    state = (tmp_path / "checkpoint-1" / "trainer_state.json").read_text()
    assert f'"best_model_checkpoint": "{tmp_path}/checkpoint-1"' in state
    check_checkpoint(tmp_path / "checkpoint-1")


@pytest.mark.property("P04")
def test_an_adapter_of_another_name_is_saved_and_resumed(tmp_path: Path) -> None:
    def model() -> PeftModel:
        return scatter(get_peft_model(GPT2.build(), GPT2.config(), adapter_name="mine"), adapter="mine").double()

    first, second = trainer(tmp_path, model()), trainer(tmp_path, model())
    first.train()
    assert last_complete(tmp_path) == tmp_path / "checkpoint-3"
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert all(torch.equal(tensor, trained(second.model)[name]) for name, tensor in trained(first.model).items())
    with pytest.raises(TrainingError, match="holds no adapter 'default'"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


# What goes wrong while it is written


@pytest.mark.property("P02")
@pytest.mark.parametrize("call", ["save_optimizer", "seal"])
def test_a_save_that_fails_leaves_the_one_before_and_no_litter(
    run: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    again = trainer(run)
    shutil.rmtree(run / "checkpoint-3")
    monkeypatch.setattr(checkpoint_state if call == "save_optimizer" else checkpoint_files, call, full)
    with pytest.raises(OSError, match="No space"):
        again.train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert sorted(os.listdir(run)) == ["checkpoint-1", "checkpoint-2"] and last_complete(run) == run / "checkpoint-2"


@pytest.mark.property("P11")
def test_another_process_that_saves_there_is_named(run: Path) -> None:
    again = trainer(run)
    with alone(run / UNFINISHED), pytest.raises(ConfigError, match="another process is saving"):
        again.train(resume_from_checkpoint=str(run / "checkpoint-1"))
    assert last_complete(run) == run / "checkpoint-3"


@pytest.mark.property("P02")
def test_what_a_killed_save_left_is_removed_by_the_next(run: Path) -> None:
    (run / UNFINISHED / "checkpoint-3").mkdir(parents=True)
    (run / UNFINISHED / "checkpoint-3" / "training.json").write_text("{")
    (run / UNFINISHED / "removed-checkpoint-0").mkdir()
    assert last_complete(run) == run / "checkpoint-3"
    trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-2"))
    assert sorted(os.listdir(run)) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_seal_vouches_for_every_file(run: Path) -> None:
    text = (run / "checkpoint-1" / MANIFEST).read_bytes()
    assert check_checkpoint(run / "checkpoint-1") == FILES - {MANIFEST}
    seal(run / "checkpoint-1")
    assert (run / "checkpoint-1" / MANIFEST).read_bytes() == text
