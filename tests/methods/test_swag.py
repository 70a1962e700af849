"""SWAG: moments against numpy, draws against the closed form, and a model that is left as it was."""

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from bayestune.errors import BayestuneError, ConfigError, DrawError, PosteriorError
from bayestune.functional import prediction_noise
from bayestune.inference import predict
from bayestune.methods import SwagPosterior, load_posterior, save_posterior
from bayestune.methods.swag import Moments, trained_weights
from bayestune.sampling.base import Posterior, SubstitutedDraws
from bayestune.storage.state import active_adapter, adapter_tensors, parameter_names
from inference.cases import Letters, rows
from models import BERT, LLAMA, Architecture, assert_same, blob, scatter
from probes import z_bound

SNAPSHOTS = 7


def lora(architecture: Architecture = LLAMA, *, adapter: str = "default", **settings: Any) -> PeftModel:
    default = {"r": 2, "lora_alpha": 4, "target_modules": list(architecture.targets), **architecture.adapter}
    config = LoraConfig(**{**default, "task_type": architecture.task_type, **settings})
    return scatter(get_peft_model(architecture.build(), config, adapter_name=adapter), adapter=adapter).train()


def snapshots(model: PeftModel, count: int = SNAPSHOTS, *, spread: float = 0.1) -> list[dict[str, Tensor]]:
    """Weights around those of `model`."""
    generator = torch.Generator().manual_seed(4)
    start = {name: weight.clone() for name, weight in trained_weights(model).items()}
    return [
        {name: weight + spread * torch.randn(weight.shape, generator=generator) for name, weight in start.items()}
        for _ in range(count)
    ]


def collected(visited: list[dict[str, Tensor]], *, rank: int = 20) -> Moments:
    moments = Moments(rank=rank)
    for weights in visited:
        moments.add(weights)
    return moments


def swag(model: PeftModel, count: int = SNAPSHOTS, *, rank: int = 20, spread: float = 0.1) -> SwagPosterior:
    return SwagPosterior.from_moments(model, collected(snapshots(model, count, spread=spread), rank=rank))


def drawn(posterior: SwagPosterior, draws: int, seed: int = 0) -> list[dict[str, Tensor]]:
    sampler = posterior.sampler(draws=draws, seed=seed)
    assert isinstance(sampler, SubstitutedDraws)
    return [dict(weights) for weights in sampler.weights]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(("count", "rank", "offset"), [(1, 2, 0.0), (2, 20, 1e4), (9, 5, 1e4)])
def test_moments_are_those_of_numpy(count: int, rank: int, offset: float) -> None:
    """Also where the spread is 1e-8 of the mean and a mean of squares would have lost it."""
    generator = torch.Generator().manual_seed(0)
    values = offset + 1e-4 * torch.randn(count, 3, 2, generator=generator, dtype=torch.float64)
    moments = collected([{"a": value, "b": 2 * value[0]} for value in values], rank=rank)
    eps = 2.3e-16 * (offset + 1e-3)
    assert moments.snapshots == count
    for name, stack in (("a", values.numpy()), ("b", 2 * values[:, 0].numpy())):
        assert np.abs(moments.mean[name].numpy() - stack.mean(0)).max() <= 8 * eps
        # The variance is known to twice the spread times the rounding of a value.
        assert np.abs(moments.variance(name).numpy() - stack.var(0)).max() <= 16 * 1e-3 * eps + 1e-22
        running = np.stack([stack[: i + 1].mean(0) for i in range(count)])
        expected = (stack - running)[-rank:]
        found = torch.stack(list(moments.deviations[name]))
        assert found.dtype == torch.float32 and found.shape == expected.shape
        assert np.abs(found.numpy() - expected).max() <= 16 * eps + 1.2e-7 * 1e-3


