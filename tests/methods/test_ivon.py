"""IVON: its update against the equations, its fixed point against known posteriors, and its runs."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from scipy.optimize import minimize, root
from torch import Tensor, nn
from transformers import TrainerCallback

from bayestune.adapters import gaussian_layers
from bayestune.errors import ConfigError, TrainingError
from bayestune.experiment import Experiment, load_run, run
from bayestune.functional import std
from bayestune.inference import draw, predict
from bayestune.methods import (
    METHODS,
    Ivon,
    IvonCallback,
    IvonOptimizer,
    Variational,
    ivon_posterior,
    load_posterior,
)
from bayestune.methods.ivon import next_curvature
from bayestune.serving.lora import export_lora
from bayestune.storage import save_posterior
from bayestune.training import BayesTrainer
from models import assert_same
from toys import pretrained_bert, write_data
from training.toys import TASK, Recorder, arguments, lora, rows, trained

ERRORS = 5
"""Standard errors that an estimate may be off."""
CHAINS = 64


def one(weight: Tensor, **settings: Any) -> tuple[nn.Parameter, IvonOptimizer]:
    parameter = nn.Parameter(weight.clone().double())
    default = {"lr": 0.05, "sample_size": 40, "prior_std": 0.3, "h0": 0.5, "beta2": 0.95}
    return parameter, IvonOptimizer([("w", parameter)], **{**default, **settings})


def visited(
    gradient: Callable[[Tensor], Tensor], start: Tensor, *, updates: int, burn_in: int, **settings: Any
) -> dict[str, Tensor]:
    """What `CHAINS` independent runs from `start` see in each update after the first `burn_in`, [updates, CHAINS, n].

    m and h before the update, the gradient g_hat at its draw, and the noise eps of the draw.
    """
    parameter, optimizer = one(start.repeat(CHAINS, 1), **settings)
    found: dict[str, list[Tensor]] = {"m": [], "h": [], "g": [], "eps": []}
    for update in range(updates + burn_in):
        m, h = parameter.detach().clone(), optimizer.state[parameter]["curvature"].clone()
        sigma = optimizer.std()["w"]
        optimizer.draw()
        parameter.grad = gradient(parameter.detach())
        if update >= burn_in:
            values = {"m": m, "h": h, "g": parameter.grad, "eps": (parameter.detach() - m) / sigma}
            for name, value in values.items():
                found[name].append(value)
        optimizer.step()
    return {name: torch.stack(values) for name, values in found.items()}


def ratio_bound(seen: dict[str, Tensor], *, delta: float, beta2: float, sample_size: int) -> Tensor:
    """How far the mean of ``1 / (h + delta)`` may be from ``1 / (E h_hat + delta)``, relative to it, by weight.

    By its update, ``log (h + delta)`` moves by ``log(1 + x + x^2 / 2) = x - x^3 / 6 + ...`` with
    ``x = (1 - beta_2) (h_hat - h) / (h + delta)``. So the mean of x over T updates is as large as the ends and x^3
    leave it, and ``(E h_hat + delta) mean(1 / (h + delta))`` is 1 up to those two, divided by ``1 - beta_2``, and the
    mean of the independent errors ``(h_hat - E h_hat) / (h + delta)``.
    """
    curvature = seen["h"] + delta
    estimates = seen["g"] * seen["eps"] * (sample_size * curvature).sqrt()
    updates = len(curvature)
    se = (estimates / curvature).flatten(0, 1).std(0) / math.sqrt(updates * CHAINS)
    ends = (curvature[-1] / curvature[0]).log().mean(0).abs() / ((1 - beta2) * updates)
    cubes = (1 - beta2) ** 2 * ((estimates - seen["h"]) / curvature).pow(3).mean((0, 1)).abs() / 6
    return ERRORS * se + ends + cubes


def mean_bound(seen: dict[str, Tensor], noise: Tensor, precision: Tensor, *, delta: float, rate: float) -> Tensor:
    """How far the mean of m may be from the fixed point, by weight.

    With ``precision = E H + delta``, summing the steps over T updates gives ``precision (mean(m) - m*)`` as the mean
    of T independent errors of the gradient, of covariance `noise`, and the ends, whatever the learning rate.
    """
    inverse, updates = torch.linalg.inv(precision), len(seen["m"])
    se = (inverse @ noise @ inverse).diagonal().sqrt() / math.sqrt(updates * CHAINS)
    moved = (seen["m"][-1] - seen["m"][0]).mean(0).abs() * (seen["h"] + delta).mean((0, 1))
    return ERRORS * se + inverse.abs() @ moved / (rate * updates)


@pytest.mark.parametrize("clip_radius", [None, 0.02])
def test_two_updates_are_those_of_the_equations(clip_radius: float | None) -> None:
    weights = torch.tensor([0.4, -1.2, 0.05], dtype=torch.float64)
    parameter, optimizer = one(weights, clip_radius=clip_radius, beta1=0.7, prior_std=0.2, sample_size=10)
    m, g, h, delta = weights.tolist(), [0.0] * 3, [0.5] * 3, 1 / (10 * 0.2**2)
    clipped = 0
    for t in (1, 2):
        sigma = [1 / math.sqrt(10 * (value + delta)) for value in h]
        torch.testing.assert_close(optimizer.std()["w"], torch.tensor(sigma, dtype=torch.float64))
        optimizer.draw()
        theta = parameter.tolist()
        assert all(abs(a - b) > 1e-3 for a, b in zip(theta, m, strict=True))
        parameter.grad = torch.tensor([math.sin(3 * value) for value in theta], dtype=torch.float64)
        optimizer.step()
        for i in range(3):
            g_hat = math.sin(3 * theta[i])
            h_hat = g_hat * (theta[i] - m[i]) / sigma[i] ** 2
            g[i] = 0.7 * g[i] + 0.3 * g_hat
            h[i] = 0.95 * h[i] + 0.05 * h_hat + 0.5 * 0.05**2 * (h[i] - h_hat) ** 2 / (h[i] + delta)
            newton = (g[i] / (1 - 0.7**t) + delta * m[i]) / (h[i] + delta)
            if clip_radius is not None:
                clipped += abs(newton) > clip_radius
                newton = max(-clip_radius, min(clip_radius, newton))
            m[i] -= 0.05 * newton
        torch.testing.assert_close(parameter.detach(), torch.tensor(m, dtype=torch.float64), rtol=1e-12, atol=0)
        found = optimizer.state[parameter]["curvature"]
        torch.testing.assert_close(found, torch.tensor(h, dtype=torch.float64), rtol=1e-12, atol=0)
    assert clip_radius is None or 0 < clipped < 6


def test_the_curvature_stays_above_minus_delta_whatever_is_estimated() -> None:
    h, delta = torch.full((201,), 0.3, dtype=torch.float64), 0.1
    estimate = torch.linspace(-1e4, 1e4, 201, dtype=torch.float64)
    ratio = (next_curvature(h, estimate, beta2=0.99, delta=delta) + delta) / (h + delta)
    x = 0.01 * (estimate - h) / (h + delta)
    torch.testing.assert_close(ratio, 1 + x + x.square() / 2, rtol=1e-12, atol=0)
    assert ratio.min() >= 0.5


def test_conjugate_regression_reaches_the_best_mean_field_gaussian(figure: Callable[..., None]) -> None:
    """Correlated inputs and all rows in every update, so that the draws are the only noise."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    x[:, 1] = 0.8 * x[:, 0] + 0.6 * x[:, 1]
    y = x @ torch.tensor([0.5, -0.3, 0.2], dtype=torch.float64)
    y = y + 0.7 * torch.randn(40, generator=generator, dtype=torch.float64)
    hessian, right = x.T @ x / (40 * 0.7**2), x.T @ y / (40 * 0.7**2)
    delta, beta2, rate = 1 / (40 * 0.3**2), 0.95, 0.05
    precision = hessian + delta * torch.eye(3, dtype=torch.float64)
    mean, variance = torch.linalg.solve(precision, right), 1 / (40 * precision.diagonal())

    seen = visited(lambda w: w @ hessian - right, torch.ones(3), updates=400, burn_in=400, lr=rate, beta2=beta2)
    off = ((1 / (40 * (seen["h"] + delta))).mean((0, 1)) / variance - 1).abs()
    bound = ratio_bound(seen, delta=delta, beta2=beta2, sample_size=40)
    figure("error of sigma^2, in its bounds", (off / bound).max().item(), at_most=1)
    assert bound.max() < 0.1

    off = (seen["m"].mean((0, 1)) - mean).abs()
    noise = hessian @ variance.diag() @ hessian
    bound = mean_bound(seen, noise, precision, delta=delta, rate=rate)
    figure("error of the mean, in its bounds", (off / bound).max().item(), at_most=1)
    assert (bound / variance.sqrt()).max() < 0.1
    assert (mean - torch.linalg.solve(hessian, right)).abs().max() > 5 * bound.max()  # the prior shows


