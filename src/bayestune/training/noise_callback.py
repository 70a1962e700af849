"""`NoiseCallback`: keys the training noise by the update, so that a resumed run sees the same noise."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bayestune.adapters import RandomLinear, TrainingNoise, random_layers, training_noise


class NoiseCallback(TrainerCallback):
    """Keys the noise of each forward by (seed, update, micro-batch, process).

    Raises:
        DrawError: when training begins, if the model has no random adapter.
    """

    def __init__(self) -> None:
        self._noise: TrainingNoise | None = None
        self._random: list[RandomLinear] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._random = list(random_layers(kwargs["model"]).values())
        self._noise = training_noise(kwargs["model"])
        self._noise.seed, self._noise.rank = args.seed, args.process_index

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        assert self._noise is not None
        self._noise.step = state.global_step
        self.rewind()

    def rewind(self) -> None:
        """Go back to the first micro-batch of the update."""
        assert self._noise is not None
        for layer in self._random:
            layer.noise = None  # a part of the model that is called alone must not train on old noise
        self._noise.micro = 0
