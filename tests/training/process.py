"""One of several training processes: trains a toy and writes what it then holds. Started by test_processes.py.

    process.py KIND ROWS FOLDER

KIND is "lora"; "blob"; or "kl", BLoB with B frozen at 0, so that only the KL moves M and G. ROWS are those of a batch
of one process.
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bayestune.experiment.processes import leave
from bayestune.training import BayesTrainer, KLSettings
from training.toys import TASK, arguments, double_blob, lora, rows, trained


def main(kind: str, batch: str, folder: str) -> None:
    model = lora() if kind == "lora" else double_blob()
    if kind == "kl":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.zero_().requires_grad_(False)
    rank = int(os.environ.get("RANK", "0"))
    if rank == 0:
        save_file(trained(model), Path(folder) / "start.safetensors")
    trainer = BayesTrainer(
        model,
        task=TASK,
        args=arguments(Path(folder), per_device_train_batch_size=int(batch), max_steps=12, ddp_backend="gloo"),
        train_rows=rows(20),
        kl=None if kind == "lora" else KLSettings(cycle=4),
    )
    trainer.train()
    save_file(trained(model), Path(folder) / f"rank{rank}.safetensors")
    leave(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
