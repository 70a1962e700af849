"""The checks that `BayesTrainer` makes before it starts; each error names the setting and what to do."""

import copy
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from bayestune.errors import ConfigError, DataError
from bayestune.storage.state import check_name
from bayestune.training.kl import KLSettings

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
_ORDERS = ("random", "sequential", "group_by_length")


def check_arguments(args: TrainingArguments) -> None:
    """Raise an error for an argument under which something else would be trained, or nothing could be resumed.

    Raises:
        ConfigError: an unsupported argument.
    """
    kwargs = args.activation_checkpointing_kwargs
    refused = {
        "fp16": (args.fp16, "the KL step is taken outside the loss scaler; use bf16=True"),
        "deepspeed": (args.deepspeed, "it owns the optimizer step; use DDP"),
        "fsdp": (args.fsdp, "its checkpoints are pickled; use DDP, or KLCallback on a plain Trainer"),
        "push_to_hub": (args.push_to_hub, "it uploads a pickle of the arguments; use model.push_to_hub() afterwards"),
        "bf16_full_eval": (args.bf16_full_eval, "it would leave the base model cast; use bf16=True"),
        "fp16_full_eval": (args.fp16_full_eval, "it would leave the base model cast; use bf16=True"),
        "label_smoothing_factor": (args.label_smoothing_factor, "the loss is the task's; leave it 0"),
        "auto_find_batch_size": (
            args.auto_find_batch_size,
            "it restarts from partly trained weights; set a batch size",
        ),
        "activation_checkpointing_kwargs": (
            isinstance(kwargs, dict) and kwargs.get("preserve_rng_state") is False and kwargs,
            "recomputed dropout masks would differ and gradients be wrong; leave out preserve_rng_state",
        ),
    }
    for name, (value, reason) in refused.items():
        if value:
            raise ConfigError(f"BayesTrainer does not support {name}={value!r}: {reason}.")
    if args.optim not in _OPTIMIZERS:
        raise ConfigError(f"BayesTrainer optim: found {str(args.optim)!r}, expected one of {_OPTIMIZERS}.")
    if args.train_sampling_strategy not in _ORDERS:
        raise ConfigError(
            f"BayesTrainer train_sampling_strategy: found {args.train_sampling_strategy!r}, "
            f"expected one of {_ORDERS}: other orders cannot be resumed."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"found {args.n_gpu} GPUs in one process: launch with torchrun, or show the process one GPU."
        )


def checked_arguments(args: TrainingArguments) -> TrainingArguments:
    """Return a copy of `args` as `BayesTrainer` uses it: all columns are kept, and the order of rows has a seed.

    Raises:
        ConfigError: as `check_arguments`.
    """
    check_arguments(args)
    args = copy.copy(args)
    args.remove_unused_columns = False
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    return args


def check_model(
    model: nn.Module, random: bool, gaussian: bool, kl: KLSettings | None, prior_std: float | None, train_draws: int
) -> None:
    """Raise an error for a model that cannot be trained, or settings that would have no effect on it.

    Args:
        model: the model.
        random: whether it has random layers.
        gaussian: whether it has Gaussian layers.
        kl, prior_std, train_draws: as in `BayesTrainer`.

    Raises:
        ConfigError: not a PEFT model, nothing trainable, a value out of range, or a setting without effect.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"model: found a {type(model).__name__}, expected a PEFT model: get_peft_model(base, BlobConfig(...))."
        )
    for adapter in model.peft_config:  # each becomes a folder of every checkpoint
        check_name(adapter)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("model: no parameter is trainable; load the posterior with trainable=True.")
    if train_draws < 1:
        raise ConfigError(f"train_draws: found {train_draws}, expected at least 1.")
    if (kl is not None and not gaussian) or (train_draws > 1 and not random):
        raise ConfigError(
            "kl and train_draws have no effect on a plain LoRA model: leave them out, or use BlobConfig."
        )
    if prior_std is not None and random:
        raise ConfigError("prior_std is for MAP training of plain LoRA; random adapters have BlobConfig(prior_std).")
    if prior_std is not None and not 0 < prior_std < float("inf"):
        raise ConfigError(f"prior_std: found {prior_std}, expected a number above 0.")


def check_rows(args: TrainingArguments, rows: int) -> None:
    """Raise an error if an epoch has no batch.

    Raises:
        DataError: there are no rows.
        ConfigError: `dataloader_drop_last` drops all rows.
    """
    if not rows:
        raise DataError("found no training row, expected at least one.")
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise ConfigError(
            f"dataloader_drop_last=True drops all training rows: found {rows}, expected at least one batch of "
            f"{batch}; leave it False, or take smaller batches."
        )


def check_same_settings(settings: Sequence[dict[str, Any]]) -> None:
    """Raise an error unless all processes train the same; with different rows one would wait for the others forever.

    Args:
        settings: `SafeTrainer.resume_settings` of each process, in the order of their ranks.

    Raises:
        ConfigError: a process differs from the first.
    """
    first = settings[0]
    for rank, own in enumerate(settings):
        for name in {**first, **own}:
            if own.get(name) != first.get(name):
                raise ConfigError(
                    f"process {rank} has {name}={own.get(name)!r}, process 0 has {first.get(name)!r}: expected the "
                    "same in all; give every process the same settings and the same rows, in the same order."
                )
