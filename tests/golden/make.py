"""Write the folder that test_golden.py reads for ever: what this version saves, and what it answers.

    python tests/golden/make.py tests/golden/format_N      (with src and tests on the path; once for each format)

A posterior, a checkpoint after the first of three updates, and answers.json: the probabilities of the posterior at
its mean and over four draws, and those of the run after its last update. The base is made of arithmetic alone.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel

from bayestune.inference import predict
from bayestune.methods import Variational, save_posterior
from bayestune.training import BayesTrainer, KLSettings
from models import LLAMA, scatter
from training.toys import TASK, arguments, rows

ROWS = rows(8)


def base() -> PreTrainedModel:
    """A Llama of one layer; its weights are quotients of small whole numbers, the same on every machine."""
    model = LLAMA.build(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    with torch.no_grad():
        for number, (_, parameter) in enumerate(sorted(model.named_parameters())):
            steps = torch.arange(parameter.numel()).add(number) * 7919 % 1009 - 504
            parameter.copy_((steps / 1009).view(parameter.shape) + (parameter.dim() == 1))
    return model


def adapted() -> PeftModel:
    return scatter(get_peft_model(base(), LLAMA.config(r=2, lora_alpha=4)), seed=0).train()


def trainer(output: Path) -> BayesTrainer:
    args = arguments(output, max_steps=3, save_strategy="steps", save_steps=1, learning_rate=1e-2, warmup_steps=1)
    return BayesTrainer(adapted(), task=TASK, args=args, train_rows=ROWS, kl=KLSettings(cycle=4), train_draws=2)


def answers(model: PeftModel, draws: int) -> list[list[float]]:
    return predict(Variational(model), TASK, ROWS, draws=draws, seed=0).probs.tolist()


def main(folder: Path) -> None:
    folder.mkdir()
    model = adapted()
    save_posterior(model, folder / "posterior")
    found = {"mean": answers(model, 0), "draws": answers(model, 4)}
    run = trainer(folder / "run")
    run.train()
    found["trained"] = answers(run.model, 4)
    shutil.move(folder / "run" / "checkpoint-1", folder / "checkpoint-1")
    shutil.rmtree(folder / "run")
    (folder / "answers.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
