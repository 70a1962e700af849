r"""IVON: improved variational online Newton (Shen et al. 2024, arXiv 2402.17641; for LoRA: arXiv 2506.14280).

The posterior over all trained weights is ``q(theta) = N(m, diag(sigma^2))``, ``sigma^2 = 1 / (lambda (h + delta))``,
where h estimates the diagonal of the Hessian of the mean NLL, lambda is the effective sample size and
``delta = 1 / (lambda s_p^2)`` the weight decay that the prior N(0, s_p^2) leads to. Update t (Algorithm 1) is

    theta = m + sigma eps,   g_hat = gradient of the mean NLL at theta,   h_hat = g_hat (theta - m) / sigma^2
    g <- beta_1 g + (1 - beta_1) g_hat
    h <- beta_2 h + (1 - beta_2) h_hat + (1 - beta_2)^2 (h - h_hat)^2 / (2 (h + delta))
    m <- m - alpha (g / (1 - beta_1^t) + delta m) / (h + delta).

With lambda equal to the number of training rows, its fixed point is that of the negative ELBO, ``sum of the NLLs +
KL(q || p)``. A larger lambda gives the posterior of that many rows: it is narrower, and the prior has less weight.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import TrainerCallback

from bayestune.errors import ConfigError, TrainingError
from bayestune.functional import derive_seed
from bayestune.methods.base import Family, Fitting, Method, Updates, plain_adapter
from bayestune.sampling import Variational
from bayestune.storage.state import adapter_tensors, as_bayesian, bayesian_config, parameter_names
from bayestune.training.sharding import sharded_like

_RATES: dict[Family, float] = {"causal": 0.0003, "encoder": 0.1}
_LEAST_SAMPLE_SIZE = 10_000
"""With lambda of a few hundred rows, the ELBO keeps a LoRA adapter near the prior (docs/methods/ivon.md)."""
_DISTRIBUTION = {"distribution": "gaussian_ab"}


def next_curvature(
    h: Float[Tensor, "*shape"], estimate: Float[Tensor, "*shape"], *, beta2: float, delta: float
) -> Float[Tensor, "*shape"]:
    """Return the curvature h after an update; ``h + delta`` stays positive for any estimate.

    ``h <- beta_2 h + (1 - beta_2) h_hat + (1 - beta_2)^2 (h - h_hat)^2 / (2 (h + delta))``; with
    ``x = (1 - beta_2) (h_hat - h) / (h + delta)`` this multiplies ``h + delta`` by ``1 + x + x^2 / 2 >= 1/2``.

    Args:
        h: diagonal of the Hessian of the mean NLL, in nats per squared weight.
        estimate: h_hat, the estimate of one draw, in the same unit.
        beta2: decay of the average.
        delta: weight decay, above 0.

    References:
        IVON: Shen et al. 2024, arXiv 2402.17641, Algorithm 1.
    """
    change = (1 - beta2) * (estimate - h)
    return h + change + change.square() / (2 * (h + delta))


class IvonOptimizer(Optimizer):
    """The optimizer of the module docstring: call `draw` before the gradients of an update, and `step` after them.

    Between the two calls the parameters hold theta, so that all micro-batches of an update share one draw; otherwise
    they hold m. The noise is a pure function of (`seed`, update, name of the parameter): processes that train
    together share it, and a resumed run repeats it. The state of a parameter is "momentum" (g), "curvature" (h) and
    "step" (t). If gradients are clipped, the clipped gradients enter both g and h.

    Args:
        parameters: named parameters, in float32 or float64.
        lr: alpha, the learning rate.
        sample_size: lambda, the effective sample size, such as the number of training rows.
        prior_std: s_p, the standard deviation of the prior.
        h0: the first h, in nats per squared weight.
        beta1: decay of g.
        beta2: decay of h.
        clip_radius: bound on each entry of ``(g / (1 - beta_1^t) + delta m) / (h + delta)``; None for no bound.
        seed: seed of the noise.

    Raises:
        ConfigError: a parameter is in half precision, where m would lose the updates.
    """

    def __init__(
        self,
        parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        lr: float,
        sample_size: float,
        prior_std: float,
        h0: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        clip_radius: float | None = None,
        seed: int = 0,
    ) -> None:
        settings = {"lr": lr, "sample_size": sample_size, "delta": 1 / (sample_size * prior_std**2), "beta1": beta1}
        settings |= {"beta2": beta2, "clip_radius": clip_radius, "seed": seed}
        super().__init__(list(parameters), settings)
        self._h0 = h0
        self._held: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}  # m and eps of the draw that is held
        for _, name, weight in self._weights():
            if weight.dtype not in (torch.float32, torch.float64):
                raise ConfigError(f"IvonOptimizer: {name} is {weight.dtype}, expected float32: cast it with float().")
            self._state(weight)

    @torch.no_grad()
    def draw(self) -> None:
        """Replace m with a draw ``theta = m + sigma eps`` in the parameters, until `step` or `restore`."""
        self.restore()
        for group, name, weight in self._weights():
            key = derive_seed("ivon", group["seed"], self._state(weight)["step"], name)
            generator = torch.Generator(weight.device).manual_seed(key)
            noise = torch.randn(weight.shape, generator=generator, device=weight.device, dtype=weight.dtype)
            epsilon = sharded_like(noise, weight)
            self._held[weight] = weight.clone(), epsilon
            weight.addcmul_(self._std(group, weight), epsilon)

    @torch.no_grad()
    def restore(self) -> None:
        """Put m back into the parameters if they hold a draw."""
        for weight, (mean, _) in self._held.items():
            weight.copy_(mean)
        self._held = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update g, h and m from the gradients at the draw, and leave m in the parameters.

        Raises:
            TrainingError: no draw is held, so the gradients would be those at m.
        """
        if not self._held:
            raise TrainingError(
                "IvonOptimizer.step: found no draw, expected draw() before the gradients: give the trainer "
                "callbacks=[IvonCallback(optimizer)]."
            )
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        noise = {weight: epsilon for weight, (_, epsilon) in self._held.items()}
        self.restore()
        for group, _, weight in self._weights():
            if weight.grad is not None:
                self._update(group, weight, weight.grad, noise[weight])
        return loss

    @torch.no_grad()
    def std(self) -> dict[str, Tensor]:
        """Return sigma of every parameter, by name."""
        return {name: self._std(group, weight) for group, name, weight in self._weights()}

    def _update(self, group: dict[str, Any], weight: nn.Parameter, gradient: Tensor, epsilon: Tensor) -> None:
        state, delta = self._state(weight), group["delta"]
        state["step"] += 1
        estimate = gradient * epsilon / self._std(group, weight)  # theta - m = sigma eps
        state["momentum"].lerp_(gradient, 1 - group["beta1"])
        state["curvature"].copy_(next_curvature(state["curvature"], estimate, beta2=group["beta2"], delta=delta))
        average = state["momentum"] / (1 - group["beta1"] ** state["step"])
        change = (average + delta * weight) / (state["curvature"] + delta)
        if group["clip_radius"] is not None:
            change.clamp_(-group["clip_radius"], group["clip_radius"])
        weight.sub_(change, alpha=group["lr"])

    def _std(self, group: Mapping[str, Any], weight: nn.Parameter) -> Tensor:
        return (group["sample_size"] * (self._state(weight)["curvature"] + group["delta"])).rsqrt()

    def _state(self, weight: nn.Parameter) -> dict[str, Any]:
        """Return the state of a parameter; create it for one that is new, as when sharding replaces parameters."""
        if weight not in self.state:
            momentum, curvature = torch.zeros_like(weight), torch.full_like(weight, self._h0)
            self.state[weight] = {"momentum": momentum, "curvature": curvature, "step": 0}
        return self.state[weight]

    def _weights(self) -> Iterator[tuple[dict[str, Any], str, nn.Parameter]]:
        for group in self.param_groups:
            for name, weight in zip(group["param_names"], group["params"], strict=True):
                yield group, name, weight


