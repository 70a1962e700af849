"""Multiple choice for causal language models, scored by the logits of the answer labels."""

import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from bayestune.errors import TaskError
from bayestune.tasks.choices import choice_mask, mask_absent, refuse_sentences, with_filler
from bayestune.tasks.classes import ClassTask, Prediction
from bayestune.tasks.datasets import DatasetSpec, dataset
from bayestune.tasks.rows import AnyRow, Row, shown
from bayestune.tasks.tensors import labels_of, pad, widen
from bayestune.tasks.tokenized import Text, TokenizedTask


def multiple_choice(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 300,
    classes: int | None = None,
) -> "CausalMultipleChoice":
    """Return a zero-shot multiple-choice task for a causal language model (BLoB, section 4.2 and appendix B).

    Args:
        name: a known data set, or the name of a folder in `data`.
        tokenizer: of the model.
        data: the data folder; None for the Hugging Face Hub.
        max_tokens: longest prompt with its label; longer rows are refused.
        classes: largest number of choices in your own data set; by default counted from its files.

    Returns:
        The task.

    Raises:
        DataError: unknown data set.
        TaskError: the data set is not multiple choice, or the tokenizer cannot tell its labels apart.
    """
    return CausalMultipleChoice(dataset(name, data, classes=classes), tokenizer, data=data, max_tokens=max_tokens)


