"""BLoB in a plain transformers Trainer: train a causal model on short texts, and average ten draws of the next token.

    python examples/plain_trainer.py MODEL

MODEL is a folder or a Hugging Face id of a causal model with layers q_proj and v_proj.
"""

import sys
import tempfile

import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

import bayestune as bt
from bayestune.adapters import gaussian_layers
from bayestune.training import default_kl

STEPS = 30
TEXTS = ["The cup is red.", "The hat is green.", "The door is blue.", "The leaf is green."] * 4


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    model = get_peft_model(base, bt.BlobConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=STEPS, learning_rate=1e-3, warmup_steps=0.06, logging_steps=10, save_strategy="no",
            report_to="none", weight_decay=0.0,
        )  # fmt: skip
        kl = default_kl(gaussian_layers(model).values(), len(TEXTS), arguments)  # raises the std toward 0.06
        Trainer(
            model,
            arguments,
            train_dataset=[tokenizer(text) for text in TEXTS],
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=[bt.KLCallback(kl)],
        ).train()

    model.eval()
    batch = tokenizer("The cup is", return_tensors="pt").to(model.device)
    probabilities = []
    for index in range(10):
        with torch.no_grad(), bt.draw(model, index=index, seed=0):
            probabilities.append(model(**batch).logits[0, -1].softmax(-1))
    averaged = torch.stack(probabilities).mean(0)
    print("next token:", repr(tokenizer.decode(averaged.argmax())), f"with probability {averaged.max():.3f}")


if __name__ == "__main__":
    main()
