"""Multiple choice for causal language models, scored by the text of each choice; the choices share one sequence."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from bayestune.tasks.causal import (
    CausalChoice,
    beyond_common_prefix,
    difference,
    sequence_log_probs,
    takes_positions,
    tolerance,
    without_appended,
)
from bayestune.tasks.choices import choice_mask, mask_absent, warn_of_alike, with_filler
from bayestune.tasks.datasets import dataset
from bayestune.tasks.prompts import Prompt
from bayestune.tasks.rows import AnyRow, Row, shown
from bayestune.tasks.tensors import labels_of, left_padded, pad, widen
from bayestune.tasks.tokenized import Text


def text_choice(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    data: str | Path | None = None,
    max_tokens: int = 300,
    classes: int | None = None,
    prompt: Prompt | None = None,
) -> "CausalTextChoice":
    """Return a multiple-choice task for a causal language model that scores the text of each choice.

    Args:
        name: a known data set, or the name of a folder in `data`.
        tokenizer: the model's tokenizer.
        data: the data folder; None for the Hugging Face Hub.
        max_tokens: largest number of tokens in a prompt and a choice; longer rows are refused.
        classes: largest number of choices in your own data set; by default counted from its files.
        prompt: the prompt for a question; by default ``Prompt(scoring="text")``.

    Returns:
        The task.

    Raises:
        DataError: the data set is unknown.
        TaskError: the data set is not multiple choice.
        ConfigError: the tokenizer has no chat template for a chat prompt.
    """
    spec = dataset(name, data, classes=classes)
    return CausalTextChoice(spec, tokenizer, data=data, max_tokens=max_tokens, prompt=prompt)


class CausalTextChoice(CausalChoice):
    r"""Multiple choice scored by the log-probability of the text of each choice after the prompt.

    With s_c = tokenize(prompt + choice_c) and p the longest prefix that the prompt and all s_c share, the logit of
    choice c is

        sum over tokens t of s_c beyond p of log p_model(t | everything before it),

    or, with `text_per_byte`, this sum divided by the bytes of the choice, as in lm-evaluation-harness.

    A row is one sequence: p once, then the tokens of each choice as branches. A token of a branch attends to p and to
    the earlier tokens of its branch, and its position is the one that it has in s_c. Models that do not take
    positions, keep a state from token to token, or answer differently with such a mask (a probe with the longest rows
    compares the answers), get one sequence per choice.
    """

    scorings = ("text", "text_per_byte")
    packed = True
    """Whether all choices of a row share one sequence; it stays False once a model or a row does not support this."""

    def sequences(self, row: AnyRow) -> list[Text]:
        assert isinstance(row, Row)
        return [(self.prompt_text(row), None), *super().sequences(row)]

    def encoded(self, row: AnyRow, encodings: list[dict[str, list[int]]]) -> dict[str, Any]:
        assert isinstance(row, Row)
        context, (_, *branches) = beyond_common_prefix([without_appended(encoding) for encoding in encodings])
        if not context:
            raise row.fault("question", "a prompt without a token before the answer", "at least one")
        if context[:2] == [self.tokenizer.bos_token_id] * 2:
            raise row.fault("question", f"{shown(self.tokenizer.bos_token)} twice before the text", "it once")
        return {"context": context, "branches": branches, "texts": row.choices}

    def continuations(self, example: Mapping[str, Any]) -> list[list[int]]:
        return example["branches"]

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["context"]) + max(map(len, example["branches"]))

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        """Like `CausalChoice.examples`, but also choose between one sequence per row and one per choice."""
        base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
        self.packed = self.packed and takes_positions(model) and not base._is_stateful
        examples = super().examples(rows, model)
        if examples and self.packed:
            self.packed = self._packs(model, examples)
        same = [example["id"] for example in examples if _alike(example)]
        warn_of_alike(self.name, same, len(examples))
        return examples

    def _packs(self, model: Any, examples: Sequence[dict[str, Any]]) -> bool:
        """Return whether the model gives the same log-probabilities with one sequence per row and one per choice.

        They are compared on the longest row, and on the row with the longest choice, whose tokens see each other.
        """
        longest = max(examples, key=self.tokens)
        window = model.config.get_text_config().to_dict().get("sliding_window")
        if window is not None and self.tokens(longest) > window:
            return False
        for example in (longest, max(examples, key=lambda e: max(map(len, e["branches"])))):
            apart = self.mean_log_probs(model, self._collate_apart([example]))
            try:
                packed = self.mean_log_probs(model, self._collate_packed([example]))
            except (IndexError, RuntimeError, TypeError, ValueError):  # it does not take a mask of four dimensions
                return False
            if difference(apart, packed) > tolerance(model, apart):
                return False
        return True

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return the batch of `_collate_packed` or, for models that need it, of `_collate_apart`."""
        return self._collate_packed(examples) if self.packed else self._collate_apart(examples)

    def _shared(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        lengths = [torch.tensor([len(text.encode()) for text in example["texts"]]) for example in examples]
        mask = choice_mask([len(example["branches"]) for example in examples])
        return {"bytes": pad_sequence(lengths, True, 1), "choice_mask": mask, **labels_of(examples)}

    def _collate_packed(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return tensors [rows, tokens], padded on the left: `input_ids`, `position_ids`, `branch` and `before`.

        `branch` is -1 for padding, 0 for the prompt, and c + 1 for choice c. `before` is the index, counted from the
        end, of the token that comes before each token in its text.
        """
        ids, positions, branch, before = [], [], [], []
        for example in examples:
            start = len(example["context"])
            lengths = [len(tokens) for tokens in example["branches"]]
            ids.append([*example["context"], *(token for tokens in example["branches"] for token in tokens)])
            positions.append([*range(start), *(start + i for length in lengths for i in range(length))])
            branch.append([0] * start + [c + 1 for c, length in enumerate(lengths) for _ in range(length)])
            total = len(ids[-1])
            first = {start + sum(lengths[:c]) for c in range(len(lengths)) if lengths[c]}
            before.append([(start - 1 if i in first else i - 1) - total for i in range(total)])
        return {
            "input_ids": pad(ids, self.pad_id, left=True),
            "position_ids": pad(positions, 0, left=True),
            "branch": pad(branch, -1, left=True),
            "before": pad(before, -1, left=True),
            **self._shared(examples),
        }

    def _collate_apart(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask`, `position_ids`, `label_ids`, [rows, choices, tokens], padded left."""
        count = max(len(example["branches"]) for example in examples)
        branches = [with_filler(example["branches"], count) for example in examples]
        sequences = [
            example["context"] + ids for example, several in zip(examples, branches, strict=True) for ids in several
        ]
        flat = {
            **left_padded(sequences, self.pad_id),
            "label_ids": pad([ids for several in branches for ids in several], -1, left=True),
        }
        return {key: t.unflatten(0, (len(examples), count)) for key, t in flat.items()} | self._shared(examples)

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        scores = self._packed_scores(model, batch) if "branch" in batch else self._scores_apart(model, batch)
        if self.prompt.scoring == "text_per_byte":
            scores = scores / batch["bytes"]
        return mask_absent(scores, batch["choice_mask"], self.columns)

    def _packed_scores(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows choices"]:
        branch = batch["branch"]
        answers = branch > 0
        width = int(answers.sum(1).max())
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(branch.shape[0], 1, branch.shape[1], branch.shape[1], dtype=dtype, device=branch.device)
        mask.masked_fill_(~tree_attention(branch).unsqueeze(1), torch.finfo(dtype).min)
        logits = widen(
            model(
                input_ids=batch["input_ids"],
                attention_mask=mask,
                position_ids=batch["position_ids"],
                logits_to_keep=width + 1,  # the branches are last, after the end of the prompt
                use_cache=False,
            ).logits
        )
        rows = torch.arange(len(branch), device=branch.device).unsqueeze(1)
        place = batch["before"][:, -width:] + width + 1
        log_probs = logits[rows, place, batch["input_ids"][:, -width:]] - logits.logsumexp(-1)[rows, place]
        tail = branch[:, -width:].clamp(min=0)
        sums = log_probs.new_zeros(len(branch), batch["choice_mask"].shape[1] + 1)
        return sums.scatter_add(1, tail, log_probs.masked_fill(tail == 0, 0.0))[:, 1:]

    def _scores_apart(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows choices"]:
        inputs = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask", "position_ids")}
        scores = sequence_log_probs(model, inputs, batch["label_ids"].flatten(0, 1))
        return scores.view(batch["choice_mask"].shape)


def _alike(example: dict[str, Any]) -> bool:
    return len(set(map(tuple, example["branches"]))) < len(set(example["texts"]))


def tree_attention(branch: Tensor) -> Bool[Tensor, "rows tokens tokens"]:
    """Return which tokens each token attends to: earlier ones of the prompt (0) and of its own branch, and itself."""
    tokens = branch.shape[1]
    earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=branch.device).tril()
    ours = (branch.unsqueeze(1) == branch.unsqueeze(2)) | (branch.unsqueeze(1) == 0)
    return earlier & ours
