"""`BayesLoraConfig`: LoRA's settings and those of a posterior over its matrices; `BlobConfig` is BLoB's."""

import os
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import LoraConfig

from bayestune.adapters.card import add_notice
from bayestune.adapters.registration import BAYES_LORA
from bayestune.errors import ConfigError

Estimator = Literal["independent", "flipout", "flipout_token"]
Distribution = Literal["gaussian_a", "gaussian_ab", "dropout"]

# Options whose forward is not lora_B(lora_A(x)), or that change the base weights.
_REFUSED = {
    "use_dora": "DoRA reads the A matrix outside its forward, so a draw would not be one set of weights",
    "target_parameters": "PEFT reads the A matrix of target_parameters without calling it, so no noise would reach it",
    "ensure_weight_tying": "the tied embedding would stay a point while the head is Gaussian",
    "velora_config": "its forward is not LoRA's",
    "alora_invocation_tokens": "its forward is not LoRA's",
    "use_qalora": "its forward is not LoRA's",
    "monteclora_config": "it puts another posterior on the same matrix",
    "use_bdlora": "its A matrix is block-diagonal",
    "arrow_config": "its forward is not LoRA's",
    "kasa_config": "it changes the base weights",
    "megatron_config": "tensor-parallel layers would see different noise on each rank",
}
INITS = (True, False, "gaussian", "orthogonal")
"""The values of init_lora_weights that leave the base weights unchanged."""


@dataclass
class BayesLoraConfig(LoraConfig):
    """Configuration of a Bayesian LoRA adapter: all settings of `peft.LoraConfig`, and a posterior over A (and B).

    `distribution` selects the posterior:

    - "gaussian_a", BLoB: ``q(A_ij) = N(M_ij, G_ij^4)`` with the prior ``N(0, prior_std^2)``; B is a point estimate.
    - "gaussian_ab", Bayes by backprop: A and B are Gaussian; the mean of B starts at 0.
    - "dropout", MC dropout: ``A = M diag(z) / (1 - p)`` with one mask z per draw and p = `lora_dropout`. There is no
      prior and no KL.

    Args:
        prior_std: standard deviation of the prior, above 0.
        rho_init: upper bound of the initial G, above 0; the standard deviation is ``G * G``.
        estimator: training noise: "independent", "flipout" or "flipout_token".
        distribution: "gaussian_a", "gaussian_ab" or "dropout".

    Raises:
        ConfigError: a value is out of range, or a LoRA option is incompatible with the posterior.

    References:
        BLoB: Wang et al. 2024, arXiv 2406.11675, section 3. Bayes by backprop: Blundell et al. 2015,
        arXiv 1505.05424. MC dropout: Gal and Ghahramani 2016, arXiv 1506.02142, section 3.
    """

    prior_std: float = field(default=0.2, metadata={"help": "Standard deviation of the prior N(0, prior_std^2) of A."})
    rho_init: float = field(
        default=0.05, metadata={"help": "G starts uniform in [rho_init / sqrt 2, rho_init]; the std is G * G."}
    )
    estimator: Estimator = field(
        default="independent",
        metadata={
            "help": "Training noise: 'independent', one draw per row; 'flipout', one noise matrix per batch with "
            "random signs per row; 'flipout_token', the same with signs per token, as in BLoB's released code, so "
            "that one forward does not use one set of weights."
        },
    )
    distribution: Distribution = field(
        default="gaussian_a",
        metadata={
            "help": "What is random: 'gaussian_a', A (BLoB); 'gaussian_ab', A and B (Bayes by backprop); 'dropout', "
            "the inputs of A that a draw keeps (MC dropout: each is dropped with probability lora_dropout)."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = BAYES_LORA
        for name in ("prior_std", "rho_init"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise self._error(name, "a number above 0.")
        for name, allowed in (("estimator", get_args(Estimator)), ("distribution", get_args(Distribution))):
            if getattr(self, name) not in allowed:
                raise self._error(name, f"one of {allowed}.")
        self._check_distribution()
        for name, reason in _REFUSED.items():
            value = getattr(self, name)
            if value:
                raise ConfigError(f"{type(self).__name__} does not support {name}={value!r}: {reason}. Leave it out.")
        if self.init_lora_weights not in INITS:
            others = "other values change the base weights or replace A after the posterior is made."
            raise self._error("init_lora_weights", f"one of {INITS}; {others}")

    def _error(self, name: str, expected: str) -> ConfigError:
        return ConfigError(f"{type(self).__name__} {name}: found {getattr(self, name)!r}, expected {expected}")

    def _check_distribution(self) -> None:
        if self.distribution == "gaussian_ab" and self.lora_bias:
            raise self._error("lora_bias", "False where B is random (gaussian_ab).")
        if self.distribution == "dropout" and not 0 < self.lora_dropout < 1:
            reason = "distribution='dropout' has no other randomness."
            raise self._error("lora_dropout", f"a probability between 0 and 1: {reason}")
        if self.distribution == "dropout" and self.estimator != "independent":
            reason = "flipping signs needs symmetric noise."
            raise self._error("estimator", f"'independent' for distribution='dropout': {reason}")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write adapter_config.json, and a note in the model card that loading needs `import bayestune`.

        Args:
            save_directory: folder to write to.
            **kwargs: as in `peft.LoraConfig.save_pretrained`.
        """
        super().save_pretrained(str(save_directory), **kwargs)
        add_notice(save_directory)


@dataclass
class BlobConfig(BayesLoraConfig):
    """Configuration of BLoB, the Gaussian over A: a `BayesLoraConfig` whose `distribution` is always "gaussian_a".

    A saved adapter loads as a `BayesLoraConfig`.

    Raises:
        ConfigError: as `BayesLoraConfig`, and for any other `distribution`.
    """

    def __post_init__(self) -> None:
        if self.distribution != "gaussian_a":
            raise self._error("distribution", "'gaussian_a'; use BayesLoraConfig.")
        super().__post_init__()
