"""Saved posteriors of many kinds, and the answers each must give again in another process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from bayestune.inference.draws import draw, evaluation_mode
from bayestune.methods import load_posterior
from models import BERT, GPT2, LLAMA, QWEN2, T5, Architecture, scatter

DRAWS = ((0, 0), (3, 7))  # (index, seed)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One adapter on one base; of several adapters the last is the active one."""

    architecture: Architecture
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    adapters: tuple[str, ...] = ("default",)
    plain: bool = False

    def base(self, seed: int = 0) -> PreTrainedModel:
        return self.architecture.build(seed).to(self.dtype).eval()

    def config(self) -> LoraConfig:
        config = self.architecture.config(**self.settings)
        if not self.plain:
            return config
        names = ("r", "lora_alpha", "target_modules", "task_type", "fan_in_fan_out", "use_rslora")
        return LoraConfig(**{name: getattr(config, name) for name in names})

    def model(self) -> PeftModel:
        model = get_peft_model(self.base(), self.config(), adapter_name=self.adapters[0])
        for name in self.adapters[1:]:
            model.add_adapter(name, self.config())
        for number, name in enumerate(self.adapters):
            scatter(model, seed=number, adapter=name)
        model.set_adapter(self.adapters[-1])
        return model


CASES = {
    "llama": Case(architecture=LLAMA),
    "qwen2": Case(architecture=QWEN2),
    "gpt2": Case(architecture=GPT2),
    "bert": Case(architecture=BERT),
    "bert_modules_to_save": Case(architecture=BERT, settings={"task_type": None, "modules_to_save": ["classifier"]}),
    "t5": Case(architecture=T5),
    "bfloat16": Case(architecture=LLAMA, dtype=torch.bfloat16),
    "float16": Case(architecture=QWEN2, dtype=torch.float16),
    "bfloat16_head": Case(architecture=BERT, dtype=torch.bfloat16),
    "bfloat16_plain": Case(architecture=LLAMA, dtype=torch.bfloat16, plain=True),
    "float64": Case(architecture=QWEN2, dtype=torch.float64),
    "rank_pattern": Case(
        architecture=LLAMA,
        settings={"rank_pattern": {"layers.0.self_attn.q_proj": 2, "v_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    ),
    "rslora": Case(architecture=GPT2, settings={"use_rslora": True, "r": 3}),
    "gaussian_ab": Case(architecture=LLAMA, settings={"distribution": "gaussian_ab"}),
    "dropout": Case(architecture=GPT2, settings={"distribution": "dropout", "lora_dropout": 0.3}),
    "regex": Case(architecture=LLAMA, settings={"target_modules": r".*\.1\.self_attn\.(q|o)_proj"}),
    "some_layers": Case(architecture=QWEN2, settings={"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "all_linear": Case(architecture=LLAMA, settings={"target_modules": "all-linear"}),
    "named": Case(architecture=LLAMA, adapters=("adapter-1_x",)),
    "several": Case(architecture=LLAMA, adapters=("default", "default2", "ad", "ada")),
    "several_heads": Case(architecture=BERT, adapters=("default", "second")),
    "plain": Case(architecture=LLAMA, plain=True),
    "plain_head": Case(architecture=BERT, plain=True),
}


def answers(case: Case, model: PeftModel) -> dict[str, Tensor]:
    """Logits at the mean and, of a posterior, at given draws."""
    inputs = case.architecture.inputs()
    with torch.no_grad(), evaluation_mode(model):
        found = {"mean": model(**inputs).logits}
        for index, seed in () if case.plain else DRAWS:
            with draw(model, index=index, seed=seed):
                found[f"draw_{index}_{seed}"] = model(**inputs).logits
    return found


def store(answers: dict[str, Tensor], path: Path) -> None:
    save_file({key: tensor.contiguous() for key, tensor in answers.items()}, path)


def replay(root: Path) -> None:
    """Load every posterior under `root` with both loaders; write which answers are bit-equal to the stored ones."""
    torch.set_num_threads(1)
    loaders: dict[str, Callable[..., PeftModel]] = {"strict": load_posterior, "peft": PeftModel.from_pretrained}
    equal = {}
    for name, case in CASES.items():
        expected = load_file(root / f"{name}.safetensors")
        for loader, load in loaders.items():
            found = answers(case, load(case.base(), root / name))
            equal[f"{name} {loader}"] = {k: torch.equal(found[k], expected[k]) for k in expected}
    (root / "equal.json").write_text(json.dumps(equal))


if __name__ == "__main__":
    replay(Path(sys.argv[1]))
