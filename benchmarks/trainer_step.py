"""Time updates of `BayesTrainer` against those of transformers' Trainer with plain LoRA, in whole training runs.

    python benchmarks/trainer_step.py [--shape llama-4x128] [--device cpu] [--json FILE]

Four training runs share one process as threads and take turns after every update, so that one computes at a time:
"lora", transformers' Trainer on plain LoRA; "bayes_lora", `BayesTrainer` on plain LoRA; "blob", `BayesTrainer` on
BLoB; "lora_again", the same as "lora". The time of an update includes everything between two updates: batch, forward,
backward, clipping, AdamW, noise, KL, checks. "ratio" is the median over rounds of the time of "blob" divided by that
of "lora", "checks_ratio" the same for "bayes_lora", and "control_ratio" for "lora_again"; its distance from 1 is
noise. `train_step.py` measures the same without a trainer.
"""

import argparse
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from options import add_machine, parser, publish
from pairs import ratio, spread
from shapes import Answers, Shape
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from bayestune.training import BayesTrainer

WAYS = ("lora", "bayes_lora", "blob", "lora_again")


class PlainTrainer(Trainer):
    """transformers' Trainer with the loss of the task."""

    def __init__(self, task: Answers, **settings: Any) -> None:
        super().__init__(**settings)
        self.task = task

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        return self.task.loss(model, inputs).mean()


class Turns:
    """Keeps the order in which the variants take turns, and the seconds of each update."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.waiting, self.seconds = list(names), {name: [] for name in names}
        self._changed = threading.Condition()

    def take(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.waiting[0] == name)

    def pass_on(self) -> None:
        with self._changed:
            self.waiting.append(self.waiting.pop(0))
            self._changed.notify_all()

    def trained(self, name: str, trainer: Trainer) -> None:
        """Train; at the end or on an error, let the other variants go on."""
        try:
            trainer.train()
        finally:
            with self._changed:
                self.waiting.remove(name)
                self._changed.notify_all()


class InTurn(TrainerCallback):
    """Take the turn before the first update and pass it on after each."""

    def __init__(self, name: str, turns: Turns, device: str) -> None:
        self.name, self.turns, self.device, self.start = name, turns, device, 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.turns.take(self.name)
        self.start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)
        self.turns.seconds[self.name].append(time.perf_counter() - self.start)
        self.turns.pass_on()
        self.turns.take(self.name)
        self.start = time.perf_counter()


def main() -> None:
    made = parser(__doc__, pairs=40)
    add_machine(made, shape="llama-4x128", gpu_shape="llama7b-4x300", warmup=5)
    options = made.parse_args()
    shape = Shape.of(options.shape or ("llama7b-4x300" if options.device.startswith("cuda") else "llama-4x128"))
    logging.set_verbosity_error()
    turns = Turns(WAYS)
    with tempfile.TemporaryDirectory() as folder:
        trainers = [trainer_of(way, shape, turns, Path(folder) / way, options) for way in WAYS]
        with ThreadPoolExecutor(len(WAYS)) as pool:
            running = [pool.submit(turns.trained, way, trainer) for way, trainer in zip(WAYS, trainers, strict=True)]
        for one in running:
            one.result()
    times = {way: found[options.warmup :] for way, found in turns.seconds.items()}
    found = {
        "ratio": ratio(times["blob"], times["lora"]),
        "checks_ratio": ratio(times["bayes_lora"], times["lora"]),
        "control_ratio": ratio(times["lora_again"], times["lora"]),
        "pairs": options.pairs,
        "shape": shape.name,
        "quartiles": spread(times["blob"], times["lora"]),
        "milliseconds": {way: 1000 * torch.tensor(t).median().item() for way, t in times.items()},
    }
    publish(found, options, device=options.device)


def trainer_of(way: str, shape: Shape, turns: Turns, output: Path, options: argparse.Namespace) -> Trainer:
    task = Answers(shape)
    args = TrainingArguments(
        output_dir=str(output),
        max_steps=options.warmup + options.pairs,
        per_device_train_batch_size=shape.rows,
        learning_rate=1e-4,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not options.device.startswith("cuda"),
        remove_unused_columns=False,
    )
    model = shape.adapted(options.device, bayesian=way == "blob").train()
    rows, callbacks = task.train_rows(16 * shape.rows), [InTurn(way, turns, options.device)]
    if not way.startswith("lora"):
        return BayesTrainer(model, task=task, args=args, train_rows=rows, callbacks=callbacks)
    examples = [task.example(row) for row in rows]
    return PlainTrainer(
        task, model=model, args=args, train_dataset=examples, data_collator=task.collate, callbacks=callbacks
    )


if __name__ == "__main__":
    main()
