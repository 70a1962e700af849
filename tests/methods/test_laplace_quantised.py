"""A Laplace posterior of an adapter on an 8- or 4-bit base: only the adapter's own layers have to be linear ones."""

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from bayestune.methods import fit_laplace
from bayestune.methods.laplace.linearised import LinearisedDraws
from inference.cases import Letters, rows
from methods.laplace_cases import covered, one_batch
from models import LLAMA, scatter
from storage.test_quantised import SIZES, load_base

STEP = 1e-2


@pytest.mark.parametrize("kind", ["nf4", "torchao"])
def test_draws_on_a_quantised_base_follow_its_own_logits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """``f(theta*) + J (theta_k - theta*)``; where the base is smooth, against a central difference.

    The kernels of bitsandbytes round activations, to 8 bits or to bfloat16: differences over small steps are noise.
    """
    caplog.set_level(logging.ERROR, logger="bitsandbytes")
    LLAMA.build(0, **SIZES).save_pretrained(tmp_path)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = scatter(get_peft_model(load_base(kind, tmp_path), config)).eval()
    task, batch = Letters(), one_batch(Letters(), rows(4))
    sampler = fit_laplace(model, task, rows(4), precision=20.0).sampler(draws=1, seed=0)
    assert isinstance(sampler, LinearisedDraws)
    drawn = sampler.outputs(task, batch, range(1))[0]

    def moved(scale: float) -> Tensor:
        with torch.no_grad():
            for name, linear in covered(model).items():
                linear.weight += scale * sampler.steps[name][0]
            logits = task.outputs(model, batch)
            for name, linear in covered(model).items():
                linear.weight -= scale * sampler.steps[name][0]
        return logits

    present = batch["present"]
    change = (drawn - moved(0.0))[present]
    assert change.isfinite().all() and change.abs().max() > 0.1
    if kind == "torchao":
        expected = (moved(STEP) - moved(-STEP))[present] / (2 * STEP)
        assert (change - expected).abs().max() <= 1e-2 * change.abs().max()
