"""Saves and training runs that are killed, and writers that meet. Started as a process of its own, which forks.

    crashing.py FOLDER SEED WHAT...

Each WHAT is one of: "next", "same" or "posterior", a save killed at its n-th call of the file system, for every n (of
the next checkpoint, of one that is there already, of a posterior that is); "kills=COUNT", kills at random times;
"writers=COUNT", two processes that save to one folder COUNT times each, and a reader; "training", a run killed at
random and resumed until it is done. The last line printed is what came of each, as JSON.
"""

import itertools
import json
import os
import random
import select
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from bayestune.errors import BayestuneWarning, ConfigError, PosteriorError
from bayestune.methods import load_posterior, save_posterior
from bayestune.training import BayesTrainer, KLSettings
from bayestune.training.checkpoint_files import last_complete
from models import LLAMA, blob
from training.toys import TASK, arguments, double_blob, rows

KILLED = 137
STEPS = 60
_CHANGES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate"}


class Checkpoints:
    """Checkpoints of one run, of which one is kept: `save(step, value)` writes `value` into every part of it."""

    def __init__(self, folder: Path) -> None:
        args = arguments(folder / "trained", max_steps=2, save_total_limit=1)
        model = double_blob(layers=1)
        self.trainer = BayesTrainer(model, task=TASK, args=args, train_rows=rows(4), kl=KLSettings(cycle=2))
        self.trainer.train()

    def save(self, where: Path, step: int, value: int) -> None:
        random.seed(value)
        np.random.seed(value)
        torch.manual_seed(value)
        with torch.no_grad():
            for parameter in self.trainer.model.parameters():
                if parameter.requires_grad:
                    parameter.fill_(value)
            for state in self.trainer.optimizer.state.values():
                state["exp_avg"].fill_(value)
        self.trainer.args.output_dir = str(where)
        self.trainer.state.global_step = step
        self.trainer.state.log_history = [{"value": value}]
        self.trainer._save_checkpoint(self.trainer.model, None)

    def found(self, where: Path) -> tuple[int, int] | str:
        """Step and value of the checkpoint that a run would go on from."""
        checkpoint = last_complete(where)
        if checkpoint is None:
            return "nothing"
        steps = {json.loads((checkpoint / name).read_text())["global_step"] for name in ("trainer_state.json",)}
        steps |= {
            json.loads((checkpoint / "training.json").read_text())["settings"]["step"],
            int(checkpoint.name[11:]),
        }
        state = json.loads((checkpoint / "trainer_state.json").read_text())
        values = {entry["value"] for entry in state["log_history"]}
        for tensor in load_file(checkpoint / "adapter_model.safetensors").values():
            values |= set(tensor.unique().tolist())
        for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
            values |= set(tensor.unique().tolist()) if name.endswith("exp_avg") else set()
        generator = torch.Generator().manual_seed(int(min(values)))
        if not torch.equal(load_file(checkpoint / "rng_0.safetensors")["torch"], generator.get_state()):
            return "other random states"
        return (steps.pop(), int(values.pop())) if len(steps) == len(values) == 1 else f"a mix: {steps}, {values}"

    def litter(self, where: Path, step: int) -> list[str]:
        """What is there beside the checkpoint of `step`."""
        return sorted({path.name for path in where.iterdir()} - {f"checkpoint-{step}"})


class Posteriors:
    """A posterior that is replaced: every number of its adapter is `value`."""

    def __init__(self, folder: Path) -> None:
        self.model, self.base = blob(LLAMA), LLAMA.build

    def save(self, where: Path, step: int, value: int) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if ".default." in name:
                    parameter.fill_(value)
        save_posterior(self.model, where / "p", overwrite=True)

    def found(self, where: Path) -> tuple[int, int] | str:
        model = load_posterior(self.base(), where / "p")
        values = {v for n, p in model.named_parameters() if ".default." in n for v in p.unique().tolist()}
        return (0, int(values.pop())) if len(values) == 1 else f"a mix: {values}"

    def litter(self, where: Path, step: int) -> list[str]:
        return sorted({path.name for path in where.iterdir()} - {"p"})


