"""Simulate training steps of Llama models of any size without their memory, and count bytes and FLOPs.

The weights are fake tensors, which have a shape but no storage, so that a step of a model of 405 billion weights runs
on a laptop. `LiveBytes` adds up the storages that would be alive. Torch's `MemTracker` does not work here: it puts a
gradient hook on every weight, and those of the base model are frozen. The kernels are those of a CPU, with float32
adapters on a bfloat16 base; the tokens x tokens matrix of attention is never stored.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shapes import Answers, Shape
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from train_step import bayestune_step, plain_step
from transformers import LlamaConfig, LlamaForCausalLM

from bayestune import BlobConfig

TARGETS = {
    "qv": ("q_proj", "v_proj"),
    "qv+head": ("q_proj", "v_proj", "lm_head"),
    "all": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
}
ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda gradient, q, k, v, *_, **__: sdpa_backward_flop_count(gradient, q, k, v)
    ),
}
"""The FLOPs of a CPU's attention kernels; torch counts only those of GPUs. Causal masks do not halve the count."""


@dataclass(frozen=True, kw_only=True)
class Llama:
    """The sizes of a Llama model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def kv(self) -> int:
        """Number of outputs of k_proj and of v_proj, each."""
        return self.hidden // self.heads * self.kv_heads

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """Numbers of inputs and outputs of the linear layers of one decoder layer and of the head, by name."""
        hidden, intermediate = self.hidden, self.intermediate
        return {
            "q_proj": (hidden, hidden),
            "k_proj": (hidden, self.kv),
            "v_proj": (hidden, self.kv),
            "o_proj": (hidden, hidden),
            "gate_proj": (hidden, intermediate),
            "up_proj": (hidden, intermediate),
            "down_proj": (intermediate, hidden),
            "lm_head": (hidden, self.vocabulary),
        }

    def parameters_per_layer(self) -> int:
        return sum(a * b for name, (a, b) in self.linear.items() if name != "lm_head") + 2 * self.hidden

    def parameters_outside(self) -> int:
        """Return the number of weights of the embedding, the head and the last norm."""
        return 2 * self.hidden * self.vocabulary + self.hidden


SIZES = {
    "7B": Llama(layers=32, hidden=4096, intermediate=11_008, heads=32, kv_heads=32, vocabulary=32_000),
    "70B": Llama(layers=80, hidden=8192, intermediate=28_672, heads=64, kv_heads=8, vocabulary=128_256),
    "405B": Llama(layers=126, hidden=16_384, intermediate=53_248, heads=128, kv_heads=8, vocabulary=128_256),
}
"""Llama 2 7B and Llama 3.1 70B and 405B."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training step: BLoB or plain LoRA (`bayesian`) on `rows` x `tokens`, with the loss of one answer or of all."""

    size: Llama
    rows: int
    tokens: int
    targets: str = "qv"
    rank: int = 8
    bayesian: bool = True
    checkpointing: bool = False
    whole_logits: bool = False

    @property
    def adapted(self) -> list[tuple[int, int, int]]:
        """Inputs, outputs and number of the layers of each adapted kind."""
        return [(*self.size.linear[n], 1 if n == "lm_head" else self.size.layers) for n in TARGETS[self.targets]]

    @property
    def a_weights(self) -> int:
        return sum(self.rank * inputs * count for inputs, _, count in self.adapted)

    @property
    def b_weights(self) -> int:
        return sum(self.rank * outputs * count for _, outputs, count in self.adapted)

    @property
    def moments(self) -> int:
        """Bytes of AdamW's moments of M and B; G has none, as plain SGD moves it."""
        return 8 * (self.a_weights + self.b_weights)

    def model(self) -> PeftModel:
        """Return the model on the device "meta"."""
        size = self.size
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            vocab_size=size.vocabulary,
        )
        adapter = (BlobConfig if self.bayesian else LoraConfig)(
            r=self.rank, lora_alpha=2 * self.rank, target_modules=list(TARGETS[self.targets]), task_type="CAUSAL_LM"
        )
        with torch.device("meta"):
            model = get_peft_model(LlamaForCausalLM._from_config(config, dtype=torch.bfloat16), adapter)
        assert isinstance(model, PeftModel)
        if self.checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        return model.train()

    def loss(self) -> Callable[[PeftModel], Tensor]:
        """Return the loss of an answer as `train_step.py` has it, or that of every token; no row is padded."""
        ids = torch.empty(self.rows, self.tokens, dtype=torch.long)
        if self.whole_logits:
            return lambda model: model(input_ids=ids, labels=ids, use_cache=False).loss
        shape = Shape(name="", model="llama", rows=self.rows, choices=None, tokens=self.tokens)
        batch: dict[str, Any] = {
            "input_ids": ids,
            "attention_mask": None,
            "labels": torch.empty(self.rows, dtype=torch.long),
        }
        task = Answers(shape)
        return lambda model: task.loss(model, batch).mean()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make and that are still alive.

    Attributes:
        live: bytes alive.
        peaks: the most that were alive at once in each `phase`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live, self.phase, self.peaks = 0, "loss", dict[str, int]()
        self._known = weakref.WeakSet[torch.UntypedStorage]()

    def watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            self._known.add(storage)
            self.live += storage.nbytes()
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_iter(result):
            if isinstance(value, Tensor):
                self.watch(value)
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)
        return result


def simulate(case: Case) -> dict[str, int]:
    """Take the first step of a training run and return its bytes, as if AdamW had its moments from the start.

    Returns:
        The most bytes alive in "loss", the forward and backward, and in "update", the steps of AdamW and the KL.
    """
    with FakeTensorMode(allow_non_fake_inputs=True):
        model, step = _stepping(case)
        alive = LiveBytes()
        for tensor in (*model.parameters(), *model.buffers()):
            alive.watch(tensor)

        def updating(*_: Any) -> None:
            alive.phase = "update"

        hook = register_optimizer_step_pre_hook(updating)
        try:
            with alive:
                step()
        finally:
            hook.remove()
    return {**alive.peaks, "loss": alive.peaks["loss"] + case.moments}


def flops(case: Case) -> int:
    """Return the FLOPs of a step, extrapolated linearly from those with one and with two layers."""
    counted = []
    for layers in (1, 2):
        with FakeTensorMode(allow_non_fake_inputs=True):
            _, step = _stepping(replace(case, size=replace(case.size, layers=layers)))
            with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
                step()
            counted.append(counter.get_total_flops())
    return counted[0] + (case.size.layers - 1) * (counted[1] - counted[0])


def _stepping(case: Case) -> tuple[PeftModel, Callable[[], None]]:
    model = case.model()
    _make_fake(model)
    return model, (bayestune_step if case.bayesian else plain_step)(model, case.loss())


def _make_fake(model: nn.Module) -> None:
    """Give each module fake tensors on the CPU, which `Module.to_empty` cannot do."""
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                module._parameters[name] = nn.Parameter(made, requires_grad=tensor.requires_grad)
        for name, tensor in module._buffers.items():
            if tensor is not None:
                module._buffers[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
