"""Maximum a posteriori: plain LoRA with weight decay, or with a Gaussian prior as a term of the loss."""

from typing import Any

from pydantic import Field

from bayestune.methods.base import PointMethod


class Map(PointMethod):
    """Minimizes ``mean NLL + ||theta||^2 / (2 s^2 rows)``, or the mean NLL under AdamW's weight decay."""

    name = "map"
    label = "MAP"
    summary = "plain LoRA with weight decay or a Gaussian prior"
    paper = "BLoB's baseline, Wang et al. 2024, arXiv 2406.11675, section 4.1"

    weight_decay: float = Field(1e-5, ge=0, description="Weight decay of AdamW.")
    map_prior_std: float | None = Field(
        None,
        gt=0,
        description="Standard deviation of a Gaussian prior on every trained weight; replaces weight decay.",
    )

    def training_arguments(self) -> dict[str, Any]:
        return {"weight_decay": self.weight_decay} if self.map_prior_std is None else {}

    def weight_prior_std(self) -> float | None:
        return self.map_prior_std