class Logistic:
    """Two weights and twelve rows; expectations over a Gaussian by Gauss-Hermite quadrature."""

    def __init__(self, prior_std: float) -> None:
        self.prior_std, self.delta = prior_std, 1 / (12 * prior_std**2)
        labels = np.array([0, 0, 0, 1, 0, 0, 1, 0, 1, 1, 1, 1])
        self.signed = np.stack([np.ones(12), np.linspace(-2, 2, 12)], 1) * (1 - 2 * labels)[:, None]
        nodes, weights = np.polynomial.hermite_e.hermegauss(40)
        self.grid = np.stack(np.meshgrid(nodes, nodes), -1).reshape(-1, 2)
        self.share = np.outer(weights, weights).ravel() / (2 * math.pi)

    def moments(self, m: np.ndarray, variance: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Mean NLL, its gradient and its Hessian, averaged over N(m, variance)."""
        logits = (m + self.grid * np.sqrt(variance)) @ self.signed.T
        p = 1 / (1 + np.exp(-logits))
        hessian = np.einsum("k,kn,ni,nj->ij", self.share, p * (1 - p), self.signed, self.signed) / 12
        return self.share @ np.logaddexp(0, logits).mean(1), self.share @ (p @ self.signed) / 12, hessian

    def negative_elbo(self, z: np.ndarray) -> float:
        m, variance = z[:2], np.exp(z[2:])
        ratio = variance / self.prior_std**2
        return 12 * self.moments(m, variance)[0] + 0.5 * (ratio + m**2 / self.prior_std**2 - 1 - np.log(ratio)).sum()

    def gradient(self, w: Tensor) -> Tensor:
        signed = torch.from_numpy(self.signed)
        return (w @ signed.T).sigmoid() @ signed / 12


def test_a_logistic_model_reaches_the_optimum_of_its_elbo(figure: Callable[..., None]) -> None:
    """m fluctuates around its fixed point, which widens the Gaussian that gradients are averaged over.

    The bounds hold the effect of that, by quadrature, beside the standard errors.
    """
    toy = Logistic(prior_std=1.5)
    best = minimize(toy.negative_elbo, np.zeros(4), method="BFGS", options={"gtol": 1e-7}).x
    mean, variance = best[:2], np.exp(best[2:])
    delta, beta2, rate = toy.delta, 0.98, 0.02
    settings = {"lr": rate, "beta2": beta2, "sample_size": 12, "prior_std": 1.5, "h0": 0.2}
    seen = visited(toy.gradient, torch.zeros(2), updates=500, burn_in=500, **settings)

    spread = seen["m"].flatten(0, 1).var(0).numpy()
    wide = root(lambda m: toy.moments(m, variance + spread)[1] + delta * m, mean).x
    hessian = toy.moments(mean, variance)[2]
    precision = torch.from_numpy(hessian + delta * np.eye(2))
    bound = mean_bound(seen, seen["g"].flatten(0, 1).T.cov(), precision, delta=delta, rate=rate)
    bound = bound + torch.from_numpy(np.abs(wide - mean))
    off = (seen["m"].mean((0, 1)) - torch.from_numpy(mean)).abs()
    figure("error of the mean, in its bounds", (off / bound).max().item(), at_most=1)
    assert (bound / torch.from_numpy(variance).sqrt()).max() < 0.1

    widened = 1 / (12 * (np.diag(toy.moments(wide, variance + spread)[2]) + delta))
    bound = ratio_bound(seen, delta=delta, beta2=beta2, sample_size=12)
    bound = bound + torch.from_numpy(np.abs(widened / variance - 1))
    off = ((1 / (12 * (seen["h"] + delta))).mean((0, 1)) / torch.from_numpy(variance) - 1).abs()
    figure("error of sigma^2, in its bounds", (off / bound).max().item(), at_most=1)
    assert bound.max() < 0.15


def trainer_of(
    folder: Path, model: PeftModel, *callbacks: TrainerCallback, prior_std: float = 0.1, **settings: Any
) -> Recorder:
    optimizer = IvonOptimizer(
        [(name, p) for name, p in model.named_parameters() if p.requires_grad],
        lr=0.1,
        sample_size=12,
        prior_std=prior_std,
        h0=1.0,
        seed=5,
    )
    args = arguments(folder, learning_rate=0.1, **settings)
    own = [IvonCallback(optimizer), *callbacks]
    return Recorder(model, task=TASK, args=args, train_rows=rows(12), optimizer=optimizer, callbacks=own)


def state_of(trainer: BayesTrainer) -> dict[str, Tensor]:
    assert trainer.optimizer is not None
    state = trainer.optimizer.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number, own in state.items() for name, value in own.items()}


def test_a_run_resumed_from_a_checkpoint_is_the_whole_run_bit_for_bit(tmp_path: Path) -> None:
    settings = {"max_steps": 9, "gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    whole = trainer_of(tmp_path / "a", lora(lora_dropout=0.3), save_strategy="steps", save_steps=4, **settings)
    whole.train()
    part = trainer_of(tmp_path / "b", lora(lora_dropout=0.3), **settings)
    part.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert part.losses == whole.losses[8:]
    assert isinstance(part.model, PeftModel) and isinstance(whole.model, PeftModel)
    assert_same(trained(part.model), trained(whole.model))
    assert_same(state_of(part), state_of(whole))
    assert {name.split(".")[1] for name in state_of(part)} == {"momentum", "curvature", "step"}


def test_a_run_with_another_prior_cannot_be_resumed(tmp_path: Path) -> None:
    trainer_of(tmp_path / "a", lora(), max_steps=2, save_strategy="steps", save_steps=1).train()
    other = trainer_of(tmp_path / "b", lora(), max_steps=2, prior_std=0.2)
    with pytest.raises(TrainingError, match="optimizer="):
        other.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))


class Weights(TrainerCallback):
    """The weights at each micro-batch, and after each update."""

    def __init__(self, model: PeftModel) -> None:
        self.model, self.during, self.after = model, [], []
        self.model.get_base_model().register_forward_pre_hook(lambda *_: self.during.append(trained(model)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.after.append(trained(self.model))


def test_four_micro_batches_are_one_batch_at_one_held_draw(tmp_path: Path, figure: Callable[..., None]) -> None:
    ends, watched = [], []
    for size, count in ((8, 1), (2, 4)):
        model = lora()
        weights = Weights(model)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": count}
        trainer_of(tmp_path, model, weights, max_steps=1, **settings).train()
        ends.append(trained(model))
        watched.append(weights)
    start, sigma = trained(lora()), 1 / math.sqrt(12 * (1.0 + 1 / (12 * 0.1**2)))
    assert len(watched[1].during) == 4
    for held in watched[1].during:
        assert_same(held, watched[0].during[0])
    for name, weight in start.items():
        drawn = watched[0].during[0][name] - weight
        assert 0.5 * sigma < drawn.std() < 2 * sigma
        assert not torch.equal(ends[0][name], weight)
    worst = max((ends[0][name] - ends[1][name]).abs().max().item() for name in start)
    figure("four micro-batches against one batch, largest weight", worst, at_most=1e-12)


def test_draws_depend_on_seed_update_and_name_and_not_on_the_global_state() -> None:
    def drawn(seed: int, name: str, step: int) -> Tensor:
        weight = nn.Parameter(torch.zeros(5))
        optimizer = IvonOptimizer([(name, weight)], lr=0.1, sample_size=1, prior_std=1, h0=0, seed=seed)
        optimizer.state[weight]["step"] = step
        before = torch.get_rng_state()
        optimizer.draw()
        assert torch.equal(before, torch.get_rng_state())
        return weight.detach().clone()

    same = drawn(1, "a", 3)
    torch.manual_seed(9)
    assert torch.equal(same, drawn(1, "a", 3))
    for other in (drawn(2, "a", 3), drawn(1, "b", 3), drawn(1, "a", 4)):
        assert not torch.equal(same, other)


def test_a_step_without_a_draw_is_refused() -> None:
    parameter, optimizer = one(torch.ones(2))
    parameter.grad = torch.ones(2).double()
    with pytest.raises(TrainingError, match=r"found no draw, expected draw\(\)"):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(2).double())


def test_half_precision_is_refused() -> None:
    weight = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match="some.weight is torch.bfloat16, expected float32"):
        IvonOptimizer([("some.weight", weight)], lr=0.1, sample_size=10, prior_std=0.1, h0=1)


def test_restore_puts_the_mean_back(tmp_path: Path) -> None:
    model = lora()
    trainer = trainer_of(tmp_path, model, max_steps=3)
    optimizer = trainer.optimizer
    start = trained(model)
    assert isinstance(optimizer, IvonOptimizer)
    optimizer.draw()
    assert not all(torch.equal(weight, start[name]) for name, weight in trained(model).items())
    optimizer.restore()
    assert_same(trained(model), start)


def test_an_adapter_that_cannot_have_a_posterior_is_refused_and_left_as_it_is(world: Path, tmp_path: Path) -> None:
    asked = experiment(world, target_modules=("query", "word_embeddings"))
    with pytest.raises(ConfigError, match="word_embeddings' is a Embedding"):
        run(asked, tmp_path / "run", command=[])
    assert not (tmp_path / "run").exists()
    model = lora(use_dora=True)
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    optimizer = IvonOptimizer(named, lr=1, sample_size=1, prior_std=1, h0=1)
    with pytest.raises(ConfigError, match="use_dora"):
        ivon_posterior(model, optimizer, prior_std=0.1)
    assert dict(named).keys() <= dict(model.named_parameters()).keys()


def test_the_posterior_of_a_run_is_saved_loaded_and_exported_as_it_is(tmp_path: Path) -> None:
    model = lora()
    trainer = trainer_of(tmp_path / "steps", model, max_steps=3)
    optimizer = trainer.optimizer
    assert isinstance(optimizer, IvonOptimizer)
    trainer.train()
    partial = IvonOptimizer(
        [(n, p) for n, p in model.named_parameters() if "lora_A" in n], lr=1, sample_size=1, prior_std=1, h0=1
    )
    with pytest.raises(ConfigError, match=r"found no .*lora_B.* in the optimizer"):
        ivon_posterior(model, partial, prior_std=0.1)
    means, state = trained(model), optimizer.state
    curvature = {name: state[p]["curvature"] for name, p in model.named_parameters() if p.requires_grad}
    widths = {name: (12 * (h + 1 / (12 * 0.1**2))).rsqrt() for name, h in curvature.items()}
    posterior = ivon_posterior(model, optimizer, prior_std=0.1)
    layers = gaussian_layers(posterior.model)
    assert len(layers) == 8  # A and B of four layers
    for name, layer in layers.items():
        path, matrix = (name.removesuffix(".lora_B"), "B") if name.endswith(".lora_B") else (name, "A")
        key = f"base_model.model.{path}.lora_{matrix}.default.weight"
        torch.testing.assert_close(layer.weight, means[key], rtol=0, atol=0)
        torch.testing.assert_close(std(layer.rho.detach()), widths[key], rtol=1e-6, atol=0)

    save_posterior(posterior, tmp_path / "posterior")
    here = predict(posterior, TASK, rows(6), draws=3)
    base = lora().unload()
    again = load_posterior(base, tmp_path / "posterior")
    there = predict(again, TASK, rows(6), draws=3)
    assert torch.equal(here.draw_log_probs, there.draw_log_probs)
    assert (here.epistemic > 1e-6).all()

    exported = export_lora(posterior, tmp_path / "exported", draws=2)
    batch = TASK.collate([TASK.example(row) for row in rows(4)])
    for index, folder in enumerate(exported[1:]):
        with draw(again, index=index), torch.no_grad():
            expected = TASK.outputs(again, batch)
        plain = PeftModel.from_pretrained(lora().unload(), str(folder)).eval()
        with torch.no_grad():
            torch.testing.assert_close(TASK.outputs(plain, batch), expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    write_data(folder / "data")
    return folder


def experiment(world: Path, **changes: Any) -> Experiment:
    settings = {"model": str(world / "bert"), "task": "colours", "data": str(world / "data"), "method": "ivon"}
    settings |= {"steps": 6, "batch_size": 4, "draws": 2, "max_tokens": 200, "checkpoint_steps": 2}
    return Experiment.from_dict(settings | changes, where="test")


def digest(folder: Path) -> str:
    return hashlib.sha256((folder / "posterior" / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_killed_experiment_ends_as_the_whole_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(experiment(world), tmp_path / "whole")
    right, done = IvonOptimizer.step, []

    def step(self: IvonOptimizer, *args: Any) -> Any:
        done.append(1)
        if len(done) == 4:
            raise KeyboardInterrupt
        return right(self, *args)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(IvonOptimizer, "step", step)
        run(experiment(world), tmp_path / "killed")
    resumed = run(experiment(world), tmp_path / "killed", resume=True)
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    for key, prediction in whole.predictions.items():
        assert torch.equal(prediction.draw_log_probs, resumed.predictions[key].draw_log_probs)
    assert whole.fitted["sample_size"] == 10_000 and resumed.experiment.learning_rate == whole.experiment.learning_rate
    loaded = load_run(tmp_path / "killed")
    assert isinstance(loaded.posterior, Variational) and loaded.experiment.method == METHODS["ivon"]()


def test_a_learning_rate_that_is_given_replaces_the_methods_own(world: Path) -> None:
    for family in ("causal", "encoder"):
        own = experiment(world).resolved(family).learning_rate
        assert own == METHODS["ivon"]().run_defaults(family)["learning_rate"]
        assert experiment(world, learning_rate=0.25).resolved(family).learning_rate == 0.25
        assert experiment(world, method="mle").resolved(family).learning_rate != own


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("sample_size", 0, "a number above 0"),
        ("ivon_prior_std", 0, "a number above 0"),
        ("ivon_h0", -1.0, "a number, at least 0"),
        ("ivon_beta1", 1.0, "a number"),
        ("ivon_beta2", 1.0, "a number between 0 and 1"),
        ("ivon_clip_radius", -0.5, "a number above 0"),
    ],
)
def test_a_value_out_of_range_is_named(name: str, value: float, expected: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: found {value}, expected {expected}"):
        Ivon(**{name: value})
