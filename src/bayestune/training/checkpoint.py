"""Checkpoints of the Trainer as safetensors and JSON only: no pickle is ever written or opened.

A checkpoint folder holds, beside PEFT's adapter folder(s) and the Trainer's own `trainer_state.json`:

========================  ==================================================================
optimizer.safetensors     tensors of the optimiser's state, named "<parameter number>.<name>"
training.json             settings that the run depends on, parameter groups, scheduler
rng_<rank>.safetensors    states of torch (CPU and CUDA) and numpy generators
rng_<rank>.json           the rest of numpy's state, and Python's
checkpoint.json           size and sha256 of each of these files
========================  ==================================================================

JSON keeps the floats exactly, so a resumed run repeats the uninterrupted one bit for bit. How the folder comes to be
there whole, or not at all, is the business of `checkpoint_files`.
"""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer

from bayestune.errors import ConfigError, PosteriorError, TrainingError
from bayestune.training.checkpoint_files import (
    ADAPTER,
    FORMAT,
    OPTIMIZER,
    STATE,
    TRAINING,
    UNFINISHED,
    check_checkpoint,
    publish,
    rotate,
    seal,
    unfinished,
)


class SafeTrainer(Trainer):
    """`transformers.Trainer` for adapters, with every pickle of its checkpoints replaced, and each written whole.

    Raises:
        ConfigError: on saving, another process is saving a checkpoint in the same folder.
        TrainingError: on resuming, a file is missing, altered, or was written under other settings than those of
            this run.
        PosteriorError: on resuming, the adapter weights do not fit the model.
    """

    _saves_to: Path | None = None

    def resume_settings(self) -> dict[str, Any]:
        """Settings that a resumed run must share with the uninterrupted one to repeat it; JSON values."""
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
        """The folder of the checkpoints, or the one where the next of them is being written."""
        return super()._get_output_dir(trial) if self._saves_to is None else str(self._saves_to)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Trainer's, in a folder of another name that takes its own when all is written; then the oldest go."""
        run = Path(self._get_output_dir(trial))
        name, writes = f"checkpoint-{self.state.global_step}", self.args.should_save
        with unfinished(run) if writes else contextlib.nullcontext():
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
                seal(written)
                publish(written, run)
                best = self.state.best_model_checkpoint
                rotate(run, self.args.save_total_limit, {run / name} | ({Path(best)} if best else set()))
        self.accelerator.wait_for_everyone()

    def _run_epoch(self, **settings: Any) -> None:
        """Trainer's, which would make one update more where a run is resumed after its last one."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**settings)
        else:
            self.control.should_training_stop = True

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self.args.should_save:
            # PEFT would ask the network whether the base has other embeddings; they are never adapted here.
            folder = output_dir or self.args.output_dir
            assert folder is not None
            _adapter_model(self.model).save_pretrained(folder, save_embedding_layers=False)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.args.should_save:
            return
        optimizer, scheduler = self._stateful()
        state = optimizer.state_dict()
        tensors, rest = _split(state["state"])
        save_file(tensors, Path(output_dir) / OPTIMIZER)
        _write_json(
            Path(output_dir) / TRAINING,
            {
                "format": FORMAT,
                "settings": {**self.resume_settings(), "step": self.state.global_step},
                "optimizer": {"param_groups": state["param_groups"], "state": rest},
                "scheduler": scheduler.state_dict(),
            },
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        saved = _read_json(Path(checkpoint) / TRAINING)
        for name, value in {**self.resume_settings(), "step": self.state.global_step}.items():
            if saved["settings"].get(name) != value:
                raise TrainingError(
                    f"{checkpoint} was written with {name}={saved['settings'].get(name)!r}, this run has {value!r}: "
                    "it could not continue the same run. Use the same setting, or start anew from its adapter."
                )
        tensors = load_file(_existing(Path(checkpoint) / OPTIMIZER))
        state: dict[int, dict[str, Any]] = {int(key): value for key, value in saved["optimizer"]["state"].items()}
        for key, tensor in tensors.items():
            number, name = key.split(".", 1)
            state.setdefault(int(number), {})[name] = tensor
        optimizer, scheduler = self._stateful()
        optimizer.load_state_dict({"state": state, "param_groups": saved["optimizer"]["param_groups"]})
        scheduler.load_state_dict(saved["scheduler"])

    def _stateful(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        assert isinstance(self.optimizer, torch.optim.Optimizer)
        assert isinstance(self.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
        return self.optimizer, self.lr_scheduler

    def _save_rng_state(self, output_dir: str) -> None:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_random_state(Path(output_dir) / f"rng_{self.args.process_index}", self.args.device)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            load_random_state(Path(checkpoint) / f"rng_{self.args.process_index}", self.args.device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Trainer's first look at a checkpoint: all of it is checked here, before any of it is used."""
        checkpoint = Path(resume_from_checkpoint)
        names = check_checkpoint(checkpoint)
        adapter_model = _adapter_model(self.model if model is None else model)
        for adapter in adapter_model.active_adapters:
            folder = checkpoint if adapter == "default" else checkpoint / adapter
            if (folder / ADAPTER).relative_to(checkpoint).as_posix() not in names:
                raise TrainingError(f"{checkpoint} cannot be resumed: it holds no adapter {adapter!r}.")
            load_adapter(adapter_model, adapter, folder)

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self._load_from_checkpoint(self.state.best_model_checkpoint)


