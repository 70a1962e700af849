"""Training by one of TRL's trainers, in float64 and without what `BayesTrainer` does not do."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from bayestune.training import KLCallback, KLSettings


def train_by_trl(
    trainer: Any,
    config: Any,
    model: PeftModel,
    folder: Path,
    rows: Callable[[], Iterator[dict[str, Any]]],
    settings: dict[str, Any],
    kl: KLSettings,
    **own: Any,
) -> None:
    """Train `model` with `KLCallback`, and with AdamW over all but G, which the callback moves."""
    from datasets import IterableDataset

    not_rho = [p for name, p in model.named_parameters() if p.requires_grad and not name.endswith(".rho")]
    quiet = {"use_cpu": True, "dataloader_pin_memory": False, "report_to": "none", "save_strategy": "no"}
    plain = {"seed": 5, "max_grad_norm": 0.0, "bf16": False, "gradient_checkpointing": False}
    trainer(
        model,
        args=config(str(folder), **settings, **quiet, **plain),
        train_dataset=IterableDataset.from_generator(rows),
        optimizers=(torch.optim.AdamW(not_rho, lr=1e-3, weight_decay=0.0), None),
        callbacks=[KLCallback(kl)],
        **own,
    ).train()
