"""`CausalChoice`: what the multiple-choice tasks of causal language models share."""

import dataclasses
import inspect
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from bayestune.errors import ConfigError, TaskError
from bayestune.tasks.choices import refuse_others
from bayestune.tasks.classes import ClassTask, Prediction
from bayestune.tasks.datasets import DatasetSpec
from bayestune.tasks.prompts import Prompt, Scoring
from bayestune.tasks.rows import AnyRow, Row
from bayestune.tasks.tensors import widen
from bayestune.tasks.tokenized import Text, TokenizedTask


class CausalChoice(TokenizedTask[Prediction], ClassTask):
    """Multiple choice by the next tokens of a causal language model.

    Attributes:
        prompt: the prompt that puts a question to the model.
    """

    row = Row
    families = ("causal",)
    auto_model = AutoModelForCausalLM
    scorings: ClassVar[tuple[Scoring, ...]]

    def __init__(
        self,
        spec: DatasetSpec,
        tokenizer: PreTrainedTokenizerBase,
        *,
        data: str | Path | None,
        max_tokens: int,
        prompt: Prompt | None = None,
    ) -> None:
        refuse_others(spec)
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)
        self.prompt = prompt or Prompt(scoring=self.scorings[0])
        self.prompt.check(tokenizer)
        self.worked = self.prompt.shots
        self.encoding = {"return_special_tokens_mask": True, "add_special_tokens": self.prompt.special_tokens}
        if self.worked:
            self.shot_tokens = self._checked_shots()

    def _checked_shots(self) -> int:
        """Return the number of tokens of the shots; raise an error if they leave no room for a question."""
        bare = dataclasses.replace(self.prompt, shots=())
        texts = [prompt.text(self.prompt.shots[0], self.spec, self.tokenizer) for prompt in (self.prompt, bare)]
        whole, alone = (len(each["input_ids"]) for each in self.encode([(text, None) for text in texts]))
        if whole - alone >= self.max_tokens:
            raise ConfigError(
                f"shots: found {len(self.worked)} with {whole - alone} tokens in total, expected fewer than "
                f"{self.max_tokens} (max_tokens, or the tokenizer's own limit); show fewer, or raise max_tokens."
            )
        return whole - alone

    def prompt_text(self, row: Row) -> str:
        """Return the whole text before the answer to a question."""
        return self.prompt.text(row, self.spec, self.tokenizer)

    def answers(self, row: Row) -> list[str]:
        """Return the text that is scored for each choice, as it follows the prompt."""
        return self.prompt.answers(row, self.spec)

    def sequences(self, row: AnyRow) -> list[Text]:
        """Return the prompt with each of its answers."""
        assert isinstance(row, Row)
        prompt = self.prompt_text(row)
        return [(prompt + answer, None) for answer in self.answers(row)]

    @abstractmethod
    def continuations(self, example: Mapping[str, Any]) -> list[list[int]]:
        """Return the tokens of each choice, which follow those in `example["context"]`."""

    @property
    def shift_invariant(self) -> bool:
        """Whether adding a constant to the log-probabilities of a row's choices leaves its prediction unchanged."""
        return self.prompt.scoring != "text_per_byte"

    def scored(
        self, example: Mapping[str, Any], log_probs: Float[Tensor, "*draws choices"]
    ) -> Float[Tensor, "*draws choices"]:
        """Return the logits of the choices from the log-probabilities of their tokens, summed."""
        if self.shift_invariant:
            return log_probs
        return log_probs / torch.tensor([len(text.encode()) for text in example["texts"]])

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        """Like `TokenizedTask.examples`, but also check that padding does not change the model's answers.

        Raises:
            TaskError: the model ignores `position_ids`, and its answer to a row depends on the padding before it.
        """
        examples = super().examples(rows, model)
        if examples and not takes_positions(model):
            self._check_padding(model, min(examples, key=self.tokens), max(examples, key=self.tokens))
        return examples

    def _check_padding(self, model: nn.Module, short: dict[str, Any], long: dict[str, Any]) -> None:
        """Raise an error if the mean's outputs for the shortest row change when the longest row is in the batch."""
        alone, beside = (self.mean_log_probs(model, self.collate(batch))[0] for batch in ([short], [short, long]))
        moved = difference(alone, beside)
        if moved > tolerance(model, alone):
            raise TaskError(
                f"the model ignores position_ids and counts the padding before a text as positions: found its outputs "
                f"moved by {moved:.2g} beside a longer row, expected no change; use a model that takes position_ids"
            )

    @torch.no_grad()
    def mean_log_probs(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "rows columns"]:
        """Return the log-probabilities of the choices at the mean of the weights, in evaluation mode."""
        device = next(model.parameters()).device
        with _evaluating(model):
            return self.outputs(model, {key: tensor.to(device) for key, tensor in batch.items()}).log_softmax(-1)


def beyond_common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Return the longest prefix that all sequences share, and the rest of each sequence."""
    shared = 0
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        shared += 1
    return list(sequences[0][:shared]), [list(sequence[shared:]) for sequence in sequences]


def without_appended(encoding: Mapping[str, list[int]]) -> list[int]:
    """Return the ids without those that the tokenizer appends: a final EOS would be scored as part of the label."""
    ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
    end = len(ids)
    while end > 0 and special[end - 1]:
        end -= 1
    return ids[:end]


def without_added(encoding: Mapping[str, list[int]]) -> list[int]:
    """Return the ids without the special tokens that the tokenizer adds: a chat template writes its own."""
    ids, special = without_appended(encoding), encoding["special_tokens_mask"]
    start = next((place for place, added in enumerate(special) if not added), len(ids))
    return ids[start:]


def sequence_log_probs(
    model: Any, inputs: Mapping[str, Tensor], label_ids: Int[Tensor, "sequences labels"]
) -> Float[Tensor, " sequences"]:
    """Return the summed log p of the last tokens of each sequence, the `label_ids`; ids of -1 are left out."""
    width = label_ids.shape[1]
    # The logits at a position are those of the next token: one position earlier than the labels.
    logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, -width - 1 : -1]
    log_probs = widen(logits).log_softmax(-1).gather(2, label_ids.clamp(min=0).unsqueeze(2)).squeeze(2)
    return log_probs.masked_fill(label_ids < 0, 0.0).sum(1)


def takes_positions(model: nn.Module) -> bool:
    """Return whether a model takes the position of each token (`position_ids`)."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return "position_ids" in inspect.signature(base.forward).parameters


def difference(one: Float[Tensor, "*shape"], other: Float[Tensor, "*shape"]) -> Tensor:
    """Return the largest difference between two tensors of log-probabilities, over the choices that are present."""
    present = one.isfinite()
    return (one - other)[present].abs().max()


def tolerance(model: nn.Module, log_probs: Float[Tensor, "*shape"]) -> Tensor:
    """Return how far two computations of the same log-probabilities may differ in the model's precision."""
    scale = log_probs[log_probs.isfinite()].abs().max()
    eps = torch.finfo(next(model.parameters()).dtype).eps
    return scale * (math.sqrt(eps) if eps < 1e-4 else 4 * eps)  # half precision is too coarse for a square root


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
