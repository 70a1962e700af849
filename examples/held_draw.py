"""Generate text under one draw of the posterior, which is held for the whole text and its key-value cache.

    python examples/held_draw.py MODEL

MODEL is a folder or a Hugging Face id of a causal model with layers q_proj and v_proj. The adapter here is new and
untrained, with a random B; load your own with `bt.load_posterior(base, "posterior")`.
"""

import sys

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import bayestune as bt


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    base = AutoModelForCausalLM.from_pretrained(sys.argv[1])
    config = bt.BlobConfig(r=8, target_modules=["q_proj", "v_proj"], rho_init=0.5, init_lora_weights=False)
    model = get_peft_model(base, config).eval()
    inputs = tokenizer("The cup is", return_tensors="pt")
    texts = []
    for index in range(3):
        with torch.no_grad(), bt.draw(model, index=index, seed=0):
            tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        texts.append(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]))
        print(f"draw {index}: {texts[-1]!r}")


if __name__ == "__main__":
    main()