class IvonCallback(TrainerCallback):
    """Draws the weights at the beginning of each update, in `BayesTrainer` or any transformers Trainer.

    Args:
        optimizer: the optimizer of the run.
    """

    def __init__(self, optimizer: IvonOptimizer) -> None:
        self._optimizer = optimizer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer.draw()


@torch.no_grad()
def ivon_posterior(model: PeftModel, optimizer: IvonOptimizer, *, prior_std: float) -> Variational:
    """Return the posterior that `optimizer` trained: ``A, B ~ N(m, sigma^2)``, heads at their m.

    The base model is not copied: `model` is taken apart, and the posterior's model takes its place.

    Args:
        model: the trained model, with one plain LoRA adapter.
        optimizer: the optimizer that trained it.
        prior_std: s_p, the standard deviation of the prior.

    Raises:
        ConfigError: there is no plain LoRA adapter, or the optimizer did not train all of it.
    """
    model, adapter = plain_adapter(model, by="ivon")
    optimizer.restore()
    std, names = optimizer.std(), parameter_names(model, adapter)
    for name in names.values():
        if name not in std:
            raise ConfigError(f"ivon_posterior: found no {name} in the optimizer, expected every adapter weight.")
    stds = {key.removesuffix("weight") + "rho": std[name] for key, name in names.items()}
    bayesian = as_bayesian(model, adapter, **_DISTRIBUTION, prior_std=prior_std)
    for key, tensor in adapter_tensors(bayesian, "default").items():
        if key.endswith(".rho"):
            tensor.copy_(stds[key].sqrt())
    return Variational(bayesian)