def test_a_snapshot_is_a_copy() -> None:
    weight = torch.ones(3)
    moments = collected([{"a": weight}])
    weight.add_(1)
    assert torch.equal(moments.mean["a"], torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("architecture", [LLAMA, BERT], ids=lambda a: a.name)
def test_the_model_holds_the_mean(architecture: Architecture) -> None:
    model = lora(architecture)
    visited = snapshots(model)
    posterior = SwagPosterior.from_moments(model, collected(visited))
    assert isinstance(posterior, Posterior) and posterior.kind == "swag" and posterior.default_draws == 10
    assert not model.training
    heads = {key for key in trained_weights(model) if "classifier" in key}
    assert len(heads) == (2 if architecture is BERT else 0)
    assert trained_weights(model).keys() == adapter_tensors(model, "default").keys()
    for key, weight in trained_weights(model).items():
        expected = torch.stack([weights[key] for weights in visited]).double().mean(0)
        assert (weight.double() - expected).abs().max() <= 1.2e-7 * expected.abs().max()


def test_draws_have_the_mean_and_covariance_of_the_closed_form() -> None:
    """Over entries of two tensors: the low-rank part ties them together, the diagonal does not."""
    model = lora(LLAMA, target_modules=["v_proj"])
    visited = snapshots(model, 5)
    posterior = SwagPosterior.from_moments(model, collected(visited, rank=4))
    keys = sorted(trained_weights(model))[:2]
    names = parameter_names(*active_adapter(model)[:2])
    count = 4000
    weights = drawn(posterior, count)
    samples = torch.stack([torch.cat([w[names[key]].flatten()[:6] for key in keys]) for w in weights]).double()
    stacks = [torch.stack([w[key].flatten()[:6] for w in visited]).double() for key in keys]
    stack = torch.cat(stacks, 1)  # [5 snapshots, 12 entries]
    running = stack.cumsum(0) / torch.arange(1, 6)[:, None]
    columns = (stack - running)[-4:].T
    covariance = stack.var(0, correction=0).diag() / 2 + columns @ columns.T / (2 * 3)
    off_diagonal = columns[:6] @ columns[6:].T / 6
    assert off_diagonal.abs().max() > 0.05 * covariance.diagonal().mean()  # there is something to see
    variances = covariance.diagonal()
    centred = samples - stack.mean(0)
    assert (centred.mean(0).abs() <= z_bound(12) * (variances / count).sqrt()).all()
    error = ((variances[:, None] * variances + covariance.square()) / count).sqrt()
    assert ((centred.T @ centred / count - covariance).abs() <= z_bound(144) * error).all()


def test_one_draw_in_the_letters_of_the_formula() -> None:
    model = lora(BERT)
    posterior = swag(model, 6, rank=3)
    (_, found), names = drawn(posterior, 2, seed=9), parameter_names(*active_adapter(model)[:2])
    assert found.keys() == set(names.values())
    saved = posterior.tensors()
    z2 = prediction_noise(9, 1, "swag columns", (3,)).double()
    for key, mean in trained_weights(model).items():
        z1 = prediction_noise(9, 1, key, tuple(mean.shape)).double()
        diagonal, columns = saved[f"variance.{key}"].double().sqrt() * z1, saved[f"deviations.{key}"].double()
        expected = mean.double() + diagonal / math.sqrt(2) + (z2 @ columns.flatten(1)).view_as(mean) / math.sqrt(4)
        assert (found[names[key]].double() - expected).abs().max() <= 1.2e-7 * expected.abs().max()
        assert found[names[key]].dtype == mean.dtype


def test_draws_are_keyed_by_seed_and_index_alone() -> None:
    posterior = swag(lora())
    torch.manual_seed(123)
    before = torch.get_rng_state()
    three, five = drawn(posterior, 3, seed=1), drawn(posterior, 5, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    for one, other in zip(three, five, strict=False):
        assert_same(one, other)
    name = next(iter(three[0]))
    tensors = [w[name] for w in (*five, *drawn(posterior, 5, seed=2))]
    assert len({tensor.numpy().tobytes() for tensor in tensors}) == 10


def test_the_name_of_the_adapter_is_no_part_of_the_draw() -> None:
    default, named = (swag(lora(adapter=adapter)) for adapter in ("default", "mine"))
    assert_same(default.tensors(), named.tensors())
    keys = [parameter_names(*active_adapter(posterior.model)[:2]) for posterior in (default, named)]
    for one, other in zip(drawn(default, 2), drawn(named, 2), strict=True):
        assert_same({key: one[keys[0][key]] for key in keys[0]}, {key: other[keys[1][key]] for key in keys[1]})


def test_a_draw_is_the_same_in_any_batch() -> None:
    posterior = swag(lora())
    found = predict(posterior, Letters(), rows(6), draws=3, seed=2, batch_size=4)
    alone = [predict(posterior, Letters(), [row], draws=3, seed=2).draw_log_probs for row in rows(6)]
    difference = (found.draw_log_probs.exp() - torch.cat(alone, 1).exp()).abs().max()
    assert difference <= 1e-5  # float32 logits of order 1; the bound of stacked draws in test_predict
    assert (found.draw_log_probs[0].exp() - found.draw_log_probs[1].exp()).abs().max() > 1e-3


def test_predictions_are_those_of_the_weights_put_in_by_hand() -> None:
    model = lora(LLAMA, target_modules=["v_proj", "down_proj"])
    posterior = swag(model)
    found = predict(posterior, Letters(), rows(4), draws=3, seed=5).draw_log_probs
    for index, weights in enumerate(drawn(posterior, 3, seed=5)):
        other = lora(LLAMA, target_modules=["v_proj", "down_proj"]).eval()
        other.load_state_dict(weights, strict=False)
        expected = predict(other, Letters(), rows(4), draws=0).draw_log_probs[0]
        assert torch.equal(found[index], expected)
    mean = predict(posterior, Letters(), rows(4), draws=0).draw_log_probs
    assert torch.equal(mean, predict(model, Letters(), rows(4), draws=0).draw_log_probs)


class Failing(Letters):
    """Answers one batch, and raises inside the forward of the next."""

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        if self.forwards:
            return model(input_ids="not a tensor")
        return super().outputs(model, batch)


def test_the_model_is_bit_equal_after_predict_and_after_an_exception() -> None:
    model = lora()
    posterior = swag(model)
    model.train()
    before, parameters = state(model), {name: id(p) for name, p in model.named_parameters()}
    predict(posterior, Letters(), rows(5), draws=4, batch_size=2)
    assert_same(before, state(model))
    with pytest.raises(Exception, match="str"):
        predict(posterior, Failing(), rows(5), draws=4, batch_size=2)
    assert_same(before, state(model))
    assert parameters == {name: id(p) for name, p in model.named_parameters()} and model.training


@pytest.mark.parametrize(("count", "spread"), [(1, 0.1), (4, 0.0)])
def test_one_snapshot_or_no_spread_is_a_point(count: int, spread: float) -> None:
    model = lora()
    posterior = swag(model, count, spread=spread)
    mean = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    for weights in drawn(posterior, 3):
        assert_same(weights, mean)
    assert all((tensor == 0).all() for tensor in posterior.tensors().values())


def test_two_snapshots_have_one_direction() -> None:
    """m_1 = theta_1, so the first column is 0 and the second (theta_2 - theta_1) / 2."""
    model = lora()
    first, second = snapshots(model, 2)
    tensors = SwagPosterior.from_moments(model, collected([first, second])).tensors()
    for key in first:
        half = (second[key] - first[key]) / 2
        expected = torch.stack([torch.zeros_like(half), half])
        assert (tensors[f"deviations.{key}"] - expected).abs().max() <= 1e-6
        assert (tensors[f"variance.{key}"] - half.square()).abs().max() <= 1e-6


def test_settings_and_tensors_give_the_same_posterior(tmp_path: Any) -> None:
    posterior = swag(lora(BERT), 5, rank=3)
    settings = json.loads(json.dumps(posterior.settings()))
    assert settings == {"snapshots": 5, "columns": 3}
    save_posterior(posterior.model, tmp_path / "mean")
    loaded = load_posterior(BERT.build(), tmp_path / "mean")
    again = SwagPosterior.from_saved(loaded, settings, posterior.tensors(), ())
    assert_same(again.tensors(), posterior.tensors())
    for one, other in zip(drawn(posterior, 3, seed=4), drawn(again, 3, seed=4), strict=True):
        assert_same(one, other)
    assert all(t.dtype == torch.float32 and t.is_contiguous() for t in again.tensors().values())


def spoilt(how: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    posterior = swag(lora(), 4)
    settings, tensors = posterior.settings(), {key: t.clone() for key, t in posterior.tensors().items()}
    variance = next(key for key in tensors if key.startswith("variance."))
    deviations = variance.replace("variance.", "deviations.")
    match how:
        case "missing":
            del tensors[variance]
        case "columns":
            tensors[deviations] = tensors[deviations][:2]
        case "negative":
            tensors[variance][0, 0] = -1e-9
        case "text":
            settings["columns"] = "4"
        case "too many":
            settings["columns"] = 5
    return settings, tensors


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "swag: tensor 'variance.*is missing"),
        ("columns", r"found shape \[2, .*\], expected \[4, "),
        ("negative", "negative variance"),
        ("text", "swag: columns: found '4', expected a whole number"),
        ("too many", "expected columns <= snapshots"),
    ],
)
def test_what_was_not_saved_by_swag_is_refused(how: str, message: str) -> None:
    settings, tensors = spoilt(how)
    with pytest.raises(PosteriorError, match=message):
        SwagPosterior.from_saved(lora(), settings, tensors, ())


