"""A training bar with the time left, on stderr."""

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """Show one bar with the latest NLL (nats per row) and, for Gaussian posteriors, the KL (nats) and std."""

    def __init__(self, description: str, *, disable: bool) -> None:
        self._description = description
        self._disable = disable
        self._bar: tqdm | None = None

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        total, done = state.max_steps, state.global_step
        self._bar = tqdm(total=total, initial=done, desc=self._description, unit="step", disable=self._disable)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._bar is not None
        self._bar.update(1)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = kwargs["logs"]
        if self._bar is not None and "nll" in logs:
            shown = {name: f"{logs[name]:.3g}" for name in ("nll", "kl", "std") if name in logs}
            self._bar.set_postfix(shown)
