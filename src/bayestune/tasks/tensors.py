"""Lists of token ids and labels as padded tensors."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def pad(sequences: Sequence[Sequence[int]], value: int, *, left: bool) -> Int[Tensor, "sequences tokens"]:
    """Return sequences of any lengths as one int64 tensor, padded with `value` on the left or on the right."""
    width = max(len(sequence) for sequence in sequences)
    fill = [[value] * (width - len(sequence)) for sequence in sequences]
    if left:
        return torch.tensor([[*blank, *sequence] for blank, sequence in zip(fill, sequences, strict=True)])
    return torch.tensor([[*sequence, *blank] for blank, sequence in zip(fill, sequences, strict=True)])


def left_padded(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, Int[Tensor, "sequences tokens"]]:
    """Return `input_ids`, `attention_mask` and `position_ids`, padded on the left; positions count real tokens."""
    mask = pad([[1] * len(sequence) for sequence in sequences], 0, left=True)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": pad(sequences, pad_id, left=True), "attention_mask": mask, "position_ids": positions}


def pad_encodings(encodings: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Return a tokenizer's outputs (`input_ids`, `attention_mask`, ...) as tensors padded on the right.

    The padding is on the right whatever the tokenizer's setting, since encoders count positions from the first token.
    """
    return {
        key: pad([encoding[key] for encoding in encodings], pad_id if key == "input_ids" else 0, left=False)
        for key in encodings[0]
    }


def labels_of(examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
    """Return `{"labels": [rows]}`, or an empty dict unless every example has a label."""
    labels = [example["label"] for example in examples]
    return {} if None in labels else {"labels": torch.tensor(labels)}


def widen(logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return half-precision logits as float32, so that log-probabilities are accurate; keep other types."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
