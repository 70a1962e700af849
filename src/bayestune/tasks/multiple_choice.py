"""Multiple choice: for causal language models, by the answer labels' logits; for encoders, one sequence a choice."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from bayestune.errors import BayestuneWarning, TaskError
from bayestune.tasks.base import Task, check_padding, labels_of, pad, pad_encodings, widen
from bayestune.tasks.data import AnyRow, Row, shown
from bayestune.tasks.datasets import DatasetSpec, dataset


def multiple_choice(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 300,
    classes: int | None = None,
) -> Task:
    """Multiple choice for a causal language model, zero-shot (the task of BLoB, arXiv 2406.11675).

    Args:
        name: a known data set, or a folder of yours in `data`. data: the data folder; None for the Hugging Face Hub.
        max_tokens: longest prompt with its label; longer rows are refused.
        classes: of a data set of yours; by default counted over its files.

    Raises:
        DataError: unknown data set. TaskError: not multiple choice, or labels that this tokenizer cannot tell apart.
    """
    return CausalMultipleChoice(dataset(name, data, classes=classes), tokenizer, data=data, max_tokens=max_tokens)


def encoder_multiple_choice(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 300,
    classes: int | None = None,
) -> Task:
    """Multiple choice for AutoModelForMultipleChoice; arguments and errors as in `multiple_choice`."""
    return EncoderMultipleChoice(dataset(name, data, classes=classes), tokenizer, data=data, max_tokens=max_tokens)


def beyond_common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The longest prefix that all sequences share, and what each has after it."""
    shared = 0
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        shared += 1
    return list(sequences[0][:shared]), [list(sequence[shared:]) for sequence in sequences]


def _choice_mask(counts: Sequence[int]) -> Bool[Tensor, "rows choices"]:
    return torch.arange(max(counts)) < torch.tensor(counts).unsqueeze(1)


def _with_filler(choices: list[Any], count: int) -> list[Any]:
    """Choices filled up to `count` with copies of the first: masked later, they keep an absent choice free of NaN."""
    return choices + choices[:1] * (count - len(choices))


def _mask_absent(
    logits: Float[Tensor, "rows choices"], present: Bool[Tensor, "rows choices"], classes: int
) -> Float[Tensor, "rows classes"]:
    masked = logits.masked_fill(~present, float("-inf"))
    return F.pad(masked, (0, classes - logits.shape[1]), value=float("-inf"))


def _refuse_sentences(spec: DatasetSpec) -> None:
    if spec.kind != "choice":
        raise TaskError(f"data set {spec.name}: found sentences, expected choices; use tasks.classification")


