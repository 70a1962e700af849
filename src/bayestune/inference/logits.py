"""`Logits`: every next-token logit of a causal language model, under the draws of a sampler."""

from typing import Any

from jaxtyping import Float
from torch import Tensor


class Logits:
    """Takes the place of a task in `Sampler.outputs`, for texts instead of rows.

    Args:
        last: number of positions to return at the end of each text; 0 for all.
    """

    def __init__(self, last: int = 0) -> None:
        self.last = last

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "texts tokens vocabulary"]:
        kept = {"logits_to_keep": self.last} if self.last else {}  # some models do not take it
        return model(**batch, **kept, use_cache=False).logits
