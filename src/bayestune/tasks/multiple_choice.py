"""Multiple choice for causal language models, scored by the logits of the answer labels."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bayestune.errors import BayestuneWarning, ConfigError, TaskError
from bayestune.tasks.causal import CausalChoice, beyond_common_prefix, sequence_log_probs, without_appended
from bayestune.tasks.choices import choice_mask, mask_absent, with_filler
from bayestune.tasks.datasets import DatasetSpec, dataset
from bayestune.tasks.prompts import Prompt
from bayestune.tasks.rows import AnyRow, Row, shown
from bayestune.tasks.tensors import labels_of, left_padded, pad, widen

PROBED = 50
"""The number of rows that the untrained model is asked."""


def multiple_choice(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 300,
    classes: int | None = None,
    prompt: Prompt | None = None,
) -> "CausalMultipleChoice":
    """Return a multiple-choice task for a causal language model that scores labels (BLoB, section 4.2 and appendix B).

    Args:
        name: a known data set, or the name of a folder in `data`.
        tokenizer: the model's tokenizer.
        data: the data folder; None for the Hugging Face Hub.
        max_tokens: largest number of tokens in a prompt and its label; longer rows are refused.
        classes: largest number of choices in your own data set; by default counted from its files.
        prompt: the prompt for a question; by default the paper's.

    Returns:
        The task.

    Raises:
        DataError: the data set is unknown.
        TaskError: the data set is not multiple choice, or the tokenizer cannot tell its labels apart.
        ConfigError: there are too few label words, or there is no chat template for a chat prompt.
    """
    spec = dataset(name, data, classes=classes)
    return CausalMultipleChoice(spec, tokenizer, data=data, max_tokens=max_tokens, prompt=prompt)


class CausalMultipleChoice(CausalChoice):
    r"""Multiple choice scored by the logits of the answer labels at the answer position.

    With s_c = tokenize(prompt + label_c) and p the longest prefix that all s_c share, the logit of choice c is

        sum over tokens t of s_c beyond p of log p_model(t | everything before it).

    All labels are scored after the *same* context p, so the logits are comparable however the tokenizer treats the
    boundary. If it merges ":" with the label, p ends before ":". If every label starts with the same token, that token
    is in p (it would add the same to all logits). If every s_c has one token beyond p, the raw logits of these tokens
    at the last position of p differ from the sums above by a constant per row, and one forward pass per row gives them
    all.
    """

    scorings = ("letters",)

    def __init__(self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
        super().__init__(spec, tokenizer, **options)
        words = self.prompt.words
        if words is not None and len(words) < spec.classes:
            raise ConfigError(f"label_words: found {len(words)}, expected {spec.classes}, the choices of {spec.name}.")
        choices = spec.fixed_choices or tuple(f"text {letter}" for letter in ascii_uppercase[: spec.classes])
        probe = Row(id="probe", question="Which _ is it?", choices=choices, answer=None)
        problem = self._scored(probe, self.encode(self.sequences(probe)))[2]
        if problem is not None:
            raise TaskError(
                f"data set {spec.name}: this tokenizer cannot score it: {problem}; choose other labels with "
                "--label-words, or use another tokenizer"
            )

    def advise(self, model: nn.Module, rows: Sequence[AnyRow]) -> None:
        """Warn if the model answers the first 50 rows no better than chance plus two standard errors."""
        examples = self.examples(rows[:PROBED], model)
        if len(examples) < PROBED:
            return
        parts = [self.collate(examples[start : start + 10]) for start in range(0, PROBED, 10)]
        right = sum(int((self.mean_log_probs(model, p).argmax(-1).cpu() == p["labels"]).sum()) for p in parts)
        chance = sum(1 / len(example["scored"]) for example in examples) / PROBED
        if right / PROBED < chance + 2 * math.sqrt(chance * (1 - chance) / PROBED):
            warnings.warn(
                f"before training the model answers {right} of {PROBED} training rows of {self.name} by label, where "
                f"chance is {chance * PROBED:.0f}: it may not bind labels to choices. --scoring text scores texts.",
                BayestuneWarning,
                stacklevel=2,
            )

    def _scored(
        self, row: Row, encodings: list[dict[str, list[int]]]
    ) -> tuple[list[int], list[list[int]], str | None]:
        """Return the context, the tokens of each label after it, and why they cannot be scored (None if they can)."""
        labels = self.answers(row)
        context, scored = beyond_common_prefix([without_appended(encoding) for encoding in encodings])
        if not context:
            return context, scored, "no token comes before the label"
        if context[:2] == [self.tokenizer.bos_token_id] * 2:
            return context, scored, f"it puts {shown(self.tokenizer.bos_token)} before a text twice"
        for first, label in enumerate(labels):
            if self.tokenizer.unk_token_id is not None and self.tokenizer.unk_token_id in scored[first]:
                return context, scored, f"label {shown(label)} becomes an unknown token"
            for second, other in enumerate(labels):
                if first != second and scored[second][: len(scored[first])] == scored[first]:
                    return context, scored, f"the tokens of {shown(label)} are, or begin, those of {shown(other)}"
        return context, scored, None

    def encoded(self, row: AnyRow, encodings: list[dict[str, list[int]]]) -> dict[str, Any]:
        assert isinstance(row, Row)
        context, scored, problem = self._scored(row, encodings)
        if problem is not None:
            raise row.fault("question", f"a prompt whose answer cannot be scored ({problem})", "distinct labels")
        return {"context": context, "scored": scored}

    def continuations(self, example: Mapping[str, Any]) -> list[list[int]]:
        return example["scored"]

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["context"]) + max(len(ids) for ids in example["scored"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return a batch padded on the left, with explicit positions.

        `input_ids`, `attention_mask`, `position_ids`: [rows, tokens], the contexts, if all labels of the batch have
        one token; otherwise [rows, choices, tokens], context and label. `label_ids`: [rows, choices] or
        [rows, choices, label tokens], padded with -1. `choice_mask`: [rows, choices], False for absent choices.
        """
        present = choice_mask([len(example["scored"]) for example in examples])
        count = present.shape[1]
        scored = [with_filler(example["scored"], count) for example in examples]
        single = all(len(ids) == 1 for labels in scored for ids in labels)
        if single:
            sequences = [example["context"] for example in examples]
        else:
            sequences = [
                example["context"] + ids for example, labels in zip(examples, scored, strict=True) for ids in labels
            ]
        label_ids = pad([ids for labels in scored for ids in labels], -1, left=True)
        shape = (len(examples),) if single else (len(examples), count)
        return {
            **{key: tensor.unflatten(0, shape) for key, tensor in left_padded(sequences, self.pad_id).items()},
            "label_ids": label_ids.view(len(examples), count) if single else label_ids.unflatten(0, shape),
            "choice_mask": present,
            **labels_of(examples),
        }

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
        if batch["label_ids"].dim() == 2:
            last = widen(model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1])
            return mask_absent(last.gather(1, batch["label_ids"]), batch["choice_mask"], self.columns)
        flat = {key: tensor.flatten(0, 1) for key, tensor in inputs.items()}
        label_ids = batch["label_ids"].flatten(0, 1)
        scores = sequence_log_probs(model, flat, label_ids)
        return mask_absent(scores.view(batch["choice_mask"].shape), batch["choice_mask"], self.columns)
