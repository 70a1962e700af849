r"""Regression: one or several numbers per row, by the head of AutoModelForSequenceClassification.

The likelihood of a row's numbers y is Gaussian, ``y_d ~ N(m_d + s_d mu_d, s_d^2 exp(v_d))``, where m and s are the
mean and standard deviation of the targets of the training rows. The head answers in standard units, so a new head
starts near the prediction that uses only m and s. The noise is

- "predicted": the head has two outputs per number, mu and v, so that the noise may differ between rows.
- "constant": the head has one output per number, mu, and v = log T for all rows, where T is the temperature of the
  posterior. T is 1 in training, which is least squares, and is fitted afterwards; for one set of weights it is then
  the mean squared residual in standard units, as in linear regression. The noise is thus saved and loaded with the
  posterior, and the head needs no parameter for it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from bayestune.errors import ConfigError, DataError, TaskError
from bayestune.tasks.datasets import DatasetSpec, dataset
from bayestune.tasks.numbers import RegressionPrediction
from bayestune.tasks.rows import AnyRow, NumberRow
from bayestune.tasks.tensors import labels_of, pad_encodings, widen
from bayestune.tasks.tokenized import Text, TokenizedTask, check_padding

Noise = Literal["predicted", "constant"]
_LOG_2PI = 1.8378770664093453


def regression(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 256,
    noise: Noise = "predicted",
    target_mean: Sequence[float] | None = None,
    target_std: Sequence[float] | None = None,
) -> "Regression":
    """Return a regression task for AutoModelForSequenceClassification with `task.columns` labels.

    Args:
        name: the name of a folder in `data`.
        tokenizer: the model's tokenizer.
        data: the data folder.
        max_tokens: largest number of tokens in a sequence; longer rows are refused.
        noise: "predicted" or "constant". With "constant", set `posterior.temperature =
            methods.temperature_of(prediction)` after training.
        target_mean, target_std: mean and standard deviation of each number, in the unit of the target; by default
            those of the train split.

    Returns:
        The task. Its predictions and scores are in the unit of the target.

    Raises:
        DataError: the data set is unknown, or all training rows have the same number.
        TaskError: the rows have no numbers.
        ConfigError: `target_mean` and `target_std` do not fit the rows.
    """
    return Regression(
        dataset(name, data, numbers=None if target_mean is None else len(target_mean)),
        tokenizer,
        data=data,
        max_tokens=max_tokens,
        noise=noise,
        target_mean=target_mean,
        target_std=target_std,
    )


class Regression(TokenizedTask[RegressionPrediction]):
    """Regression on sequences tokenizer(text, text_pair) with a Gaussian likelihood (see the module docstring).

    Attributes:
        noise: "predicted" or "constant".
        target_mean, target_std: m and s, one of each per number.
    """

    row = NumberRow
    families = ("causal", "encoder")
    auto_model = AutoModelForSequenceClassification
    settings = ("noise", "target_mean", "target_std", "train_split")

    def __init__(
        self,
        spec: DatasetSpec,
        tokenizer: PreTrainedTokenizerBase,
        *,
        data: str | Path | None,
        max_tokens: int,
        noise: Noise = "predicted",
        target_mean: Sequence[float] | None = None,
        target_std: Sequence[float] | None = None,
        train_split: str = "train",
    ) -> None:
        if spec.row is not NumberRow:
            raise TaskError(f"data set {spec.name}: found {spec.row.noun} rows, expected rows with 'target'")
        if noise not in get_args(Noise):
            raise ConfigError(f"noise: found {noise!r}, expected one of {', '.join(get_args(Noise))}.")
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)
        self.noise: Noise = noise
        self.columns = spec.classes * (2 if noise == "predicted" else 1)
        if target_mean is None or target_std is None:
            if target_mean is not target_std:
                raise ConfigError("target_mean and target_std: found one of them, expected both or neither.")
            target_mean, target_std = self._moments(train_split)
        self.target_mean, self.target_std = tuple(target_mean), tuple(target_std)
        found = f"found {len(self.target_mean)} and {len(self.target_std)} numbers"
        if not len(self.target_mean) == len(self.target_std) == spec.classes:
            raise ConfigError(f"target_mean and target_std: {found}, expected {spec.classes}, as {spec.name} has.")
        if not all(std > 0 for std in self.target_std):
            raise ConfigError(f"target_std: found {min(self.target_std)}, expected numbers above 0.")

    def _moments(self, split: str) -> tuple[list[float], list[float]]:
        """Return the mean and standard deviation of each number over the rows of a split."""
        rows: list[Any] = self.rows(split)
        targets = torch.tensor([row.numbers for row in rows], dtype=torch.float64)
        std = targets.std(0, correction=0)
        if not (std > 0).all():
            raise DataError(
                f"data set {self.name}: found the same number in all {len(targets)} rows of split {split!r}, expected "
                "numbers that differ"
            )
        return targets.mean(0).tolist(), std.tolist()

    @property
    def head(self) -> dict[str, Any]:
        """The number of outputs."""
        return {"num_labels": self.columns}

    @property
    def recorded(self) -> dict[str, Any]:
        return {"noise": self.noise, "target_mean": self.target_mean, "target_std": self.target_std}

    @property
    def needs_temperature(self) -> bool:
        return self.noise == "constant"

    def sequences(self, row: AnyRow) -> list[Text]:
        assert isinstance(row, NumberRow)
        return [(row.text, row.text_pair)]

    def encoded(self, row: AnyRow, encodings: list[dict[str, list[int]]]) -> dict[str, Any]:
        return {"encoding": encodings[0]}

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["encoding"]["input_ids"])

    def target(self, row: AnyRow) -> list[float] | None:
        """Return the row's numbers in standard units, ``(y - m) / s``."""
        assert isinstance(row, NumberRow)
        if row.numbers is None:
            return None
        units = zip(row.numbers, self.target_mean, self.target_std, strict=True)
        return [(number - mean) / std for number, mean, std in units]

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the tokenizer's outputs, [rows, tokens], padded on the right, and `labels` [rows, numbers]."""
        return {**pad_encodings([example["encoding"] for example in examples], self.pad_id), **labels_of(examples)}

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        """Return mu, and v if the noise is predicted, in standard units."""
        check_padding(model, batch["attention_mask"], self.pad_id)
        inputs = {key: tensor for key, tensor in batch.items() if key in self.tokenizer.model_input_names}
        outputs = widen(model(**inputs).logits)
        if outputs.shape[1] != self.columns:
            raise TaskError(
                f"data set {self.name}: the model has {outputs.shape[1]} labels, expected {self.columns}; load it "
                f"with num_labels={self.columns}"
            )
        return outputs

    def row_loss(self, outputs: Float[Tensor, "rows columns"], batch: dict[str, Tensor]) -> Float[Tensor, " rows"]:
        """Return -log N(y) of each row, in nats, summed over its numbers, with y in the unit of the target.

        Raises:
            TaskError: the batch has no labels.
        """
        if "labels" not in batch:
            raise TaskError("loss: found a batch without labels, expected labeled rows")
        mean, log_variance = self._parts(outputs)
        squares = (batch["labels"].to(mean) - mean).square() * (-log_variance).exp()
        units = mean.new_tensor(self.target_std).log()
        return ((squares + log_variance + _LOG_2PI) / 2 + units).sum(-1)

    def metrics(self, outputs: Float[Tensor, "rows columns"], labels: Tensor) -> dict[str, float]:
        """Return `rmse`, in the unit of the target, and `nll` (nats)."""
        mean, _ = self._parts(outputs.double())
        errors = (labels.double() - mean) * mean.new_tensor(self.target_std)
        return {**super().metrics(outputs, labels), "rmse": errors.square().mean().sqrt().item()}

    def loss_roots(self, outputs: Float[Tensor, "rows columns"]) -> Iterator[Float[Tensor, "rows columns"]]:
        """Yield the columns of the root of the Fisher matrix: ``exp(-v / 2)`` for mu, and ``sqrt(1/2)`` for v."""
        _, log_variance = self._parts(outputs)
        roots = (-log_variance / 2).exp()
        if self.noise == "predicted":
            roots = torch.cat([roots, torch.full_like(roots, 0.5**0.5)], -1)
        for c in range(self.columns):
            root = torch.zeros_like(outputs)
            root[:, c] = roots[:, c]
            yield root

    def prediction(
        self,
        outputs: Float[Tensor, "slices rows columns"],
        rows: Sequence[AnyRow],
        *,
        draws: int,
        seed: int,
        temperature: float = 1.0,
    ) -> RegressionPrediction:
        """Return the Gaussian of every draw, its variance multiplied by `temperature`, in the unit of the target."""
        mean, log_variance = self._parts(outputs)
        shift, unit = mean.new_tensor(self.target_mean), mean.new_tensor(self.target_std)
        targets = [row.numbers for row in rows if isinstance(row, NumberRow)]
        return RegressionPrediction(
            ids=tuple(row.id for row in rows),
            draw_means=shift + unit * mean,
            draw_variances=temperature * unit.square() * log_variance.exp(),
            targets=None if None in targets else torch.tensor(targets, dtype=torch.float64),
            draws=draws,
            seed=seed,
            task=self.name,
        )

    def _parts(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return mu and v of each number, [..., numbers]."""
        mean = outputs[..., : self.spec.classes]
        return mean, outputs[..., self.spec.classes :] if self.noise == "predicted" else torch.zeros_like(mean)
