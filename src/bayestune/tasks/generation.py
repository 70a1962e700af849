r"""Generation: answers to prompts in free text, by a causal language model.

The likelihood of a row is that of its answer's tokens y_1..y_n after the prompt x, including the token that ends a
text,

    log p(y | x) = sum_t log p(y_t | x, y_1..y_t-1).

It is summed, not averaged, so a long answer weighs more than a short one, as a likelihood requires. `bt.generate` and
`bayestune generate` write answers; this task trains on given answers and scores them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from bayestune import metrics
from bayestune.errors import DataError, TaskError, one_line
from bayestune.tasks.base import AnyPrediction, AnyScores
from bayestune.tasks.causal import beyond_common_prefix, sequence_log_probs, without_added, without_appended
from bayestune.tasks.datasets import DatasetSpec, dataset
from bayestune.tasks.prompted import PromptRow
from bayestune.tasks.rows import AnyRow
from bayestune.tasks.tensors import labels_of, left_padded, pad
from bayestune.tasks.tokenized import Text, TokenizedTask


@dataclass(frozen=True, kw_only=True)
class TextScores(AnyScores):
    """Scores of given answers.

    Attributes:
        nll: mean negative log-likelihood of an answer, in nats.
        nll_per_token: negative log-likelihood of all answers together, divided by the number of their tokens, in nats.
        rows: number of rows.
        draws: number of draws.
        intervals: 95 % bootstrap interval over rows of each score, with the mean number of tokens held fixed.
    """

    headings: ClassVar[Mapping[str, str]] = {"nll": "NLL", "nll_per_token": "NLL per token"}

    nll: float
    nll_per_token: float
    rows: int
    draws: int
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class TextPrediction(AnyPrediction[TextScores]):
    """The likelihoods of given answers under a posterior.

    Attributes:
        ids: the rows' ids, in the order given.
        draw_log_likelihoods: log p(answer | prompt, draw k), float64 on the CPU; one slice, the mean's, for no draws.
        tokens: number of tokens of each answer, including the one that ends it; None if some row has no answer.
        draws: number of draws; 0 for the mean alone.
        seed: seed of the draws.
        task: name of the task.
    """

    draw_log_likelihoods: Float[Tensor, "slices rows"]
    tokens: Int[Tensor, " rows"] | None

    @property
    def log_likelihood(self) -> Float[Tensor, " rows"]:
        """``log 1/K sum_k p(answer | prompt, theta_k)``, in nats: the whole answer under the mixture of the draws."""
        return self.draw_log_likelihoods.logsumexp(0) - math.log(len(self.draw_log_likelihoods))

    def row_nll(self) -> Float[Tensor, " rows"]:
        self._known_tokens()
        return -self.log_likelihood

    def scores(self, *, resamples: int = 1000, seed: int = 0) -> TextScores:
        """Return the NLL of an answer and of a token, with bootstrap intervals.

        Args:
            resamples: number of bootstrap resamples.
            seed: seed of the bootstrap.

        Raises:
            DataError: a row has no answer.
        """
        by_row = {"nll": self.row_nll(), "nll_per_token": self.row_nll() / self._known_tokens().double().mean()}
        return TextScores(
            **{name: values.mean().item() for name, values in by_row.items()},
            rows=len(self.ids),
            draws=self.draws,
            intervals={
                name: metrics.bootstrap_interval(values, resamples=resamples, seed=seed)
                for name, values in by_row.items()
            },
        )

    def _known_tokens(self) -> Int[Tensor, " rows"]:
        if self.tokens is None:
            raise DataError("evaluate: some rows have no answer; found None, expected an answer for every row.")
        return self.tokens

    def records(self, rows: Sequence[AnyRow]) -> list[dict[str, Any]]:
        """Return one JSON object per row: `id`, `log_likelihood` of its answer (nats), and its `tokens`."""
        counts = self._known_tokens().tolist()
        values = zip(rows, self.log_likelihood.tolist(), counts, strict=True)
        return [{"id": row.id, "log_likelihood": value, "tokens": count} for row, value, count in values]

    @staticmethod
    def same_answer(record: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        """Return whether two records have the same likelihood, up to a thousandth of a nat per token."""
        near = abs(record["log_likelihood"] - other.get("log_likelihood", math.inf)) <= 1e-3 * record["tokens"]
        return record["tokens"] == other.get("tokens") and near


def generation(
    name: str, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None = None, max_tokens: int = 300
) -> "GenerationTask":
    """Return a generation task for a causal language model.

    Args:
        name: the name of a folder in `data`, whose rows have `prompt` or `messages`, and `answer`.
        tokenizer: the model's tokenizer.
        data: the data folder.
        max_tokens: largest number of tokens in a prompt and its answer; longer rows are refused.

    Returns:
        The task.

    Raises:
        DataError: the data set is unknown.
        TaskError: its rows are not prompts, or the tokenizer has no token that ends a text.
    """
    return GenerationTask(dataset(name, data), tokenizer, data=data, max_tokens=max_tokens)


class GenerationTask(TokenizedTask[TextPrediction]):
    """A task with the likelihood of an answer's tokens after its prompt (see the module docstring)."""

    row = PromptRow
    families = ("causal",)
    auto_model = AutoModelForCausalLM
    has_temperature = False

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        if spec.row is not PromptRow:
            raise TaskError(f"data set {spec.name}: found {spec.row.noun} rows, expected rows with 'prompt'")
        if tokenizer.eos_token_id is None:
            raise TaskError("the tokenizer has no eos_token, which ends an answer: set tokenizer.eos_token")
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)
        self.columns = 1
        self.encoding = {"return_special_tokens_mask": True}

    def sequences(self, row: AnyRow) -> list[Text]:
        """Return the prompt alone and with its answer."""
        assert isinstance(row, PromptRow)
        prompt: Any = row.prompt
        if not isinstance(prompt, str):
            if not self.tokenizer.chat_template:
                raise row.fault("messages", "messages", "a string: the tokenizer has no chat template")
            messages = [dict(message) for message in prompt]
            try:
                prompt = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # whatever the template raises
                found = f"messages that the chat template refuses ({one_line(error)})"
                raise row.fault("messages", found, "a chat that the template accepts") from error
        return [(prompt, None), (prompt + (row.answer or ""), None)]

    def encoded(self, row: AnyRow, encodings: list[dict[str, list[int]]]) -> dict[str, Any]:
        assert isinstance(row, PromptRow)
        kept = without_appended if isinstance(row.prompt, str) else without_added  # a chat has the template's own
        context, (_, answer) = beyond_common_prefix([kept(encoding) for encoding in encodings])
        if not context:
            raise row.fault("prompt", "a prompt without a token before the answer", "at least one")
        return {"context": context, "answer": [*answer, self.tokenizer.eos_token_id]}

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["context"]) + len(example["answer"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `position_ids` and `label_ids`, all padded on the left."""
        sequences = [example["context"] + example["answer"] for example in examples]
        return {
            **left_padded(sequences, self.pad_id),
            "label_ids": pad([example["answer"] for example in examples], -1, left=True),
            **labels_of(examples),
        }

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        """Return the log-likelihood of each answer."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        return sequence_log_probs(model, inputs, batch["label_ids"]).unsqueeze(1)

    def row_loss(self, outputs: Float[Tensor, "rows columns"], batch: dict[str, Tensor]) -> Float[Tensor, " rows"]:
        """Return -log p(answer | prompt) of each row, in nats, summed over its tokens.

        Raises:
            TaskError: the batch has no labels.
        """
        if "labels" not in batch:
            raise TaskError("loss: found a batch without labels, expected rows with answers")
        return -outputs[:, 0]

    def prediction(
        self,
        outputs: Float[Tensor, "slices rows columns"],
        rows: Sequence[AnyRow],
        *,
        draws: int,
        seed: int,
        temperature: float = 1.0,
    ) -> TextPrediction:
        """Return the likelihoods of every draw. `temperature` is not used: this task has none, so none is fitted."""
        examples: list[Any] = self._tokenize(rows)
        counts = [None if example["label"] is None else len(example["answer"]) for example in examples]
        return TextPrediction(
            ids=tuple(row.id for row in rows),
            draw_log_likelihoods=outputs[..., 0],
            tokens=None if None in counts else torch.tensor(counts),
            draws=draws,
            seed=seed,
            task=self.name,
        )
