"""A run, and the same run resumed from each of its checkpoints, in one process or several: started by test_resume.py.

    resuming.py FOLDER WORKERS

Prints nothing; writes to FOLDER/<rank>.json which parts of each resumed run are bit for bit those of the whole run.
"""

import hashlib
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from bayestune.experiment.processes import leave
from bayestune.training import BayesTrainer, KLSettings
from training.toys import TASK, arguments, double_blob, rows

STEPS = 40  # 3 updates an epoch, 7 a cycle of the KL, an evaluation every 10
POINTS = {"first": 1, "epoch edge": 6, "mid-epoch": 8, "after an evaluation": 10, "mid KL cycle": 18, "last": STEPS}


class SaveAt(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in POINTS.values()


def run(output: Path, workers: int, resume: Path | None = None) -> BayesTrainer:
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = arguments(
        output, max_steps=STEPS, gradient_accumulation_steps=2 // processes, warmup_steps=4, eval_strategy="steps",
        eval_steps=10, dataloader_num_workers=workers, ddp_backend="gloo" if processes > 1 else None,
    )  # fmt: skip
    trainer = BayesTrainer(
        double_blob(layers=1, lora_dropout=0.3, estimator="flipout"),
        task=TASK,
        args=args,
        train_rows=rows(12),
        eval_rows=rows(3),
        kl=KLSettings(cycle=7),
        train_draws=2,
        callbacks=[SaveAt()],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


def parts(trainer: BayesTrainer, output: Path, rank: int) -> dict[str, Any]:
    """What must be the same: weights, optimiser and losses of the trainer, and the files of the last checkpoint."""
    digest = hashlib.sha256()
    for tensor in trainer.model.state_dict().values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    moments = hashlib.sha256()
    for _, state in sorted(trainer.optimizer.state_dict()["state"].items()):
        for _, tensor in sorted(state.items()):
            moments.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == STEPS
    last, files = output / f"checkpoint-{STEPS}", {}
    for name in ("adapter_model.safetensors", "optimizer.safetensors", "training.json", f"rng_{rank}.safetensors",
                 f"rng_{rank}.json"):  # fmt: skip
        files[name] = hashlib.sha256((last / name).read_bytes()).hexdigest() if last.is_dir() else None
    return {"weights": digest.hexdigest(), "optimiser": moments.hexdigest(), "losses": logged, **files}


def main(folder: str, workers: str) -> None:
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    root, rank = Path(folder), int(os.environ.get("RANK", "0"))
    whole = parts(run(root / "whole", int(workers)), root / "whole", rank)
    found = {}
    for name, step in POINTS.items():
        torch.manual_seed(step)  # whatever the process did before
        output = root / name.replace(" ", "-")
        resumed = parts(run(output, int(workers), root / "whole" / f"checkpoint-{step}"), output, rank)
        found[name] = [part for part, value in resumed.items() if value != whole[part] and value is not None]
        assert (resumed["training.json"] is None) == (name == "last")
    (root / f"{rank}.json").write_text(json.dumps(found))
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
