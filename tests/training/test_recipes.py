"""The paper's recipes: the figures of its released code, and that they build what they say."""

from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import TrainingArguments

from bayestune.adapters import BlobConfig, gaussian_layers
from bayestune.functional import paper_kl_weight
from bayestune.recipes.paper import llama2_7b, roberta
from models import BERT, LLAMA


@pytest.mark.parametrize(
    ("rows", "cycle"), [(640, 316), (1119, 393), (2251, 518), (2558, 544), (4957, 706), (9427, 909)]
)
def test_cycles_of_table_1(rows: int, cycle: int) -> None:
    assert llama2_7b(rows).kl.cycle == cycle


def test_llama_recipe_is_the_papers() -> None:
    recipe = llama2_7b(640)
    assert dict(recipe.adapter) == {
        "prior_std": 0.2,
        "rho_init": 0.05,
        "estimator": "flipout_token",
        "lora_dropout": 0.0,
        "task_type": "CAUSAL_LM",
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ["q_proj", "v_proj", "lm_head"],
    }
    assert (recipe.kl.schedule, recipe.kl.learning_rate) == (paper_kl_weight, 0.01)
    assert (recipe.max_tokens, recipe.load_in_8bit, recipe.train_draws) == (300, True, 1)


def test_recipes_build_arguments_and_adapters(tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, seed=1, **llama2_7b(640).arguments)
    assert args.get_warmup_steps(args.max_steps) == 300
    assert (args.learning_rate, args.adam_epsilon, args.weight_decay, args.max_grad_norm) == (1e-4, 1e-6, 0.0, 0.0)
    assert (args.max_steps, args.per_device_train_batch_size, args.lr_scheduler_type) == (5000, 4, "linear")
    assert len(gaussian_layers(get_peft_model(LLAMA.build(), BlobConfig(**llama2_7b(640).adapter)))) == 5

    recipe = roberta(2490, max_steps=100)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, seed=1, **recipe.arguments)
    assert (args.learning_rate, args.per_device_train_batch_size, args.max_steps) == (5e-4, 32, 100)
    assert (recipe.kl.learning_rate, recipe.max_tokens, recipe.adapter["lora_alpha"]) == (0.002, 256, 8)
    assert len(gaussian_layers(get_peft_model(BERT.build(), BlobConfig(**recipe.adapter)))) == 4
