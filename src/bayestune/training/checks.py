"""The checks that `BayesTrainer` makes before it starts; each error names the setting and what to do."""

import copy
from collections.abc import Sequence
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from bayestune.errors import ConfigError, DataError
from bayestune.storage.fingerprint import base_parameters
from bayestune.storage.state import check_name
from bayestune.training.kl import KLSettings
from bayestune.training.sharding import asked

_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "sgd")
_ORDERS = ("random", "sequential", "group_by_length")
_UNSUPPORTED = {
    "fp16": "the KL step is taken outside the loss scaler; use bf16=True",
    "deepspeed": "it owns the optimizer step; shard with FSDP2 (fsdp=True) instead",
    "push_to_hub": "it uploads a pickle of the arguments; use model.push_to_hub() afterwards",
    "bf16_full_eval": "it would leave the base model cast; use bf16=True",
    "fp16_full_eval": "it would leave the base model cast; use bf16=True",
    "label_smoothing_factor": "the loss is the task's; leave it 0",
    "auto_find_batch_size": "it restarts from partly trained weights; set a batch size",
}


def check_arguments(args: TrainingArguments) -> None:
    """Raise a `ConfigError` for an argument that would train something else, or a run that cannot be resumed."""
    for name, reason in _UNSUPPORTED.items():
        if getattr(args, name):
            raise ConfigError(f"BayesTrainer does not support {name}={getattr(args, name)!r}: {reason}.")
    kwargs = args.activation_checkpointing_kwargs
    if isinstance(kwargs, dict) and kwargs.get("preserve_rng_state") is False:
        raise ConfigError(
            "BayesTrainer does not support activation_checkpointing_kwargs with preserve_rng_state=False: recomputed "
            "dropout masks would differ and gradients be wrong; leave out preserve_rng_state."
        )
    if args.optim not in _OPTIMIZERS:
        raise ConfigError(f"BayesTrainer optim: found {str(args.optim)!r}, expected one of {_OPTIMIZERS}.")
    if args.train_sampling_strategy not in _ORDERS:
        raise ConfigError(
            f"BayesTrainer train_sampling_strategy: found {args.train_sampling_strategy!r}, "
            f"expected one of {_ORDERS}: other orders cannot be resumed."
        )
    asked(args)
    if args.n_gpu > 1:
        raise ConfigError(
            f"found {args.n_gpu} GPUs in one process: launch with torchrun, or show the process one GPU."
        )


def checked_arguments(args: TrainingArguments) -> TrainingArguments:
    """Return a checked copy of `args` in which all columns are kept, and the order of rows has a seed."""
    check_arguments(args)
    args = copy.copy(args)
    args.remove_unused_columns = False
    args.data_seed = args.seed if args.data_seed is None else args.data_seed
    return args


def check_model(
    model: nn.Module, random: bool, gaussian: bool, kl: KLSettings | None, prior_std: float | None, train_draws: int
) -> None:
    """Raise a `ConfigError` for a model that cannot be trained, or settings that would have no effect on it.

    Args:
        model: the model.
        random: whether it has random layers.
        gaussian: whether it has Gaussian layers.
        kl, prior_std, train_draws: as in `BayesTrainer`.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"model: found a {type(model).__name__}, expected a PEFT model: get_peft_model(base, BlobConfig(...))."
        )
    for adapter in model.peft_config:  # each becomes a folder of every checkpoint
        check_name(adapter)
    check_new_layers(model)
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


def check_new_layers(model: PeftModel) -> None:
    """Raise a `ConfigError` if the base has layers with random first weights that the adapter does not save.

    `from_pretrained` marks the parameters that it loads. Resized embeddings have no mark and are not checked.
    """
    base = model.get_base_model()
    embeddings = (
        (base.get_input_embeddings(), base.get_output_embeddings()) if isinstance(base, PreTrainedModel) else ()
    )
    resized = {id(parameter) for module in embeddings if module is not None for parameter in module.parameters()}
    marks: dict[str, bool] = {}
    for name, parameter in base_parameters(base, adapters=model.active_adapters):
        plain = type(parameter) is nn.Parameter and type(parameter.data) is Tensor and parameter.is_floating_point()
        if plain and id(parameter) not in resized:
            marks[name] = getattr(parameter, "_is_hf_initialized", False)
    new = sorted({name.rpartition(".")[0] for name, loaded in marks.items() if not loaded})
    if new and any(marks.values()):
        raise ConfigError(
            f"model: its checkpoint has no weights for the new layers {', '.join(new)}, expected the adapter to train "
            f"and save them: give its config modules_to_save={new}, or load a base that has them."
        )


def check_rows(args: TrainingArguments, rows: int) -> None:
    """Raise an error if an epoch has no batch: there are no rows, or `dataloader_drop_last` drops all of them."""
    if not rows:
        raise DataError("found no training row, expected at least one.")
    batch = args.train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < batch:
        raise ConfigError(
            f"dataloader_drop_last=True drops all training rows: found {rows}, expected at least one batch of "
            f"{batch}; leave it False, or take smaller batches."
        )


def check_plugins(*, deepspeed: bool) -> None:
    """Raise a `ConfigError` if accelerate enabled DeepSpeed."""
    if deepspeed:
        raise ConfigError("accelerate's configuration asks for DeepSpeed, which owns the optimizer step: use FSDP2.")


def check_eval_rows(rows: object) -> None:
    """Raise a `ConfigError` if there is nothing to evaluate on."""
    if rows is None:
        raise ConfigError(
            "eval_rows: found None, expected rows to evaluate on: give them to BayesTrainer(eval_rows=...)."
        )


def check_same_settings(settings: Sequence[dict[str, Any]]) -> None:
    """Raise a `ConfigError` unless all processes have the same settings; otherwise one could wait forever.

    Args:
        settings: `SafeTrainer.resume_settings` of each process, in the order of their ranks.
    """
    first = settings[0]
    for rank, own in enumerate(settings):
        for name in {**first, **own}:
            if own.get(name) != first.get(name):
                raise ConfigError(
                    f"process {rank} has {name}={own.get(name)!r}, process 0 has {first.get(name)!r}: expected the "
                    "same in all; give every process the same settings and the same rows, in the same order."
                )
