"""Tiny adapters whose GGUF tensors are known from llama.cpp's converter, in converted.json.

To convert them again, with a checkout of llama.cpp of commit COMMIT::

    cd tests && python -m serving.gguf_cases LLAMA_CPP COMMIT
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from bayestune.serving.lora import export_lora

CONVERTED = Path(__file__).with_name("converted.json")
COMMAND = "python convert_lora_to_gguf.py --base BASE --outfile FILE --outtype f32 FOLDER"
KEYS = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SOME = ("q_proj", "k_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class Case:
    """An adapter on a base of one architecture, with ranks and scales that differ between layers."""

    model_type: str
    targets: tuple[str, ...] = SOME
    settings: dict[str, Any] = field(default_factory=dict)

    def model(self) -> PeftModel:
        """The adapter, whose numbers are exact in float32, so that they are the same on every machine."""
        base = AutoModelForCausalLM.from_config(AutoConfig.for_model(self.model_type, **SIZES, **self.settings))
        patterns = {"rank_pattern": {"k_proj": 6}, "alpha_pattern": {"q_proj": 16}}
        config = LoraConfig(r=4, lora_alpha=8, target_modules=list(self.targets), task_type="CAUSAL_LM", **patterns)
        model = get_peft_model(base, config)
        lora = sorted((name, weight) for name, weight in model.named_parameters() if ".lora_" in name)
        with torch.no_grad():
            for number, (_, weight) in enumerate(lora):
                values = (torch.arange(weight.numel()) * 7919 + 104729 * number) % 2003 - 1001
                weight.copy_((values / 4096).view(weight.shape))
        return model.eval()


CASES = {
    "llama": Case(model_type="llama", targets=ATTENTION, settings={"tie_word_embeddings": True}),
    "llama_untied": Case(
        model_type="llama",
        targets=(*ATTENTION, "gate_proj", "up_proj", "down_proj", "lm_head"),
        settings={"tie_word_embeddings": False},
    ),
    "llama_head_dim": Case(model_type="llama", settings={"head_dim": 16}),
    "mistral": Case(model_type="mistral"),
    "smollm3": Case(model_type="smollm3"),
    "qwen2": Case(model_type="qwen2"),
    "qwen3": Case(model_type="qwen3", settings={"head_dim": 8}),
    "gemma": Case(model_type="gemma", settings={"head_dim": 8}),
    "gemma2": Case(model_type="gemma2", settings={"head_dim": 8}),
    "gemma3_text": Case(model_type="gemma3_text", settings={"head_dim": 8}),
}


def described(path: Path) -> dict[str, Any]:
    """What llama.cpp reads in an adapter: its metadata, and the shape (innermost last) and sha256 of each tensor."""
    reader = gguf.GGUFReader(path)
    values = {key: reader.fields[key].contents() for key in KEYS}
    tensors = {
        tensor.name: f"{tensor.tensor_type.name} {list(tensor.data.shape)} {hashlib.sha256(tensor.data).hexdigest()}"
        for tensor in reader.tensors
    }
    return {"metadata": values, "tensors": dict(sorted(tensors.items()))}


def convert(llama_cpp: Path, commit: str) -> None:
    """Convert the PEFT export of every case with llama.cpp's script, and write what came out to `CONVERTED`."""
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder, model = Path(temporary), case.model()
            base = model.get_base_model()
            base.config.architectures = [type(base).__name__]
            base.config.save_pretrained(folder / "base")
            (exported,) = export_lora(model, folder / "served", draws=0)
            script, file = llama_cpp / "convert_lora_to_gguf.py", folder / "official.gguf"
            command = [sys.executable, str(script), "--base", str(folder / "base"), "--outfile", str(file)]
            subprocess.run([*command, "--outtype", "f32", str(exported)], check=True, capture_output=True)
            found[name] = described(file)
    origin = {"script": "ggml-org/llama.cpp convert_lora_to_gguf.py", "commit": commit, "command": COMMAND}
    CONVERTED.write_text(json.dumps({"converter": origin, "adapters": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    convert(Path(sys.argv[1]), sys.argv[2])
