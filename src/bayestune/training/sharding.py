"""Training on shards (FSDP2): each process holds a part of every weight, gradient and state of the optimizer.

accelerate shards a model in place, which cannot be undone. `BayesTrainer` therefore trains a copy of the modules,
whose weights share the model's memory until they are sharded. After training, and for every checkpoint, the trained
weights are gathered into the model, which stays on the device where it was loaded.
"""

import copy
import gc
import os
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import DistributedType, parse_flag_from_env
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.optim import Optimizer
from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.storage.state import adapter_tensors

UNSHARDED = (DistributedType.MULTI_CPU,)
"""Kinds of processes for which accelerate ignores FSDP and trains by DDP."""


def asked(args: TrainingArguments) -> bool:
    """Return whether `args`, or the environment that `accelerate launch` sets, asks for FSDP.

    Raises:
        ConfigError: FSDP1 is asked for, there is only one process or no GPU, or a setting would make gradients wrong.
    """
    given = args.fsdp_plugin_args
    if given is None and not asked_by_launcher():
        return False
    version = os.environ.get("FSDP_VERSION", "1") if given is None else given["fsdp_version"]
    if int(version) != 2:
        raise ConfigError(
            f"FSDP: found version {version}, expected 2: set fsdp_version 2 (accelerate launch --fsdp_version 2, or "
            'fsdp_config={"version": 2}).'
        )
    if args.parallel_mode != ParallelMode.DISTRIBUTED:
        raise ConfigError("FSDP: found one process, expected several: start them with accelerate launch or torchrun.")
    if args.distributed_state is not None and args.distributed_state.distributed_type in UNSHARDED:
        raise ConfigError(
            "FSDP: found processes on a CPU, expected GPUs: accelerate does not shard on a CPU, and would train by "
            "DDP without saying so. Start on GPUs, or leave FSDP out."
        )
    if (given or {}).get("activation_checkpointing", parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING")):
        raise ConfigError(
            "FSDP's activation_checkpointing does not repeat dropout masks, so gradients would be wrong: leave it "
            "out, and give TrainingArguments(activation_checkpointing=True)."
        )
    return True


def asked_by_launcher() -> bool:
    """Return whether `accelerate launch` was told to use FSDP."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP"))


def to_shard(model: PeftModel) -> PeftModel:
    """Return a copy of the modules of `model` that can be sharded; its parameters share the memory of the model's.

    Raises:
        ConfigError: the base is quantized.
    """
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point() or type(parameter) is not nn.Parameter:
            raise ConfigError(
                f"FSDP: found {name} quantized ({type(parameter).__name__}, {parameter.dtype}), expected weights in "
                "bfloat16 or float32, which can be sharded: load the base without quantization, or use DDP."
            )
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def local(tensor: Tensor) -> Tensor:
    """Return the part of `tensor` that this process holds, sharing its memory; all of it unless it is sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of `tensor`; if it is sharded, every process must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, other: Tensor) -> Tensor:
    """Return `tensor`, which all processes have, sharded like `other`, without communication."""
    if not isinstance(other, DTensor):
        return tensor
    return distribute_tensor(tensor.to(other.device), other.device_mesh, other.placements, src_data_rank=None)


def total(value: float, tensors: Iterable[Tensor]) -> float:
    """Return the sum of `value` over the processes that hold parts of `tensors`; every process must call this."""
    sharded = next((tensor for tensor in tensors if isinstance(tensor, DTensor)), None)
    if sharded is None:
        return value
    parts = [Partial() if placement.is_shard() else placement for placement in sharded.placements]
    own = torch.tensor(value, dtype=torch.float64, device=sharded.device)
    return DTensor.from_local(own, sharded.device_mesh, parts).full_tensor().item()


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move a whole model to a device; if there is not enough memory, leave it where it is, with a warning."""
    gc.collect()  # a trainer refers to itself
    if device.type == "cuda":
        torch.cuda.empty_cache()
    needed = sum(parameter.nbytes for parameter in model.parameters())
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else needed
    if free < needed:
        warnings.warn(
            f"the trained model needs {needed / 1e9:.1f} GB, {device} has {free / 1e9:.1f} GB free: it stays on the "
            "CPU, where the steps after training (choosing the scale, scoring) are slow. To leave them out, train "
            "with --no-eval and --posterior-scale 1.",
            BayestuneWarning,
            stacklevel=2,
        )
        return
    model.to(device)


def reshard(model: nn.Module) -> None:
    """Free the weights that the last forward gathered; otherwise the root's would stay until a backward pass."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def gather(sharded: PeftModel, model: PeftModel) -> None:
    """Copy the adapters of `sharded` into `model`; every process must call this."""
    for part, tensor in _pairs(sharded, model):
        tensor.copy_(whole(part))


@torch.no_grad()
def scatter(model: PeftModel, sharded: PeftModel) -> None:
    """Copy the adapters of `model` into `sharded`."""
    for part, tensor in _pairs(sharded, model):
        local(part).copy_(local(sharded_like(tensor, part)))


def gather_optimizer(optimizer: Optimizer, sharded: PeftModel, model: PeftModel) -> None:
    """Point `optimizer`, which trained `sharded`, to the parameters of `model`; every process must call this."""
    names = {id(parameter): name for name, parameter in sharded.named_parameters()}
    own = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for index, parameter in enumerate(group["params"]):
            group["params"][index] = to = own[names[id(parameter)]]
            state = optimizer.state.pop(parameter, {})
            optimizer.state[to] = {
                key: whole(value).to(to.device) if isinstance(value, DTensor) else value
                for key, value in state.items()
            }


def _pairs(sharded: PeftModel, model: PeftModel) -> list[tuple[Tensor, Tensor]]:
    """Return pairs of tensors, from `sharded` and from `model`, for each adapter in use."""
    pairs = []
    for adapter in model.active_adapters:
        parts = adapter_tensors(sharded, adapter)
        pairs += [(parts[key], tensor) for key, tensor in adapter_tensors(model, adapter).items()]
    return pairs