class CausalMultipleChoice(Task):
    r"""Logits of the answer labels at the answer position.

    With s_c = tokenise(prompt + label_c) and p the longest prefix that all s_c share, the logit of choice c is

        sum over tokens t of s_c beyond p of log p_model(t | everything before it).

    All labels are scored after the *same* context p, so the logits compare like with like however the tokenizer treats
    the boundary: where it merges ":" with the label, p ends before ":"; where every label starts with the same token,
    that token is in p (it would add the same to all logits). When every s_c has one token beyond p, the raw logits of
    these tokens at the last position of p differ from the sums above by a constant a row, and one forward a row gives
    them all.
    """

    kind = "choice"

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        _refuse_sentences(spec)
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)
        choices = spec.fixed_choices or tuple(f"text {letter}" for letter in ascii_uppercase[: spec.classes])
        problem = self._scored(Row(id="probe", question="Which _ is it?", choices=choices, answer=None))[2]
        if problem is not None:
            raise TaskError(f"data set {spec.name}: this tokenizer cannot score it: {problem}; use another tokenizer")

    def prompt(self, row: Row) -> str:
        """The zero-shot prompt, up to and with "Answer:"."""
        passage = "" if row.passage is None else f"Passage: {row.passage}\n"
        if self.spec.fixed_choices is not None:
            words = " or ".join(self.spec.fixed_choices)
            return f"Answer the question with only {words}.\n{passage}Question: {row.question}\nAnswer:"
        choices = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, row.choices, strict=False))
        head = "Select one of the choices that answers the following question:"
        return f"{head}\n{passage}{row.question}\nChoices:\n{choices}\nAnswer:"

    def labels(self, row: Row) -> list[str]:
        """The text that answers with each choice: " A", " B", ..., or the choices themselves where they are fixed."""
        return [f" {label}" for label in self.spec.fixed_choices or ascii_uppercase[: len(row.choices)]]

    def _tokenise(self, texts: list[str]) -> list[list[int]]:
        """As the tokenizer does by default, less what it appends: a final EOS would be scored as part of the label."""
        encoded = self.tokenizer(
            texts, padding=False, truncation=False, return_special_tokens_mask=True, verbose=False
        )
        sequences = []
        for ids, special in zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True):
            end = len(ids)
            while end > 0 and special[end - 1]:
                end -= 1
            sequences.append(ids[:end])
        return sequences

    def _scored(self, row: Row) -> tuple[list[int], list[list[int]], str | None]:
        """Context, the tokens of each label beyond it, and what makes them useless as scores, if anything does."""
        prompt, labels = self.prompt(row), self.labels(row)
        context, scored = beyond_common_prefix(self._tokenise([prompt + label for label in labels]))
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

    def example(self, row: AnyRow) -> dict[str, Any]:
        self.spec.check(row)
        self.refuse_if_empty(row)
        assert isinstance(row, Row)
        context, scored, problem = self._scored(row)
        if problem is not None:
            raise row.fault("question", f"a prompt whose answer cannot be scored ({problem})", "distinct labels")
        example = {"id": row.id, "context": context, "scored": scored, "label": row.target}
        self.refuse_if_too_long(row, self.tokens(example))
        return example

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["context"]) + max(len(ids) for ids in example["scored"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Padded on the left, with explicit positions.

        `input_ids`, `attention_mask`, `position_ids`: [rows, tokens], the contexts, when all labels of the batch have
        one token; else [rows, choices, tokens], context and label. `label_ids`: [rows, choices] or [rows, choices,
        label tokens], -1 where a label is shorter. `choice_mask`: [rows, choices], False for choices a row lacks.
        """
        present = _choice_mask([len(example["scored"]) for example in examples])
        count = present.shape[1]
        scored = [_with_filler(example["scored"], count) for example in examples]
        single = all(len(ids) == 1 for labels in scored for ids in labels)
        if single:
            sequences = [example["context"] for example in examples]
        else:
            sequences = [
                example["context"] + ids for example, labels in zip(examples, scored, strict=True) for ids in labels
            ]
        label_ids = pad([ids for labels in scored for ids in labels], -1, left=True)
        shape = (len(examples),) if single else (len(examples), count)
        mask = pad([[1] * len(sequence) for sequence in sequences], 0, left=True)
        return {
            "input_ids": pad(sequences, self.pad_id, left=True).unflatten(0, shape),
            "attention_mask": mask.unflatten(0, shape),
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).unflatten(0, shape),
            "label_ids": label_ids.view(len(examples), count) if single else label_ids.unflatten(0, shape),
            "choice_mask": present,
            **labels_of(examples),
        }

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows classes"]:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
        if batch["label_ids"].dim() == 2:
            last = widen(model(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1])
            return _mask_absent(last.gather(1, batch["label_ids"]), batch["choice_mask"], self.columns)
        flat = {key: tensor.flatten(0, 1) for key, tensor in inputs.items()}
        label_ids = batch["label_ids"].flatten(0, 1)
        width = label_ids.shape[1]
        # The logits at a position are those of the next token: one position earlier than the labels.
        logits = model(**flat, logits_to_keep=width + 1, use_cache=False).logits[:, -width - 1 : -1]
        log_probs = widen(logits).log_softmax(-1).gather(2, label_ids.clamp(min=0).unsqueeze(2)).squeeze(2)
        scores = log_probs.masked_fill(label_ids < 0, 0.0).sum(1)
        return _mask_absent(scores.view(batch["choice_mask"].shape), batch["choice_mask"], self.columns)


class EncoderMultipleChoice(Task):
    """One sequence a choice, scored by the head of AutoModelForMultipleChoice.

    The sequence is tokenizer(question, choice), the question after its passage where there is one. Where the question
    has a blank to fill (WinoGrande), it is the one sentence with the choice in the blank: ordinary text to an encoder.
    Choices that differ in their texts and not in their tokens (by letter case, for many a tokenizer) get the same
    probability: `examples` warns of such rows.
    """

    kind = "choice"

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        _refuse_sentences(spec)
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)

    def example(self, row: AnyRow) -> dict[str, Any]:
        self.spec.check(row)
        self.refuse_if_empty(row)
        assert isinstance(row, Row)
        if self.spec.blank:
            first, second = [row.question.replace("_", choice) for choice in row.choices], None
        else:
            question = row.question if row.passage is None else f"{row.passage}\n{row.question}"
            first, second = [question] * len(row.choices), list(row.choices)
        encoded = self.tokenizer(first, second, padding=False, truncation=False, verbose=False)
        encodings = [{key: encoded[key][choice] for key in encoded} for choice in range(len(row.choices))]
        example = {"id": row.id, "encodings": encodings, "label": row.target}
        self.refuse_if_too_long(row, self.tokens(example))
        return example

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        examples = super().examples(rows, model)
        ids = [row.id for row, example in zip(rows, examples, strict=True) if _alike(row, example)]
        if ids:
            warnings.warn(
                f"{len(ids)} of {len(rows)} rows of {self.name} have choices that differ and are the same to the "
                f"tokenizer, such as row {shown(ids[0])}: these choices get the same probability.",
                BayestuneWarning,
                stacklevel=2,
            )
        return examples

    def tokens(self, example: dict[str, Any]) -> int:
        return max(len(encoding["input_ids"]) for encoding in example["encodings"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What the tokenizer gives, [rows, choices, tokens], padded on the right; `choice_mask` [rows, choices]."""
        present = _choice_mask([len(example["encodings"]) for example in examples])
        flat = [one for example in examples for one in _with_filler(example["encodings"], present.shape[1])]
        inputs = {key: t.unflatten(0, tuple(present.shape)) for key, t in pad_encodings(flat, self.pad_id).items()}
        return {**inputs, "choice_mask": present, **labels_of(examples)}

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows classes"]:
        check_padding(model, batch["attention_mask"], self.pad_id)
        inputs = {key: tensor for key, tensor in batch.items() if key in self.tokenizer.model_input_names}
        return _mask_absent(widen(model(**inputs).logits), batch["choice_mask"], self.columns)


def _alike(row: AnyRow, example: dict[str, Any]) -> bool:
    """Whether fewer sequences than choices differ."""
    assert isinstance(row, Row)
    return len({tuple(one["input_ids"]) for one in example["encodings"]}) < len(set(row.choices))
