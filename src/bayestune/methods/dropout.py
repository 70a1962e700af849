"""Monte Carlo dropout: the dropout masks of training are the draws of prediction."""

from typing import Any

from peft import LoraConfig
from pydantic import Field

from bayestune.adapters import BayesLoraConfig
from bayestune.methods.base import Method
from bayestune.sampling import Variational


class Dropout(Method):
    """Trains plain LoRA with dropout on the inputs of A; a draw is one mask, the same for every token and row."""

    name = "dropout"
    label = "MC dropout"
    summary = "Monte Carlo dropout on the inputs of A"
    paper = "Gal and Ghahramani 2016, arXiv 1506.02142"
    posterior = Variational

    lora_dropout: float = Field(0.1, gt=0, lt=1, description="Probability that an input of A is dropped.")

    def adapter_config(self, **lora: Any) -> LoraConfig:
        return BayesLoraConfig(**lora, distribution="dropout", lora_dropout=self.lora_dropout)