def beyond_common_prefix(sequences: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """The longest prefix that all sequences share, and what each has after it."""
    shared = 0
    for ids in zip(*sequences, strict=False):
        if len(set(ids)) > 1:
            break
        shared += 1
    return list(sequences[0][:shared]), [list(sequence[shared:]) for sequence in sequences]


def _without_appended(encoding: Mapping[str, list[int]]) -> list[int]:
    """The ids without what the tokenizer appends: a final EOS would be scored as part of the label."""
    ids, special = encoding["input_ids"], encoding["special_tokens_mask"]
    end = len(ids)
    while end > 0 and special[end - 1]:
        end -= 1
    return ids[:end]


class CausalMultipleChoice(TokenizedTask[Prediction], ClassTask):
    r"""Logits of the answer labels at the answer position.

    With s_c = tokenise(prompt + label_c) and p the longest prefix that all s_c share, the logit of choice c is

        sum over tokens t of s_c beyond p of log p_model(t | everything before it).

    All labels are scored after the *same* context p, so the logits compare like with like however the tokenizer treats
    the boundary: where it merges ":" with the label, p ends before ":"; where every label starts with the same token,
    that token is in p (it would add the same to all logits). When every s_c has one token beyond p, the raw logits of
    these tokens at the last position of p differ from the sums above by a constant a row, and one forward a row gives
    them all.
    """

    row = Row
    families = ("causal",)
    auto_model = AutoModelForCausalLM
    encoding: ClassVar[Mapping[str, Any]] = {"return_special_tokens_mask": True}

    def __init__(
        self, spec: DatasetSpec, tokenizer: PreTrainedTokenizerBase, *, data: str | Path | None, max_tokens: int
    ) -> None:
        refuse_sentences(spec)
        super().__init__(spec, tokenizer, data=data, max_tokens=max_tokens)
        choices = spec.fixed_choices or tuple(f"text {letter}" for letter in ascii_uppercase[: spec.classes])
        probe = Row(id="probe", question="Which _ is it?", choices=choices, answer=None)
        problem = self._scored(probe, self.encode(self.sequences(probe)))[2]
        if problem is not None:
            raise TaskError(f"data set {spec.name}: this tokenizer cannot score it: {problem}; use another tokenizer")

    def prompt(self, row: Row) -> str:
        """Return the zero-shot prompt, which ends with "Answer:"."""
        passage = "" if row.passage is None else f"Passage: {row.passage}\n"
        if self.spec.fixed_choices is not None:
            words = " or ".join(self.spec.fixed_choices)
            return f"Answer the question with only {words}.\n{passage}Question: {row.question}\nAnswer:"
        choices = "\n".join(f"{letter}) {text}" for letter, text in zip(ascii_uppercase, row.choices, strict=False))
        head = "Select one of the choices that answers the following question:"
        return f"{head}\n{passage}{row.question}\nChoices:\n{choices}\nAnswer:"

    def answer_labels(self, row: Row) -> list[str]:
        """Return the text that stands for each choice: " A", " B", ..., or the choice itself if choices are fixed."""
        return [f" {label}" for label in self.spec.fixed_choices or ascii_uppercase[: len(row.choices)]]

    def sequences(self, row: AnyRow) -> list[Text]:
        assert isinstance(row, Row)
        prompt = self.prompt(row)
        return [(prompt + label, None) for label in self.answer_labels(row)]

    def _scored(
        self, row: Row, encodings: list[dict[str, list[int]]]
    ) -> tuple[list[int], list[list[int]], str | None]:
        """The context, the tokens of each label beyond it, and what makes them useless as scores, if anything."""
        labels = self.answer_labels(row)
        context, scored = beyond_common_prefix([_without_appended(encoding) for encoding in encodings])
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

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        """As `TokenizedTask.examples`.

        Raises:
            TaskError: the model ignores `position_ids`, and its answer to a row depends on the padding before it.
        """
        examples = super().examples(rows, model)
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if examples and "position_ids" not in inspect.signature(base.forward).parameters:
            self._check_padding(model, min(examples, key=self.tokens), max(examples, key=self.tokens))
        return examples

    @torch.no_grad()
    def _check_padding(self, model: nn.Module, short: dict[str, Any], long: dict[str, Any]) -> None:
        """Refuse a model whose outputs at the mean change when the longest row stands beside the shortest."""
        modes, device = [(module, module.training) for module in model.modules()], next(model.parameters()).device
        model.eval()
        try:
            alone, beside = (
                self.outputs(model, {k: tensor.to(device) for k, tensor in self.collate(batch).items()})[
                    0
                ].log_softmax(-1)
                for batch in ([short], [short, long])
            )
        finally:
            for module, training in modes:
                module.training = training
        present = alone.isfinite()
        tolerance = math.sqrt(torch.finfo(next(model.parameters()).dtype).eps) * alone[present].abs().max()
        moved = (alone - beside)[present].abs().max()
        if moved > tolerance:
            raise TaskError(
                f"the model ignores position_ids and counts the padding before a text as positions: found its outputs "
                f"moved by {moved:.2g} beside a longer row, expected no change; use a model that takes position_ids"
            )

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["context"]) + max(len(ids) for ids in example["scored"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Padded on the left, with explicit positions.

        `input_ids`, `attention_mask`, `position_ids`: [rows, tokens], the contexts, when all labels of the batch have
        one token; else [rows, choices, tokens], context and label. `label_ids`: [rows, choices] or [rows, choices,
        label tokens], -1 where a label is shorter. `choice_mask`: [rows, choices], False for choices a row lacks.
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
        mask = pad([[1] * len(sequence) for sequence in sequences], 0, left=True)
        return {
            "input_ids": pad(sequences, self.pad_id, left=True).unflatten(0, shape),
            "attention_mask": mask.unflatten(0, shape),
            "position_ids": (mask.cumsum(-1) - 1).clamp(min=0).unflatten(0, shape),
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
        width = label_ids.shape[1]
        # The logits at a position are those of the next token: one position earlier than the labels.
        logits = model(**flat, logits_to_keep=width + 1, use_cache=False).logits[:, -width - 1 : -1]
        log_probs = widen(logits).log_softmax(-1).gather(2, label_ids.clamp(min=0).unsqueeze(2)).squeeze(2)
        scores = log_probs.masked_fill(label_ids < 0, 0.0).sum(1)
        return mask_absent(scores.view(batch["choice_mask"].shape), batch["choice_mask"], self.columns)
