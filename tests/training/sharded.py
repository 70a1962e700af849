"""One of several processes that train on shards, by FSDP2. Started by test_sharded.py.

    sharded.py train FOLDER KIND ...     trains every KIND of process.py
    sharded.py run FOLDER NAME [UPDATE]  goes on from the last checkpoint; process 1 is killed at UPDATE
    sharded.py bayestune ...             a command

The last two shard if the environment says so.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from bayestune.errors import ConfigError
from bayestune.experiment.processes import leave
from bayestune.training import BayesTrainer, KLSettings, last_complete, sharding
from bayestune.training.finite import first_nonfinite
from bayestune.training.sharding import local
from bayestune_cli.app import invoke
from training.process import scores, trainer_of
from training.toys import TASK, arguments, double_blob, rows, trained

EVALUATED = {"eval_strategy": "steps", "eval_steps": 7, "fsdp_config": {"auto_wrap_policy": "NO_WRAP"}}
"""The last evaluation gathers all weights, which the next draw changes."""


def on_a_cpu() -> None:
    """Shard on a CPU, which PyTorch can do but accelerate does not offer: it is told what it decides for GPUs."""
    sharding.UNSHARDED = ()
    create = BayesTrainer.create_accelerator_and_postprocess

    def create_accelerator_and_postprocess(self: BayesTrainer) -> None:
        create(self)
        if self._ordinary is None:
            return
        plugin = FullyShardedDataParallelPlugin(**(self.args.fsdp_plugin_args or {}))
        state = self.accelerator.state
        state.distributed_type, state.fsdp_plugin, self.is_fsdp_enabled = DistributedType.FSDP, plugin, True

    BayesTrainer.create_accelerator_and_postprocess = create_accelerator_and_postprocess


def held(trainer: BayesTrainer) -> dict[str, list[int]]:
    """Entries of each weight, and of its states in the optimizer: those of this process, and all."""
    found: dict[str, Tensor] = dict(trainer.model.named_parameters())
    names = {id(parameter): name for name, parameter in found.items()}
    for parameter, state in trainer.optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dim():
                found[f"{names[id(parameter)]} {key}"] = value
    return {name: [local(tensor).numel(), tensor.numel()] for name, tensor in found.items()}


def logged(trainer: BayesTrainer) -> dict[str, float]:
    """What was logged at the last update."""
    last = [entry for entry in trainer.state.log_history if "loss" in entry][-1]
    return {name: last[name] for name in ("loss", "grad_norm", "kl", "std") if name in last}


def faults() -> dict[str, Any]:
    """What is said of gradients with a NaN or an infinity in one shard only, and of weights that are not the same."""
    rank, mesh = int(os.environ["RANK"]), init_device_mesh("cpu", (2,))
    said = {}
    for bad in (math.nan, math.inf):
        for where in (0, 1):
            part = torch.full((3,), bad if rank == where else 1.0)
            tensors = {"good": torch.ones(2), "bad": DTensor.from_local(part, mesh, [Shard(0)])}
            said[f"{bad} in {where}"] = first_nonfinite(tensors)
    try:
        args = arguments(Path("none"), fsdp=True)
        BayesTrainer(double_blob(seed=rank), task=TASK, args=args, train_rows=rows(4), kl=KLSettings(cycle=4))
    except ConfigError as error:
        said["weights"] = str(error)
    return said


def train(folder: Path, *kinds: str) -> None:
    """With BLoB, also write what each process holds at its end, and the `faults`."""
    rank = int(os.environ["RANK"])
    for kind in kinds:
        trainer = trainer_of(kind, folder, alone=False, fsdp=True, **(EVALUATED if kind == "ivon" else {}))
        model = trainer._adapters()
        trainer.train()
        save_file(trained(model), folder / f"{kind}-{rank}.safetensors")
        (folder / f"{kind}-{rank}.json").write_text(json.dumps({**scores(trainer), "log": logged(trainer)}))
        if kind == "blob":
            (folder / f"held-{rank}.json").write_text(json.dumps(held(trainer)))
            (folder / f"faults-{rank}.json").write_text(json.dumps(faults()))


class Killed(BayesTrainer):
    """Process 1 is killed at update `at`."""

    at = -1

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.args.process_index == 1 and self.state.global_step == self.at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)


def run(folder: Path, name: str, at: str = "-1") -> None:
    """BLoB with dropout and an evaluation before each checkpoint."""
    torch.manual_seed(len(os.listdir(folder)))  # whatever the process did before
    Killed.at = int(at)
    every = {"max_steps": 6, "save_steps": 2, "eval_steps": 2, "save_strategy": "steps", "eval_strategy": "steps"}
    trainer = Killed(
        double_blob(lora_dropout=0.5),
        task=TASK,
        args=arguments(folder / name, ddp_backend="gloo", **every),
        train_rows=rows(20),
        eval_rows=rows(7),
        kl=KLSettings(cycle=4),
    )
    last = last_complete(folder / name)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    save_file(trained(trainer._adapters()), folder / f"{name}-{trainer.args.process_index}.safetensors")


if __name__ == "__main__":
    on_a_cpu()
    if sys.argv[1] == "bayestune":
        leave(invoke(sys.argv[2:]))
    {"train": train, "run": run}[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])
    leave(0)