def load_adapter(model: PeftModel, adapter: str, folder: Path) -> None:
    """Put the weights of `folder` into `adapter` of `model`: exactly the same tensors and shapes, or none.

    Raises:
        TrainingError: the folder has no `adapter_model.safetensors`.
        PosteriorError: a tensor is missing, superfluous, or of another shape.
    """
    loaded = load_file(_existing(folder / ADAPTER))
    expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    for name in sorted(loaded.keys() | expected.keys()):
        found = tuple(loaded[name].shape) if name in loaded else "nothing"
        wanted = tuple(expected[name].shape) if name in expected else "nothing"
        if found != wanted:
            raise PosteriorError(f"{folder / ADAPTER}, tensor {name}: found {found}, expected {wanted}.")
    set_peft_model_state_dict(model, loaded, adapter_name=adapter)


def save_random_state(stem: Path, device: torch.device) -> None:
    """Write the states of Python's, numpy's and torch's global generators to `stem`.safetensors and `stem`.json."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if device.type == "cuda":
        tensors["cuda"] = torch.cuda.get_rng_state(device)
    save_file(tensors, stem.with_name(stem.name + ".safetensors"))
    numpy_rest = [name, int(position), int(has_gauss), float(cached)]
    _write_json(stem.with_name(stem.name + ".json"), {"numpy": numpy_rest, "python": random.getstate()})


def load_random_state(stem: Path, device: torch.device) -> None:
    """Undo `save_random_state`.

    Raises:
        TrainingError: a file is missing, as after a run with another number of processes.
    """
    tensors = load_file(_existing(stem.with_name(stem.name + ".safetensors")))
    rest = _read_json(stem.with_name(stem.name + ".json"))
    version, internal, gauss = rest["python"]
    random.setstate((version, tuple(internal), gauss))
    name, position, has_gauss, cached = rest["numpy"]
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(tensors["cuda"], device)


def _adapter_model(model: nn.Module | None) -> PeftModel:
    assert isinstance(model, PeftModel)
    return model


def _split(state: dict[int, dict[str, Any]]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """An optimiser's state as tensors named "<number>.<name>" and the values that are none."""
    tensors: dict[str, Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for number, values in state.items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value.contiguous()
            else:
                rest.setdefault(str(number), {})[name] = value
    return tensors, rest


def _write_json(path: Path, content: dict[str, Any]) -> None:
    try:
        text = json.dumps(content)
    except TypeError as error:
        raise ConfigError(
            f"{path.name} cannot hold the state of this optimiser or learning-rate scheduler ({error}): "
            "use adamw_torch and a scheduler with plain numbers."
        ) from error
    path.write_text(text, encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(_existing(path).read_text(encoding="utf-8"))


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise TrainingError(
            f"{path.parent} cannot be resumed: found no {path.name}. Expected a complete checkpoint of this trainer; "
            "pickled files are not read. Choose another checkpoint."
        )
    return path
