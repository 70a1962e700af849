"""Preferences: which of two texts is better, by a Bradley-Terry model on the scalar head of a reward model."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from bayestune.errors import TaskError
from bayestune.tasks.choices import warn_of_alike
from bayestune.tasks.classes import ClassTask, Prediction
from bayestune.tasks.datasets import DatasetSpec, dataset
from bayestune.tasks.preference_rows import Candidate, PreferenceRow
from bayestune.tasks.rows import AnyRow
from bayestune.tasks.tensors import labels_of, pad_encodings, widen
from bayestune.tasks.tokenized import Text, TokenizedTask, check_padding


def preference(
    name: str, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None = None, max_tokens: int = 512
) -> "Preference":
    """Return a preference task for AutoModelForSequenceClassification with one output, a reward model.

    Args:
        name: the name of a folder in `data` whose rows have `chosen`, `rejected` and optionally `prompt`.
        tokenizer: the model's tokenizer.
        data: the data folder.
        max_tokens: largest number of tokens in a prompt and a text; longer rows are refused.

    Returns:
        The task.

    Raises:
        DataError: the data set is unknown.
        TaskError: the rows are not preferences.
    """
    return Preference(dataset(name, data), tokenizer, data=data, max_tokens=max_tokens)


class Preference(TokenizedTask[Prediction], ClassTask):
    r"""The Bradley-Terry model of a choice between two texts.

    With r(x, a) the scalar output of the head for text a after prompt x, under one draw theta of the weights,

        p(a better than b | x, theta) = sigmoid(r(x, a; theta) - r(x, b; theta)),

    and the loss of a row is ``-log sigmoid(r(x, chosen) - r(x, rejected))``: the cross-entropy of the classes
    (chosen, rejected), whose logits are the two rewards. The prediction is therefore one of classes: ``probs[:, 0]``
    is the probability that `chosen` is better, and `epistemic` the mutual information of the choice and the weights.

    The label of every row is class 0. Both texts pass through the same head, so a model cannot learn their order, and
    scores have their usual meaning: accuracy is the share of pairs ranked as labeled, and the ECE is that of the
    probability of the text that the model prefers.

    The model reads ``prompt + text`` as one sequence, followed by the tokenizer's EOS if it has one, as in TRL's
    `RewardTrainer`. A space or newline between prompt and text must be part of one of them.

    References:
        Bradley and Terry 1952, Biometrika 39(3/4), 324-345. Ouyang et al. 2022, arXiv 2203.02155, equation 1.
    """

    row = PreferenceRow
    families = ("causal", "encoder")
    auto_model = AutoModelForSequenceClassification

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        if spec.row is not self.row:
            raise TaskError(
                f"data set {spec.name}: found {spec.row.noun} rows, expected preferences, with 'chosen' and 'rejected'"
            )
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)

    @property
    def head(self) -> dict[str, Any]:
        """One output, the reward."""
        return {"num_labels": 1}

    def sequences(self, row: AnyRow) -> list[Text]:
        assert isinstance(row, PreferenceRow | Candidate)
        return [(row.prompt + text, None) for text in row.answers]

    def encoded(self, row: AnyRow, encodings: list[dict[str, list[int]]]) -> dict[str, Any]:
        return {"encodings": [self._ended(encoding) for encoding in encodings]}

    def _ended(self, encoding: dict[str, list[int]]) -> dict[str, list[int]]:
        """Return the encoding with the EOS at its end."""
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int) or encoding["input_ids"][-1] == eos:
            return encoding
        return {key: [*ids, eos if key == "input_ids" else ids[-1]] for key, ids in encoding.items()}

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        examples = super().examples(rows, model)
        sequences = [{tuple(one["input_ids"]) for one in example["encodings"]} for example in examples]
        ids = [row.id for row, distinct in zip(rows, sequences, strict=True) if len(distinct) < self.columns]
        warn_of_alike(self.name, ids, len(rows))
        return examples

    def longest_field(self, row: AnyRow, example: dict[str, Any]) -> str:
        lengths = [len(encoding["input_ids"]) for encoding in example["encodings"]]
        return row.texts[lengths.index(max(lengths)) - len(lengths)][0]  # a prompt comes before them

    def tokens(self, example: dict[str, Any]) -> int:
        return max(len(encoding["input_ids"]) for encoding in example["encodings"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the tokenizer's outputs, [rows, texts, tokens], padded right; the head reads the last token."""
        flat = [encoding for example in examples for encoding in example["encodings"]]
        shape = (len(examples), self.columns)
        inputs = {key: tensor.unflatten(0, shape) for key, tensor in pad_encodings(flat, self.pad_id).items()}
        return {**inputs, **labels_of(examples)}

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        """Return the reward of each text, in logits.

        Raises:
            TaskError: the model does not have exactly one output, or pads with a different id.
        """
        check_padding(model, batch["attention_mask"], self.pad_id)
        names = self.tokenizer.model_input_names
        rewards = widen(model(**{key: tensor.flatten(0, 1) for key, tensor in batch.items() if key in names}).logits)
        if rewards.shape[1] != 1:
            raise TaskError(
                f"data set {self.name}: the model has {rewards.shape[1]} labels, expected 1, the reward; "
                "load it with num_labels=1"
            )
        return rewards.view(-1, self.columns)

    def prediction(self, outputs: Float[Tensor, "slices rows columns"], *args: Any, **options: Any) -> Prediction:
        """Like `ClassTask.prediction`, but with classes named "chosen" and "rejected"."""
        return dataclasses.replace(super().prediction(outputs, *args, **options), names=("chosen", "rejected"))


class Rewards(Preference):
    """The rewards of single texts from the head of a `Preference` task: one output per row, and no label."""

    row = Candidate
    has_classes = False  # a reward is a number: adding a constant to all outputs of a row would change it

    @classmethod
    def of(cls, task: Preference) -> "Rewards":
        """Return a task that rewards single texts as `task` rewards the two texts of a row."""
        spec = dataclasses.replace(task.spec, row=Candidate, classes=1)
        return cls(spec, task.tokenizer, data=None, max_tokens=task.max_tokens)
