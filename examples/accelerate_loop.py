"""BLoB's training loop written out with two optimizers; the tests of `BayesTrainer` compare with it.

AdamW moves the means M and B along the mean NLL; plain SGD moves G along NLL + pi KL, and M along pi KL. Both follow
the same schedule: linear warm-up, then linear decay to 0. `BayesTrainer` makes the same updates with the KL's gradient
in closed form, and adds checkpoints, logging and evaluation.
"""

from collections.abc import Sequence

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from bayestune.adapters import gaussian_layers, training_noise
from bayestune.functional import RHO_FLOOR, clamp_rho, gaussian_kl, paper_kl_weight
from bayestune.tasks import Task


def train(
    model: PeftModel,
    task: Task,
    updates: Sequence[Sequence[dict[str, Tensor]]],
    *,
    cycle: int,
    learning_rate: float = 1e-4,
    kl_learning_rate: float = 0.01,
    warmup: float = 0.06,
    seed: int = 0,
) -> list[float]:
    """Train the posterior of `model` in place; return the mean NLL, in nats, of each update.

    `updates` holds the micro-batches of each update, as `task.collate` makes them; `cycle` is M, the updates in one
    cycle of KL weights (`bayestune.functional.cycle_steps`).
    """
    accelerator = Accelerator()
    layers = list(gaussian_layers(model).values())
    noise = training_noise(model)
    noise.seed, noise.rank = seed, accelerator.process_index
    rhos = {id(layer.rho) for layer in layers}
    trained = [p for p in model.parameters() if p.requires_grad and id(p) not in rhos]
    adamw = torch.optim.AdamW(trained, lr=learning_rate, eps=1e-6, weight_decay=0.0)
    sgd = torch.optim.SGD([p for layer in layers for p in (layer.weight, layer.rho)], lr=kl_learning_rate)
    steps = len(updates)
    schedules = [get_linear_schedule_with_warmup(o, -int(-warmup * steps // 1), steps) for o in (adamw, sgd)]
    model, adamw, sgd = accelerator.prepare(model, adamw, sgd)

    losses = []
    for step, micro_batches in enumerate(updates):
        model.train()
        noise.step, noise.micro = step, 0
        rows = sum(len(batch["labels"]) for batch in micro_batches)
        losses.append(0.0)
        for batch in micro_batches:
            noise.rows = len(batch["labels"])
            loss = task.loss(model, batch).sum() / rows
            accelerator.backward(loss)
            losses[-1] += loss.item()
        adamw.step()

        adamw.zero_grad()  # M, B and heads; G keeps its gradient of the NLL, and the KL's is added to it
        kl = torch.stack([gaussian_kl(layer.weight, layer.rho, layer.prior_std) for layer in layers]).sum()
        accelerator.backward(paper_kl_weight(step, cycle) * kl)
        sgd.step()
        sgd.zero_grad()
        with torch.no_grad():
            for layer in layers:
                layer.rho.copy_(clamp_rho(layer.rho, RHO_FLOOR))
        for schedule in schedules:
            schedule.step()
    noise.rows = None
    return losses
