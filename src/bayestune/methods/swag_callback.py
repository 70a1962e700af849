"""`SwagCallback`: snapshots of the tail of a training run, for a SWAG posterior."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayestune.errors import ConfigError, TrainingError
from bayestune.methods.swag import Moments, trained_weights
from bayestune.storage.state import active_adapter, parameter_names


class SwagCallback(TrainerCallback):
    """Adds the weights of a plain LoRA adapter to `moments` after updates `start`, ``start + every``, ... of a run.

    Works with `BayesTrainer` and with transformers' Trainer; it reads the weights and changes nothing. SWAG wants a
    learning rate that is constant and not small over the tail (`lr_scheduler_type="constant_with_warmup"`), so that
    the snapshots spread as the posterior does (Maddox et al. 2019). Snapshots are not in checkpoints.

        >>> swag = SwagCallback(start=500, every=25)                              # doctest: +SKIP
        >>> BayesTrainer(model, task=task, args=args, callbacks=[swag]).train()   # doctest: +SKIP
        >>> posterior = Swag.from_moments(model, swag.moments)                    # doctest: +SKIP

    Attributes:
        start: the update, counted from 1, of the first snapshot. every: updates between snapshots.
        moments: what was collected; `rank` of it is K, the number of deviations kept.

    Raises:
        ConfigError: a setting out of range; when training begins: no plain LoRA adapter, other trained parameters
            beside it, or a run that ends before its second snapshot.
        TrainingError: the run is resumed after its first snapshot.
    """

    def __init__(self, *, start: int, every: int, rank: int = 20) -> None:
        if start < 1 or every < 1:
            raise ConfigError(f"SwagCallback: found start={start}, every={every}, expected at least 1.")
        self.start, self.every, self.moments = start, every, Moments(rank=rank)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        trained_weights(model)
        own = set(parameter_names(*active_adapter(model)[:2]).values())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and name not in own:
                raise ConfigError(f"SwagCallback: {name} is trained but no part of the adapter: freeze it.")
        if self.start + self.every > state.max_steps:
            raise ConfigError(
                f"SwagCallback: found start={self.start}, every={self.every} in a run of {state.max_steps} updates, "
                "expected at least two snapshots: start earlier."
            )
        due = max(0, (state.global_step - self.start) // self.every + 1)
        if due != self.moments.snapshots:
            raise TrainingError(
                f"SwagCallback: the run stands at update {state.global_step} with {self.moments.snapshots} snapshots, "
                f"expected {due}; snapshots are not in a checkpoint: resume before update {self.start}, use a new "
                "callback for a new run."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        past = state.global_step - self.start
        if past >= 0 and past % self.every == 0:
            self.moments.add(trained_weights(kwargs["model"]))