class Ivon(Method):
    """A Gaussian over A and B whose mean and variance come from one Newton-like optimizer.

    The learning rate is relative to the curvature, so it is not comparable with AdamW's. All rows of an update share
    one draw of the weights. Layers that are trained in full get the same noise and steps, but the posterior keeps only
    their means. Holding a draw takes two extra copies of the trained weights.
    """

    name = "ivon"
    label = "IVON"
    summary = "variational online Newton: Gaussian posterior over A and B from one optimizer"
    paper = "Shen et al. 2024, arXiv 2402.17641; on LoRA Cong et al. 2025, arXiv 2506.14280"
    posterior = Variational

    sample_size: float | None = Field(
        None, gt=0, description=f"Effective sample size; default: the training rows, at least {_LEAST_SAMPLE_SIZE}."
    )
    ivon_prior_std: float = Field(0.05, gt=0, description="Standard deviation of the prior on every trained weight.")
    ivon_h0: float = Field(0.01, ge=0, description="First curvature h, in nats per squared weight.")
    ivon_beta1: float = Field(0.9, ge=0, lt=1, description="Decay of the averaged gradient.")
    ivon_beta2: float = Field(0.999, gt=0, lt=1, description="Decay of the averaged curvature.")
    ivon_clip_radius: float | None = Field(
        None, gt=0, description="Bound on each entry of the Newton step, before the learning rate; default: none."
    )

    def run_defaults(self, family: Family) -> dict[str, Any]:
        return {"learning_rate": _RATES[family]}

    def check(self, model: PeftModel, updates: Updates) -> None:
        _, adapter = plain_adapter(model, by="ivon")
        bayesian_config(model, adapter, **_DISTRIBUTION)

    def fit(self, model: PeftModel, run: Fitting) -> Variational:
        sample_size = self.sample_size or max(len(run.rows), _LEAST_SAMPLE_SIZE)
        optimizer = IvonOptimizer(
            [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad],
            lr=run.learning_rate,
            sample_size=sample_size,
            prior_std=self.ivon_prior_std,
            h0=self.ivon_h0,
            beta1=self.ivon_beta1,
            beta2=self.ivon_beta2,
            clip_radius=self.ivon_clip_radius,
            seed=run.seed,
        )
        try:
            run.train(model, label=self.name, optimizer=optimizer, callbacks=[IvonCallback(optimizer)])
        finally:
            optimizer.restore()
        run.found["sample_size"] = sample_size
        return ivon_posterior(model, optimizer, prior_std=self.ivon_prior_std)
