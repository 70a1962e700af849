"""`KLCallback`: the KL step after every optimizer step, in any transformers Trainer; `NoiseCallback`: keyed noise."""

import dis
import inspect
import math
import warnings
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from bayestune.adapters import GaussianLinear, gaussian_layers, random_layers, training_noise
from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.functional import gaussian_kl_gradient
from bayestune.training.finite import all_finite, first_nonfinite, stopped
from bayestune.training.kl import KLSettings, kl_step, layer_groups, posterior_summary
from bayestune.training.posterior_std import kl_only_std, warn_of_width
from bayestune.training.sharding import local, total


class NoiseCallback(TrainerCallback):
    """Keys the noise of each forward by (seed, update, micro-batch, process), so that a resumed run sees the same.

    Raises:
        DrawError: when training begins, if the model has no random adapter.
    """

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        self._random = list(random_layers(kwargs["model"]).values())
        self._noise = training_noise(kwargs["model"])
        self._noise.seed, self._noise.rank = args.seed, args.process_index

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._noise.step = state.global_step
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first micro-batch of the update."""
        for layer in self._random:
            layer.noise = None  # a part of the model that is called alone must not train on old noise
        self._noise.micro = 0


class KLCallback(NoiseCallback):
    """Adds the KL term to `transformers.Trainer` or TRL's `SFTTrainer`, after every optimizer step.

    It also keys the training noise, keeps M, G and B in float32 and logs the KL ("kl") and the mean "std". If the
    optimizer holds G, as in a plain Trainer, it has already moved G along the NLL, and only the KL part is added here.
    `BayesTrainer` leaves G to this callback, as BLoB's released code does. Gradient clipping acts on the NLL gradients
    of M, G and B together, not on the KL.

    Args:
        settings: cycle, schedule and learning rate of the KL.

    Raises:
        ConfigError: when training begins, for no Gaussian layer, fp16, DeepSpeed, or weight decay on G.
        TrainingError: the KL step is not finite; raised before the optimizer step.
    """

    def __init__(self, settings: KLSettings) -> None:
        if not isinstance(settings, KLSettings):
            raise ConfigError(f"KLCallback: found a {type(settings).__name__}, expected KLSettings(cycle=...).")
        super().__init__()
        self.settings = settings
        self._layers: list[GaussianLinear] = []
        self._along_nll = True
        self._rate = self._weight = 0.0  # of this update

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _restore_float32(kwargs["model"])

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if args.fp16:
            raise ConfigError("fp16=True scales the loss, and the KL step is taken outside the scaler: use bf16=True.")
        if args.deepspeed:
            raise ConfigError("DeepSpeed owns the optimizer step, so the KL step cannot follow it: use FSDP2.")
        _restore_float32(model)
        self._layers = list(gaussian_layers(model).values())
        if not self._layers:
            raise ConfigError(
                "KLCallback found no Gaussian layer in the model: make it with get_peft_model(base, BlobConfig(...)), "
                "or leave the callback out for plain LoRA."
            )
        if not _peak_rate(optimizer.param_groups[0], args) > 0:
            raise ConfigError(
                "learning_rate: found 0, expected more than 0: the KL learning rate follows the main schedule as a "
                "share of its peak. To train G alone, give a very small rate."
            )
        self._along_nll = not _holds_rho(self._layers, optimizer)
        trainer = _calling_trainer()
        if trainer is not None:
            _warn_of_unscaled_loss(trainer, args.gradient_accumulation_steps)
            handler = trainer.callback_handler  # first, so that every logger reads what `on_log` adds
            handler.callbacks = [self, *(callback for callback in handler.callbacks if callback is not self)]
        if state.global_step == 0:
            self._check_width(args, state)
        super().on_train_begin(args, state, control, **kwargs)

    def _check_width(self, args: TrainingArguments, state: TrainerState) -> None:
        """Warn if the KL leaves the std near its start or near the prior's, under a rate that falls linearly."""
        start, prior_std = posterior_summary(self._layers)["std"], self._layers[0].prior_std
        reached = kl_only_std(
            self.settings.learning_rate,
            updates=state.max_steps,
            cycle=self.settings.cycle,
            start=start,
            prior_std=prior_std,
            schedule=self.settings.schedule,
            warmup=args.get_warmup_steps(state.max_steps) / state.max_steps,
        )
        if state.is_world_process_zero:  # the others only help to sum a sharded std
            warn_of_width(reached, start=start, prior_std=prior_std, updates=state.max_steps)

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        group = kwargs["optimizer"].param_groups[0]
        self._rate = self.settings.learning_rate * group["lr"] / _peak_rate(group, args)
        self._weight = self.settings.schedule(state.global_step, self.settings.cycle)
        problem = f"the KL weight is {self._weight}, its learning rate {self._rate}"
        if math.isfinite(self._rate * self._weight):
            bad = self._nonfinite_gradient()
            if bad is None:
                return
            problem = f"the KL gradient of {bad[0]} (of {bad[1]} in all) is not finite"
        raise stopped(
            "kl",
            problem,
            step=state.global_step,
            learning_rate=group["lr"],
            output=args.output_dir,
            advice="look at the schedule of KLSettings, or lower its learning_rate",
        )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        kl_step(self._layers, rate=self._rate, weight=self._weight, along_nll=self._along_nll)

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Add "kl", in nats, and the mean "std" to the log of a loss."""
        logs = kwargs["logs"]
        if "loss" in logs and "kl" not in logs:
            summary = posterior_summary(self._layers)
            logs.update(summary)
            state.log_history[-1].update(summary)

    @torch.no_grad()
    def _nonfinite_gradient(self) -> tuple[str, int] | None:
        """Return the first M or G whose gradient is not finite, and how many there are."""
        largest: list[Tensor] = []  # gradients grow with |M| and |G|, so those of the largest entries are enough
        for prior_std, group in layer_groups(self._layers):
            means, rhos = [local(layer.weight) for layer in group], [local(layer.rho) for layer in group]
            if any(rho.numel() for rho in rhos):
                mean, rho = (get_total_norm([part for part in p if part.numel()], math.inf) for p in (means, rhos))
                largest += gaussian_kl_gradient(mean, rho, prior_std)
        along: dict[str, Tensor] = {}
        for layer in self._layers:
            if self._along_nll and layer.rho.grad is not None:
                along[f"G of {layer.name} (with its NLL)"] = layer.rho.grad
        bad = total(not all_finite(largest), (layer.rho for layer in self._layers))
        if not bad and all_finite(along.values()):
            return None
        gradients: dict[str, Tensor] = {}
        for layer in self._layers:
            mean, rho = gaussian_kl_gradient(layer.weight, layer.rho, layer.prior_std)
            gradients |= {f"M of {layer.name}": mean, f"G of {layer.name}": rho}
        return first_nonfinite(gradients | along)


def _peak_rate(group: dict[str, Any], args: TrainingArguments) -> float:
    """Return the main learning rate without its schedule; ReduceLROnPlateau does not keep it in the group."""
    return group.get("initial_lr", args.learning_rate)


def _holds_rho(layers: list[GaussianLinear], optimizer: torch.optim.Optimizer) -> bool:
    """Return whether the optimizer holds G of all `layers` (True) or of none (False), and does not decay it."""
    rhos = {id(layer.rho) for layer in layers}
    held: set[int] = set()
    for index, group in enumerate(optimizer.param_groups):
        here = rhos & {id(parameter) for parameter in group["params"]}
        if here and group.get("weight_decay", 0.0):
            raise ConfigError(
                f"parameter group {index} decays G (rho) with weight_decay={group['weight_decay']}, which pulls the "
                "posterior to a point: use BayesTrainer, set weight_decay=0, or put rho in a group without decay."
            )
        held |= here
    if held and held != rhos:
        raise ConfigError(
            f"the optimizer holds G (rho) of {len(held)} of {len(rhos)} Gaussian layers: give it all of them or none."
        )
    return bool(held)


def _calling_trainer() -> Trainer | None:
    """Return the Trainer that called the callback, which does not get it as an argument."""
    frame = inspect.currentframe()
    while frame is not None and not isinstance(frame.f_locals.get("self"), Trainer):
        frame = frame.f_back
    return None if frame is None else frame.f_locals["self"]


def _warn_of_unscaled_loss(trainer: Trainer, accumulation: int) -> None:
    """Warn of a loss that is a mean over its micro-batch where the Trainer expects its share of the update's mean."""
    if accumulation == 1 or trainer.loss_is_scaled_for_ga is not None:
        return
    loss = inspect.unwrap(trainer.compute_loss_func or type(trainer).compute_loss)
    scaled = trainer.compute_loss_func is not None or trainer.model_accepts_loss_kwargs
    if scaled and inspect.isfunction(loss) and not _reads(loss, "num_items_in_batch"):
        warnings.warn(
            f"{loss.__qualname__} does not use num_items_in_batch, but the Trainer expects a loss divided by it: with "
            f"gradient_accumulation_steps={accumulation} the NLL gradient is {accumulation} times too large against "
            "the KL. Divide the summed loss by num_items_in_batch, or set loss_is_scaled_for_ga = False in the class.",
            BayestuneWarning,
            stacklevel=2,
        )


def _reads(function: FunctionType, argument: str) -> bool:
    """Return whether the code of `function` reads `argument`, by its name or among others (``*args, **kwargs``)."""
    given = inspect.getfullargspec(function)
    loads = (each.argrepr for each in dis.get_instructions(function) if each.opname.startswith("LOAD"))
    return not {argument, given.varargs, given.varkw}.isdisjoint(name for names in loads for name in names.split(", "))


def _restore_float32(model: nn.Module) -> None:
    """Cast half-precision adapter weights to float32: bf16 loses updates below 1e-4 of a weight near 0.05."""
    for name, parameter in model.named_parameters():
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        if half and (".lora_A." in name or ".lora_B." in name):
            parameter.data = parameter.data.float()  # in place: the optimizer may hold it already
