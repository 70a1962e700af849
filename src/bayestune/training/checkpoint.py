"""`SafeTrainer`: transformers' Trainer with complete, exact checkpoints that are safetensors and JSON.

In addition to PEFT's adapter folder(s) and the Trainer's own `trainer_state.json`, a checkpoint folder holds:

========================  ==================================================================
optimizer.safetensors     tensors of the optimizer's state, named "<parameter number>.<name>"
training.json             settings that the run depends on, parameter groups, scheduler
rng_<rank>.safetensors    states of torch (CPU and CUDA) and numpy generators
rng_<rank>.json           the rest of numpy's state, and Python's
checkpoint.json           size and sha256 of each of these files
========================  ==================================================================
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from bayestune.errors import TrainingError
from bayestune.functional import derive_seed
from bayestune.training import checkpoint_files, checkpoint_state
from bayestune.training.checkpoint_files import ADAPTER, STATE, UNFINISHED
from bayestune.training.sharding import gather, gather_optimizer, scatter, to_shard


class SafeTrainer(Trainer):
    """`transformers.Trainer` for adapters whose checkpoints appear whole or not at all and contain no pickle.

    It overrides private methods of the Trainer; the bound on transformers in pyproject.toml follows from that.

    Raises:
        ConfigError: on saving, if another process is saving a checkpoint in the same folder.
        TrainingError: on resuming, if a file is missing, altered, or was written with other settings.
        PosteriorError: on resuming, if the adapter weights do not fit the model.
    """

    _saves_to: Path | None = None
    # If the Trainer's model is sharded, the model to gather its adapters into, and an optimizer that was given.
    _ordinary: PeftModel | None = None
    _given: Optimizer | None = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Like `Trainer.train`, but each process has its own dropout masks."""
        rank = self.args.process_index
        if rank:
            torch.manual_seed(derive_seed("masks", self.args.seed, rank))
        output = super().train(*args, **kwargs)
        self._gather()
        if self._ordinary is not None and self._given is not None:
            gather_optimizer(self._given, self._trained(), self._ordinary)
        return output

    def resume_settings(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the interrupted one, as JSON values."""
        args = self.args
        return {
            "seed": args.seed,
            "data_seed": args.data_seed,
            "order": args.train_sampling_strategy,
            "processes": args.world_size,
            "batch_size": args.per_device_train_batch_size,
            "gradient_accumulation_steps": args.gradient_accumulation_steps,
            "learning_rate": args.learning_rate,
            "lr_scheduler_type": str(args.lr_scheduler_type),
            "warmup_steps": args.warmup_steps,
            "weight_decay": args.weight_decay,
            "max_grad_norm": args.max_grad_norm,
            "bf16": args.bf16,
        }

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder of the checkpoints or, during a save, the folder where the next one is written."""
        return super()._get_output_dir(trial) if self._saves_to is None else str(self._saves_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Like `Trainer._save_checkpoint`, but in a folder that is renamed when all of it is written."""
        run = Path(self._get_output_dir(trial))
        name, writes = f"checkpoint-{self.state.global_step}", self.args.should_save
        with checkpoint_files.unfinished(run) if writes else contextlib.nullcontext():
            self.accelerator.wait_for_everyone()
            self._saves_to = run / UNFINISHED
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._saves_to = None
            written = run / UNFINISHED / name
            is_best = self.state.best_model_checkpoint == str(written)
            if is_best:
                self.state.best_model_checkpoint = str(run / name)
            self.accelerator.wait_for_everyone()
            if writes:
                if is_best:
                    self.state.save_to_json(str(written / STATE))
                checkpoint_files.seal(written)
                checkpoint_files.publish(written, run)
                best = self.state.best_model_checkpoint
                keep = {run / name} | ({Path(best)} if best else set())
                checkpoint_files.rotate(run, self.args.save_total_limit, keep)
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **settings: Any) -> None:
        """Like `Trainer._run_epoch`, which would make one more update in a run resumed after its last."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**settings)
        else:
            self.control.should_training_stop = True

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Like `Trainer.save_model`, but only the adapter, and without the pickled arguments."""
        self._gather()
        if self.args.should_save:
            # PEFT would ask the network whether the base has other embeddings; they are never adapted here.
            self._adapters().save_pretrained(output_dir or str(self.args.output_dir), save_embedding_layers=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer, scheduler, settings = self._optimization()
        state = checkpoint_state.whole_state(optimizer)
        if self.args.should_save:
            checkpoint_state.save_optimizer(Path(output_dir), state, scheduler, settings)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            checkpoint_state.load_optimizer(Path(checkpoint), *self._optimization())

    def _optimization(self) -> tuple[Optimizer, LRScheduler, dict[str, Any]]:
        assert isinstance(self.optimizer, Optimizer) and isinstance(self.lr_scheduler, LRScheduler)
        return self.optimizer, self.lr_scheduler, {**self.resume_settings(), "step": self.state.global_step}

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        checkpoint_state.save_random_state(Path(output_dir) / f"rng_{self.args.process_index}", self.args.device)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        stem = Path(checkpoint or "") / f"rng_{self.args.process_index}"
        if checkpoint is not None and stem.with_suffix(".json").is_file():  # else the process is a new one
            checkpoint_state.load_random_state(stem, self.args.device)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Load nothing: there is no loss scaler without fp16, and a file of that name would be a pickle."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Check all of the checkpoint, then load its adapters; the Trainer calls this before it loads the rest."""
        checkpoint = Path(resume_from_checkpoint)
        names = checkpoint_files.check_checkpoint(checkpoint)
        adapters = self._adapters()
        for adapter in adapters.active_adapters:
            folder = checkpoint if adapter == "default" else checkpoint / adapter
            if (folder / ADAPTER).relative_to(checkpoint).as_posix() not in names:
                raise TrainingError(f"{checkpoint} cannot be resumed: it holds no adapter {adapter!r}.")
            checkpoint_state.load_adapter(adapters, adapter, folder)
        if self._ordinary is not None:
            scatter(self._ordinary, self._trained())

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _to_shard(self, model: PeftModel, optimizer: Optimizer | None) -> PeftModel:
        """Return the copy of `model` to shard; an optimizer given for `model` trains the copy."""
        self._ordinary, self._given = model, optimizer
        if optimizer is not None:
            optimizer.state.clear()  # accelerate replaces its parameters with sharded ones
        return to_shard(model)

    def _start(self) -> dict[str, float]:
        """Return the sum of the first weights, which FSDP takes from every process; DDP copies those of process 0."""
        if self._ordinary is None:
            return {}
        trained = (p for p in self._ordinary.parameters() if p.requires_grad)
        return {"first_weights": math.fsum(parameter.double().sum().item() for parameter in trained)}

    def _gather(self) -> None:
        """Bring the adapters of the ordinary model up to date; every process must call this."""
        if self._ordinary is not None:
            gather(self._trained(), self._ordinary)

    def _adapters(self) -> PeftModel:
        return self._trained() if self._ordinary is None else self._ordinary

    def _trained(self) -> PeftModel:
        assert isinstance(self.model, PeftModel)
        return self.model
