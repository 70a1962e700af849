"""The settings of BLoB's experiments (NeurIPS 2024, arXiv 2406.11675), as its released code has them.

Marks: [code] read in the released code (Wang-ML-Lab/bayesian-peft, commit bc6a4a7); [peft] PEFT's way to say the same;
[open] not stated in either source read here, so the caller decides.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from bayestune.functional import cycle_steps, paper_kl_weight
from bayestune.training import KLSettings


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that fixes one of the paper's training runs but the model, the rows and the seed.

    Attributes:
        adapter: keyword arguments of `BlobConfig`.
        arguments: keyword arguments of `transformers.TrainingArguments`; add `output_dir` and `seed`.
        kl: settings of the KL step.
        max_tokens: longest input, in tokens.
        load_in_8bit: whether the base model is quantised to int8 (bitsandbytes).
        train_draws: draws of the weights per row and update.
    """

    adapter: Mapping[str, Any]
    arguments: Mapping[str, Any]
    kl: KLSettings
    max_tokens: int
    load_in_8bit: bool
    train_draws: int = 1


def llama2_7b(rows: int, *, processes: int = 1) -> Recipe:
    """Llama-2-7B on a multiple-choice set of `rows` training rows (table 1), seeds 1, 2 and 3 [code].

    `BayesTrainer(model, task=task, args=TrainingArguments(output_dir, seed=1, **recipe.arguments), kl=recipe.kl)`.
    """
    return Recipe(
        adapter=MappingProxyType(
            {
                **_POSTERIOR,
                "task_type": "CAUSAL_LM",  # [peft]
                "r": 8,  # [code]
                "lora_alpha": 16,  # [code]
                "target_modules": ["q_proj", "v_proj", "lm_head"],  # [code]
            }
        ),
        arguments=_arguments(max_steps=5000, batch_size=4, learning_rate=1e-4),  # [code]
        kl=_kl(rows, batch_size=4, processes=processes, learning_rate=0.01),  # [code]
        max_tokens=300,  # [code]
        load_in_8bit=True,  # [code]
    )


def roberta(rows: int, *, max_steps: int, processes: int = 1) -> Recipe:
    """RoBERTa on a classification set of `rows` training rows: RTE, MRPC, WiC, CoLA, BoolQ.

    The released code names query, value and classifier [code]; the classifier is trained in full beside the adapters,
    which is how PEFT treats the head of a sequence classifier [peft]. `max_steps` is [open].
    """
    return Recipe(
        adapter=MappingProxyType(
            {
                **_POSTERIOR,
                "task_type": "SEQ_CLS",  # [peft]
                "r": 8,  # [code]
                "lora_alpha": 8,  # [code]
                "target_modules": ["query", "value"],  # [code]
                "modules_to_save": ["classifier"],  # [peft]
            }
        ),
        arguments=_arguments(max_steps=max_steps, batch_size=32, learning_rate=5e-4),  # [code]
        kl=_kl(rows, batch_size=32, processes=processes, learning_rate=0.002),  # [code]
        max_tokens=256,  # [code]
        load_in_8bit=False,  # [open]
    )


_POSTERIOR: Mapping[str, Any] = MappingProxyType(
    {
        "prior_std": 0.2,  # [code]
        "rho_init": 0.05,  # [code]
        "estimator": "flipout_token",  # [code] signs per token
        "lora_dropout": 0.0,  # [code]
    }
)


def _arguments(*, max_steps: int, batch_size: int, learning_rate: float) -> Mapping[str, Any]:
    return MappingProxyType(
        {
            "max_steps": max_steps,
            "per_device_train_batch_size": batch_size,
            "learning_rate": learning_rate,
            "optim": "adamw_torch",  # [code]
            "adam_epsilon": 1e-6,  # [code]
            "weight_decay": 0.0,  # [code]
            "max_grad_norm": 0.0,  # [code] no clipping
            "lr_scheduler_type": "linear",  # [code]
            "warmup_steps": 0.06,  # [code] share of max_steps
        }
    )


def _kl(rows: int, *, batch_size: int, processes: int, learning_rate: float) -> KLSettings:
    return KLSettings(
        cycle=cycle_steps(rows, batch_size, gamma=8.0, processes=processes),  # [code]
        schedule=paper_kl_weight,  # [code]
        learning_rate=learning_rate,
    )