def merged() -> None:
    posterior = swag(lora())
    posterior.model.merge_adapter()
    posterior.sampler(draws=1, seed=0)


def other_adapter() -> None:
    SwagPosterior.from_moments(lora(r=3), collected(snapshots(lora())))


@pytest.mark.parametrize(
    ("make", "error", "word"),
    [
        (lambda: Moments(rank=1), ConfigError, "rank"),
        (lambda: collected([{"a": torch.ones(1)}, {"b": torch.ones(1)}]), ConfigError, "different weights"),
        (lambda: SwagPosterior.from_moments(lora(), Moments()), ConfigError, "0 snapshots"),
        (other_adapter, ConfigError, "found shape"),
        (lambda: trained_weights(blob(LLAMA)), ConfigError, "a posterior already"),
        (lambda: swag(lora()).sampler(draws=-1, seed=0), DrawError, "-1"),
        (merged, DrawError, "unmerge_adapter"),
    ],
)
def test_what_cannot_be_right_is_refused(make: Any, error: type[BayestuneError], word: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert word in str(caught.value) and "\n" not in str(caught.value)


def test_a_refused_snapshot_changes_nothing() -> None:
    moments = collected([{"a": torch.ones(2), "b": torch.ones(2)}])
    with pytest.raises(PosteriorError):
        moments.add({"a": torch.zeros(2), "b": torch.tensor([1.0, math.inf])})
    assert moments.snapshots == 1 and torch.equal(moments.mean["a"], torch.ones(2, dtype=torch.float64))