def die_at(number: int) -> None:
    """End this process at its `number`-th call of the file system. A file that it opens to write is left torn."""
    calls = itertools.count(1)
    active = True

    def die(path: Any = None) -> None:
        nonlocal active
        if active and next(calls) == number:
            active = False
            if path is not None:
                Path(path).write_bytes(b"{")
            os._exit(KILLED)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event in _CHANGES:
            writes = event == "open" and isinstance(args[0], str | Path) and args[2] & (os.O_WRONLY | os.O_RDWR)
            die(args[0] if writes else None)

    fsync = os.fsync
    os.fsync = lambda descriptor: (die(), fsync(descriptor))[1]
    sys.addaudithook(hook)


def forked(action: Callable[[], None]) -> int:
    """The id of a new process that does `action`, and nothing else."""
    child = os.fork()
    if child:
        return child
    try:
        action()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def calls(subject: Checkpoints | Posteriors, folder: Path, step: int) -> list[Any]:
    """What is found after a save of `step` over one of step 1 was killed at each of its calls."""
    (start := folder / "start").mkdir(parents=True)
    subject.save(start, 1, 1)
    outcomes = []
    for number in itertools.count(1):
        where = folder / str(number)
        shutil.copytree(start, where)

        def killed(where: Path = where, number: int = number) -> None:
            die_at(number)
            subject.save(where, step, 2)

        code = ended(forked(killed))
        assert code in (0, KILLED), code
        if code == 0:
            return outcomes
        outcomes.append(subject.found(where))
        subject.save(where, step + 1, 3)
        assert subject.litter(where, step + 1) == [], subject.litter(where, step + 1)
        assert subject.found(where) == (step + 1 if isinstance(subject, Checkpoints) else 0, 3)
        shutil.rmtree(where)
    raise AssertionError


def killed_after(child: int, told: int, lines: int, seconds: float) -> int:
    """Kill a process `seconds` after it has written `lines` bytes, unless it ended; how many it wrote in all."""
    count = 0
    while count < lines and os.read(told, 1):
        count += 1
    select.select([], [], [], seconds)
    os.kill(child, signal.SIGKILL)
    while os.read(told, 1):
        count += 1
    return count


def kills(subject: Checkpoints | Posteriors, folder: Path, count: int, chance: random.Random) -> int:
    """How many of `count` kills of a loop of saves were followed by the save before it or the save that it hit."""
    folder.mkdir(parents=True)
    subject.save(folder, 1, 1)
    last, survived = 1, 0
    for _ in range(count):
        told, tell = os.pipe()

        def loop(last: int = last, tell: int = tell) -> None:
            for number in itertools.count(last + 1):
                subject.save(folder, number, number)
                os.write(tell, b".")

        child = forked(loop)
        os.close(tell)
        done = last + killed_after(child, told, chance.randrange(3), chance.uniform(0, 0.03))
        os.close(told)
        assert ended(child) == -signal.SIGKILL
        found = subject.found(folder)
        step, value = found if isinstance(found, tuple) else (-1, -1)
        assert value in (done, done + 1) and step in (0, value), (found, done)
        last, survived = value, survived + 1
    subject.save(folder, last + 1, last + 1)
    assert subject.litter(folder, last + 1) == []
    return survived


