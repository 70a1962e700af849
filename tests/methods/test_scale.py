"""The scale of the standard deviations: limits, an independent minimum, what it leaves, and what is refused."""

import dataclasses
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneWarning, ConfigError, DataError
from bayestune.functional import derive_seed
from bayestune.inference import predict
from bayestune.methods import Point, Variational, fit_scale
from bayestune.methods.scale import ALWAYS, FACTORS, TOLERANCE, chosen
from bayestune.metrics import row_nll
from bayestune.tasks import Prediction, Row
from inference.cases import Letters, rows
from models import blob, llama


def answered(posterior: Variational, *, right: bool, count: int = 40) -> list[Row]:
    """Rows whose answer is the mean's most probable choice, or its least probable one."""
    asked = [dataclasses.replace(row, choices=("a", "b", "c", "d")) for row in rows(count)]
    probabilities = predict(posterior, Letters(), asked, draws=0).probs
    best = probabilities.argmax(-1) if right else probabilities.argmin(-1)
    return [dataclasses.replace(row, answer=int(answer)) for row, answer in zip(asked, best, strict=True)]


def rho(posterior: Variational) -> list[torch.Tensor]:
    return [layer.rho.detach().clone() for layer in gaussian_layers(posterior.model).values()]


def test_a_mean_that_is_always_right_needs_no_spread() -> None:
    sure = Variational(blob().eval())
    with pytest.warns(BayestuneWarning, match="every draw is the mean now, without epistemic uncertainty"):
        assert fit_scale(sure, Letters(), answered(sure, right=True)).scale == 0


def test_a_mean_that_is_always_wrong_needs_a_spread_beyond_the_factors() -> None:
    model = blob().eval()
    wrong = answered(Variational(model), right=False)
    with pytest.warns(BayestuneWarning, match="still falls at the largest factor, 64"):
        assert fit_scale(model, Letters(), wrong).scale == FACTORS[-1]


def test_the_chosen_scale_is_the_minimum_of_nlls_computed_apart() -> None:
    posterior = Variational(blob().eval())
    labeled, start = [dataclasses.replace(row, choices=("a", "b", "c", "d")) for row in rows(40)], rho(posterior)
    found = fit_scale(posterior, Letters(), labeled, draws=6, seed=3)
    assert {0.0, *ALWAYS} <= found.nll.keys() <= {0.0, *FACTORS}
    for factor, nll in found.nll.items():
        other = Variational(blob().eval(), predictive="antithetic")
        with torch.no_grad():
            for layer in gaussian_layers(other.model).values():
                layer.rho.mul_(math.sqrt(factor))
        draws = 6 if factor else 0
        apart = predict(other, Letters(), labeled, draws=draws, seed=derive_seed("scale", 3))
        assert apart.labels is not None
        assert row_nll(apart.log_probs, apart.labels).mean().item() == pytest.approx(nll, rel=1e-6)
    assert found.nll[found.scale] <= min(found.nll.values()) + TOLERANCE
    for now, before in zip(rho(posterior), start, strict=True):
        torch.testing.assert_close(now.square(), found.scale * before.square(), atol=1e-7, rtol=1e-6)


def test_before_a_temperature_each_factor_is_judged_at_its_own_best_temperature() -> None:
    labeled = [dataclasses.replace(row, choices=("a", "b", "c", "d")) for row in rows(40)]
    plain = fit_scale(blob().eval(), Letters(), labeled, draws=6, seed=3)
    found = fit_scale(blob().eval(), Letters(), labeled, draws=6, seed=3, tempered=True)
    for factor in found.nll.keys() & plain.nll.keys():
        other = Variational(blob().eval(), predictive="antithetic")
        with torch.no_grad():
            for layer in gaussian_layers(other.model).values():
                layer.rho.mul_(math.sqrt(factor))
        made = predict(other, Letters(), labeled, draws=6 if factor else 0, seed=derive_seed("scale", 3))
        assert made.labels is not None

        def nll(log_t: float, made: Prediction = made) -> float:
            tempered = (made.draw_log_probs / math.exp(log_t)).log_softmax(-1).logsumexp(0)
            return row_nll(tempered - math.log(len(made.draw_log_probs)), made.labels).mean().item()

        best = min(nll(log_t) for log_t in torch.linspace(-4.6, 4.6, 400).tolist())
        assert found.nll[factor] <= best + 1e-9 and found.nll[factor] <= plain.nll[factor]
        assert found.nll[factor] == pytest.approx(best, abs=1e-3)


def test_of_equal_factors_the_nearest_to_1_is_taken() -> None:
    assert chosen({0.0: 0.7, 0.5: 0.69999, 1.0: 0.70001, 2.0: 0.69998, 4.0: 0.8}) == 1
    assert chosen({0.0: 0.7, 0.5: 0.9, 1.0: 0.8}) == 0
    assert chosen({0.0: 0.9, 0.5: 0.7, 1.0: 0.8, 2.0: 0.69, 4.0: 0.8}) == 2


def test_a_failure_leaves_the_posterior_as_it_was() -> None:
    class Failing(Letters):
        def outputs(self, model, batch):
            if len(self.forwards) > 8:
                raise RuntimeError("the machine is gone")
            return super().outputs(model, batch)

    posterior = Variational(blob().eval())
    start = rho(posterior)
    with pytest.raises(RuntimeError, match="the machine is gone"):
        fit_scale(posterior, Failing(), rows(10))
    for now, before in zip(rho(posterior), start, strict=True):
        torch.testing.assert_close(now, before, atol=0, rtol=0)


def test_what_has_no_scale_is_refused() -> None:
    plain = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    with pytest.raises(ConfigError, match="without a Gaussian"):
        fit_scale(Point(plain), Letters(), rows(4))
    posterior = Variational(blob().eval())
    with pytest.raises(ConfigError, match="draws=3, expected an even number"):
        fit_scale(posterior, Letters(), rows(4), draws=3)
    for unusable in ([], [dataclasses.replace(rows(1)[0], answer=None)]):
        with pytest.raises(DataError, match="each with a label"):
            fit_scale(posterior, Letters(), unusable)
