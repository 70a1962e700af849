"""One of several training processes: trains toys and writes what it then holds. Started by test_processes.py.

    process.py FOLDER [FAULT]

Without a fault it trains every kind of `KINDS`, one after the other, and with "nf4" that kind. With "moved" it goes on
from a checkpoint. With "dropout" it trains plain LoRA with dropout, and again from the second of its checkpoints. Any
other FAULT is what befalls process 1 when plain LoRA is trained: "killed" at update 5, "memory" runs out in its second
micro-batch, or it has fewer "rows" than the others.
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from bayestune.experiment.processes import leave
from bayestune.methods import IvonCallback, IvonOptimizer
from bayestune.training import BayesTrainer, KLSettings, last_complete
from training.toys import TASK, arguments, blob_on_4_bits, double_blob, lora, rows, trained

KINDS = ("lora", "blob", "kl", "ivon")
"""Plain LoRA; BLoB; BLoB with B frozen at 0, so that only the KL moves M and G; IVON."""


def model_of(kind: str) -> PeftModel:
    if kind == "nf4":
        return blob_on_4_bits()
    model = lora() if kind in ("lora", "map", "ivon") else double_blob(r=1 if kind == "narrow" else 4)
    if kind == "kl":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_().requires_grad_(False)
    return model


class AsTwo(BayesTrainer):
    """One process, whose micro-batches see the noise that those of two processes in turn would see."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self._noise is not None:
            micro = self._noise.micro
            self._noise.rank, self._noise.micro = micro % 2, micro // 2
            loss = super().training_step(model, inputs, num_items_in_batch)
            self._noise.micro = micro + 1
            return loss
        return super().training_step(model, inputs, num_items_in_batch)


def trainer_of(kind: str, folder: Path, *, alone: bool, **settings: Any) -> BayesTrainer:
    """20 updates of 4 rows: in two processes of a micro-batch of 2 each, or `alone` in two micro-batches.

    "narrow" is BLoB with one row in M and G, so that one of two shards is empty.
    "nf4" is BLoB on a base of 4 bits, in float32, by SGD: AdamW makes whole steps of rounding errors.
    "accumulated" is BLoB with clipping and twice as many micro-batches, in two processes with gradient checkpointing.
    It is evaluated on 7 rows, two or four at once, so that the last batch is short of rows for both.
    """
    model, callbacks, optimizer, times = model_of(kind), [], None, 1
    if kind == "accumulated":
        times, more = 2, {"max_grad_norm": 0.5, "activation_checkpointing": not alone}
        settings = {**settings, **more}
    if kind == "nf4":
        settings = {"optim": "sgd", "learning_rate": 0.1, **settings}
    if kind == "ivon":
        weights = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        optimizer = IvonOptimizer(weights, lr=1e-3, sample_size=20, prior_std=0.1, h0=0.1)
        callbacks = [IvonCallback(optimizer)]
    return (AsTwo if alone else BayesTrainer)(
        model,
        task=TASK,
        args=arguments(
            folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=times * (2 if alone else 1),
            per_device_eval_batch_size=4 if alone else 2,
            max_steps=20,
            ddp_backend=None if alone else "gloo",
            **settings,
        ),
        train_rows=rows(20),
        eval_rows=rows(7),
        kl=KLSettings(cycle=4) if kind in ("blob", "narrow", "kl", "nf4", "accumulated") else None,
        prior_std=0.05 if kind == "map" else None,
        optimizer=optimizer,
        callbacks=callbacks,
    )


def scores(trainer: BayesTrainer) -> dict[str, Any]:
    """Metrics of an evaluation, and the labels in the order of its answers."""
    found = trainer.predict(trainer.eval_dataset)
    metrics = {name: found.metrics[f"test_{name}"] for name in ("loss", "nll", "accuracy")}
    return {**metrics, "labels": found.label_ids.tolist(), "logits": found.predictions.tolist()}


def main(folder: Path, kinds: Sequence[str]) -> None:
    rank = int(os.environ["RANK"])
    for kind in kinds:
        trainer = trainer_of(kind, folder, alone=False)
        trainer.train()
        save_file(trained(trainer.model), folder / f"{kind}-{rank}.safetensors")
        (folder / f"{kind}-{rank}.json").write_text(json.dumps(scores(trainer)))


def moved(folder: Path) -> None:
    """Go on from the last checkpoint in the folder, which one process may have written, and write more."""
    trainer = trainer_of("lora", folder, alone=False, save_strategy="steps", save_steps=10)
    last = last_complete(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    save_file(trained(trainer.model), folder / f"moved-{os.environ['RANK']}.safetensors")


class Watched(BayesTrainer):
    """Keeps the state of torch's generator, which dropout reads, at each forward."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.states = [*getattr(self, "states", []), torch.get_rng_state()]
        return super().training_step(*args, **kwargs)


def dropout(folder: Path) -> None:
    """Write the states of the generator, and whether the resumed run is the whole one, to dropout-RANK.json."""
    runs = []
    for name, resume in (("whole", None), ("resumed", str(folder / "whole" / "checkpoint-2"))):
        torch.manual_seed(len(name))  # whatever the process did before
        args = arguments(folder / name, max_steps=4, ddp_backend="gloo", save_strategy="steps", save_steps=2)
        trainer = Watched(lora(lora_dropout=0.5), task=TASK, args=args, train_rows=rows(20))
        trainer.train(resume_from_checkpoint=resume)
        runs.append((trainer.states, list(trained(trainer.model).values())))
    (whole, weights), (resumed, again) = runs
    same = [torch.equal(*pair) for pair in zip([*whole[2:], *weights], [*resumed, *again], strict=True)]
    found = {"states": [state.tolist() for state in whole], "same": all(same)}
    (folder / f"dropout-{os.environ['RANK']}.json").write_text(json.dumps(found))


def faulty(folder: Path, fault: str) -> None:
    """Plain LoRA with a checkpoint after every second update; the error goes to FAULT-RANK.txt."""
    rank = int(os.environ["RANK"])
    (folder / f"{rank}.pid").write_text(str(os.getpid()))
    step = BayesTrainer.training_step

    def training_step(self: BayesTrainer, *args: Any, **kwargs: Any) -> Tensor:
        if rank == 1 and fault == "killed" and self.state.global_step == 5:
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and fault == "memory":
            TASK.outputs = no_memory  # type: ignore[method-assign]
        return step(self, *args, **kwargs)

    BayesTrainer.training_step = training_step
    try:
        short = rank == 1 and fault == "rows"
        trainer = BayesTrainer(
            lora(),
            task=TASK,
            args=arguments(
                folder, max_steps=20, ddp_backend="gloo", ddp_timeout=60, save_strategy="steps", save_steps=2
            ),
            train_rows=rows(18 if short else 20),
        )
        trainer.train()
    except Exception as error:
        (folder / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        leave(3)


def no_memory(model: Any, batch: dict[str, Tensor]) -> Tensor:
    raise torch.OutOfMemoryError("on purpose")


if __name__ == "__main__":
    given = Path(sys.argv[1])
    if len(sys.argv) == 2:
        main(given, KINDS)
    elif sys.argv[2] == "moved":
        moved(given)
    elif sys.argv[2] == "nf4":
        main(given, ["nf4"])
    elif sys.argv[2] == "dropout":
        dropout(given)
    else:
        faulty(given, sys.argv[2])
    leave(0)
