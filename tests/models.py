"""Tiny models built from config, and adapters on them, for tests of every part of the library."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from bayestune.adapters import BayesLoraConfig, gaussian_layers

VOCABULARY = 64
HIDDEN = 32
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def seeded(make: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """Build a model with random weights that depend on `seed` alone; the global random state stays where it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def llama(seed: int = 0, **settings: Any) -> PreTrainedModel:
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**{**_DECODER, **settings})), seed)


def qwen2(seed: int = 0, **settings: Any) -> PreTrainedModel:
    return seeded(lambda: Qwen2ForCausalLM(Qwen2Config(**{**_DECODER, **settings})), seed)


def gpt2(seed: int = 0, **settings: Any) -> PreTrainedModel:
    """GPT-2: its linear layers are transformers' Conv1D, whose weight is stored [inputs, outputs]. No dropout."""
    config = {"vocab_size": VOCABULARY, "n_embd": HIDDEN, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    return seeded(lambda: GPT2LMHeadModel(GPT2Config(**{**config, **settings})), seed)


def bert(seed: int = 0, **settings: Any) -> PreTrainedModel:
    """BERT with a classification head of 3 labels. No dropout."""
    config = {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "intermediate_size": 48, "num_hidden_layers": 2}
    config |= {"num_attention_heads": 4, "max_position_embeddings": 64, "num_labels": 3}
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return seeded(lambda: BertForSequenceClassification(BertConfig(**{**config, **settings})), seed)


def t5(seed: int = 0, **settings: Any) -> PreTrainedModel:
    """T5, encoder and decoder. No dropout."""
    config = {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    config |= {"dropout_rate": 0.0, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return seeded(lambda: T5ForConditionalGeneration(T5Config(**{**config, **settings})), seed)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One kind of base model: how to build it, what an adapter on it needs, and how many layers that adapts."""

    name: str
    build: Callable[..., PreTrainedModel]
    targets: tuple[str, ...]
    task_type: str
    layers: int
    adapter: dict[str, Any]

    def config(self, **settings: Any) -> BayesLoraConfig:
        """A configuration whose draws differ visibly from the mean."""
        default = {"r": 4, "lora_alpha": 8, "target_modules": list(self.targets), "task_type": self.task_type}
        return BayesLoraConfig(**{**default, "rho_init": 0.4, **self.adapter, **settings})

    def inputs(self, rows: int = 3, tokens: int = 5) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(rows * 1000 + tokens)
        ids = torch.randint(3, VOCABULARY, (rows, tokens), generator=generator)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return inputs | ({"decoder_input_ids": ids[:, :3]} if self.name == "t5" else {})


LLAMA = Architecture(
    name="llama", build=llama, targets=("q_proj", "v_proj"), task_type="CAUSAL_LM", layers=4, adapter={}
)
QWEN2 = Architecture(
    name="qwen2", build=qwen2, targets=("q_proj", "k_proj", "down_proj"), task_type="CAUSAL_LM", layers=6, adapter={}
)
GPT2 = Architecture(
    name="gpt2",
    build=gpt2,
    targets=("c_attn", "c_fc"),
    task_type="CAUSAL_LM",
    layers=4,
    adapter={"fan_in_fan_out": True},
)
BERT = Architecture(name="bert", build=bert, targets=("query", "value"), task_type="SEQ_CLS", layers=4, adapter={})
T5 = Architecture(name="t5", build=t5, targets=("q", "v"), task_type="SEQ_2_SEQ_LM", layers=12, adapter={})
ARCHITECTURES = (LLAMA, QWEN2, GPT2, BERT, T5)


def blob(architecture: Architecture = LLAMA, *, seed: int = 0, **settings: Any) -> PeftModel:
    """A Bayesian model whose M, G and B all differ from their initial values; in training mode."""
    model = get_peft_model(architecture.build(), architecture.config(**settings))
    return scatter(model, seed=seed).train()


def scatter(model: PeftModel, *, seed: int = 0, adapter: str = "default") -> PeftModel:
    """Give every parameter of an adapter a random value set by `seed` alone, so that none is where it started."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if f".{adapter}." in name or name.endswith(f".{adapter}"):
                value = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.3 + value.abs() if name.endswith(".rho") else value)
    return model


def adapter_state(model: nn.Module, adapter: str = "default") -> dict[str, Tensor]:
    """M and G of every Gaussian layer of an adapter, and its B, by layer name."""
    state = {}
    for name, layer in gaussian_layers(model, [adapter]).items():
        state |= {f"{name}.weight": layer.weight.detach(), f"{name}.rho": layer.rho.detach()}
    for key, parameter in model.named_parameters():
        if key.endswith(f".lora_B.{adapter}.weight"):
            state[f"{key.removeprefix('base_model.model.').split('.lora_B.')[0]}.B"] = parameter.detach()
    return state


def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same names, and under each the same numbers in the same dtype, bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=0)
