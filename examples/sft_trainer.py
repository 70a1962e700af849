"""BLoB in TRL's SFTTrainer: a causal model learns to answer prompts, and one prompt is continued under three draws.

    pip install trl
    python examples/sft_trainer.py MODEL

MODEL is a folder or a Hugging Face id of a causal model with layers q_proj and v_proj. TRL's loss is a mean over
tokens. The KL weights used here add up to 1 per cycle, whatever the loss is a mean over. With `elbo_kl_weight`, pass
the number of trained tokens.
"""

import sys
import tempfile

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import bayestune as bt
from bayestune.adapters import gaussian_layers
from bayestune.training import default_kl

COLORS = {"cup": "red", "hat": "green", "door": "blue", "leaf": "green"}
ROWS = [{"prompt": f"What color is the {thing}?", "completion": f" {color}"} for thing, color in COLORS.items()] * 4


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    model = get_peft_model(base, bt.BlobConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder, max_steps=30, learning_rate=1e-3, warmup_steps=0.06, logging_steps=10, save_strategy="no",
            report_to="none", weight_decay=0.0, bf16=False, gradient_checkpointing=False,
        )  # fmt: skip
        SFTTrainer(
            model,
            args=arguments,
            train_dataset=Dataset.from_list(ROWS),
            processing_class=tokenizer,
            callbacks=[bt.KLCallback(default_kl(gaussian_layers(model).values(), len(ROWS), arguments))],
        ).train()

    model.eval()
    prompt = tokenizer(ROWS[0]["prompt"], return_tensors="pt").to(model.device)
    for index in range(3):
        with torch.no_grad(), bt.draw(model, index=index, seed=0):
            tokens = model.generate(**prompt, max_new_tokens=3, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        print(f"draw {index}: {tokenizer.decode(tokens[0, prompt['input_ids'].shape[1] :])!r}")


if __name__ == "__main__":
    main()
