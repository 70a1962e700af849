"""MAP: the Gaussian prior as a term of the loss, against plain gradients."""

from pathlib import Path

import pytest
import torch

from bayestune.errors import ConfigError
from bayestune.functional import gaussian_penalty
from training.toys import TASK, Recorder, arguments, double_blob, lora, rows, trained

PRIOR_STD = 0.3


def test_the_penalty_is_the_negative_log_density_up_to_a_constant() -> None:
    values = [torch.nn.Parameter(torch.randn(3, 2, dtype=torch.float64)), torch.nn.Parameter(torch.ones(4).double())]
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), PRIOR_STD)
    at_zero = sum(normal.log_prob(torch.zeros_like(value)).sum() for value in values)
    expected = at_zero - sum(normal.log_prob(value).sum() for value in values)
    torch.testing.assert_close(gaussian_penalty(values, PRIOR_STD), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_gradient_of_an_update_is_that_of_the_map_objective(accumulation: int, tmp_path: Path) -> None:
    """Whatever the micro-batches, ragged ones too: d/dtheta of mean NLL is added theta / (s_p^2 rows) once."""
    found = {}
    for prior_std in (None, PRIOR_STD):
        args = arguments(tmp_path, max_steps=3, gradient_accumulation_steps=accumulation, optim="sgd", learning_rate=0)
        trainer = Recorder(lora(), task=TASK, args=args, train_rows=rows(7), prior_std=prior_std)
        trainer.train()
        found[prior_std] = trainer.gradients
    weights = trained(lora())
    for plain, penalised in zip(found[None], found[PRIOR_STD], strict=True):
        for name, gradient in plain.items():
            expected = gradient + weights[name] / (PRIOR_STD**2 * 7)
            torch.testing.assert_close(penalised[name], expected, rtol=1e-12, atol=1e-14)


def test_a_prior_std_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prior_std: found 0"):
        Recorder(lora(), task=TASK, args=arguments(tmp_path), train_rows=rows(3), prior_std=0.0)
    with pytest.raises(ConfigError, match="prior_std is for MAP training of plain LoRA"):
        Recorder(double_blob(), task=TASK, args=arguments(tmp_path), train_rows=rows(3), prior_std=1.0)