def writers(folder: Path, count: int) -> dict[str, int]:
    """What two writers of one folder were told, and what a reader saw meanwhile."""
    subject, tally = Posteriors(folder), dict.fromkeys(("saved", "told", "read", "refused"), 0)
    folder.mkdir(parents=True)
    subject.save(folder, 0, 1)
    told, tell = os.pipe()

    def write(value: int) -> None:
        for _ in range(count):
            try:
                subject.save(folder, 0, value)
                os.write(tell, b"s")
            except ConfigError as error:
                assert "another process is saving" in str(error)
                os.write(tell, b"t")

    children = [forked(lambda value=value: write(value)) for value in (1, 2)]
    os.close(tell)
    open_ = True
    while open_:
        while open_ and select.select([told], [], [], 0)[0]:
            answer = os.read(told, 1)
            open_ = bool(answer)
            tally["saved"] += answer == b"s"
            tally["told"] += answer == b"t"
        try:
            assert subject.found(folder) in ((0, 1), (0, 2))
            tally["read"] += 1
        except PosteriorError:
            tally["refused"] += 1
    assert [ended(child) for child in children] == [0, 0] and subject.litter(folder, 0) == []
    return tally


def first_come(folder: Path, count: int) -> int:
    """How often exactly one of two writers of a new folder succeeded, the other being told."""
    once = 0
    for number in range(count):

        def write(value: int, path: Path = folder / str(number)) -> None:
            try:
                save_posterior(blob(LLAMA, seed=value), path)
            except ConfigError:
                os._exit(2)

        children = [forked(lambda value=value, write=write: write(value)) for value in (1, 2)]
        once += sorted(ended(child) for child in children) == [0, 2]
        load_posterior(LLAMA.build(), folder / str(number))
    return once


class Tell(TrainerCallback):
    def __init__(self, tell: int) -> None:
        self.tell = tell

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.write(self.tell, b".")


def train(run: Path, tell: int) -> None:
    args = arguments(run, max_steps=STEPS, save_strategy="steps", save_steps=2, save_total_limit=2, warmup_steps=4)
    model = double_blob(layers=1, lora_dropout=0.3, estimator="flipout")
    trainer = BayesTrainer(
        model, task=TASK, args=args, train_rows=rows(10), kl=KLSettings(cycle=7), train_draws=2, callbacks=[Tell(tell)]
    )
    last = last_complete(run)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))


def training(folder: Path, chance: random.Random) -> dict[str, Any]:
    """How often a run was killed until it was done, and which files of its last checkpoint are another's."""
    told, tell = os.pipe()
    assert ended(forked(lambda: train(folder / "whole", tell))) == 0
    os.close(tell)
    os.close(told)
    count = 0
    while True:
        told, tell = os.pipe()
        child = forked(lambda tell=tell: train(folder / "killed", tell))
        os.close(tell)
        killed_after(child, told, chance.randrange(1, 9), chance.uniform(0, 0.03))
        os.close(told)
        if (code := ended(child)) == 0:
            break
        assert code == -signal.SIGKILL, code
        count += 1
    whole, killed = (dict(_files(folder / name / f"checkpoint-{STEPS}")) for name in ("whole", "killed"))
    return {"kills": count, "other": [n for n in whole.keys() | killed.keys() if whole.get(n) != killed.get(n)]}


def _files(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in folder.iterdir():
        yield path.name, path.read_bytes()


def outcome(what: str, root: Path, chance: random.Random) -> Any:
    kind, _, count = what.partition("=")
    match kind:
        case "next" | "same":
            return calls(Checkpoints(root), root / kind, 2 if kind == "next" else 1)
        case "posterior":
            return calls(Posteriors(root), root / kind, 1)
        case "kills":
            subjects = {"checkpoints": Checkpoints(root), "posteriors": Posteriors(root)}
            return {name: kills(subject, root / name, int(count), chance) for name, subject in subjects.items()}
        case "writers":
            return {**writers(root / "two", int(count)), "first come": first_come(root / "new", int(count) // 10)}
        case _:
            return training(root, chance)


def main(folder: str, seed: str, *wanted: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("error", BayestuneWarning)  # no kill leaves a broken checkpoint where whole ones are
    warnings.filterwarnings("ignore", "posterior std: in", BayestuneWarning)  # these runs are short
    torch.set_num_threads(1)
    root, chance = Path(folder), random.Random(int(seed))
    found = {what: outcome(what, root, chance) for what in wanted}
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
