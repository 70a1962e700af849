"""The settings of `generate`: transformers' generation config, without what stacked draws do not support."""

import copy
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.generation.configuration_utils import GenerationMode

from bayestune.errors import ConfigError, one_line

NEW_TOKENS = 128
"""Limit of new tokens if none is given."""
PASSED = ("logits_processor", "stopping_criteria")
"""Arguments of transformers' `generate` that are passed on to it."""
_OF_BATCH = {
    "max_length": "max_new_tokens",
    "min_length": "min_new_tokens",
    "encoder_repetition_penalty": "repetition_penalty",
    "encoder_no_repeat_ngram_size": "no_repeat_ngram_size",
}
"""Settings that count padding, and so would depend on the other prompts; and the settings to use instead."""


def merged_config(
    own: GenerationConfig, tokenizer: PreTrainedTokenizerBase, settings: Mapping[str, Any]
) -> GenerationConfig:
    """Return the model's own config, overridden by the user's ``generation_config=`` and settings.

    Raises:
        ConfigError: a setting is unknown or out of range, asks for another kind of decoding, or counts padding.
    """
    config, given = copy.deepcopy(own), settings.get("generation_config")
    if own.stop_strings is not None:  # transformers would need the tokenizer, which it no longer has
        raise ConfigError(
            f"stop_strings: found {own.stop_strings!r} in the model's own generation_config, expected none; pass "
            "stop_strings= instead."
        )
    if given is not None and not isinstance(given, GenerationConfig):
        raise ConfigError(f"generation_config: found a {type(given).__name__}, expected a GenerationConfig.")
    wanted = {} if given is None else {k: v for k, v in given.to_diff_dict().items() if k != "transformers_version"}
    wanted |= {name: value for name, value in settings.items() if name not in ("generation_config", *PASSED)}
    for name, instead in _OF_BATCH.items():
        if wanted.get(name) is not None:
            raise ConfigError(f"{name}: found {wanted[name]!r}, expected none; use {instead}.")
        setattr(config, name, None)
    try:
        unknown = config.update(**wanted)
        if config.max_new_tokens is None:
            config.max_new_tokens = NEW_TOKENS
        config.validate()
        mode = config.get_generation_mode()
    except (ValueError, TypeError) as error:
        raise ConfigError(f"generate: transformers refuses these settings: {one_line(error)}") from error
    if unknown:
        raise ConfigError(f"{min(unknown)}: found such a setting, expected one of GenerationConfig; correct its name.")
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE) or (config.num_return_sequences or 1) > 1:
        found = mode.value if (config.num_return_sequences or 1) == 1 else "num_return_sequences"
        raise ConfigError(f"generate: found settings of {found}, expected greedy decoding or sampling of one text.")
    if config.stop_strings is not None and (not config.stop_strings or "" in config.stop_strings):
        raise ConfigError(f"stop_strings: found {config.stop_strings!r}, expected texts that are not empty.")
    config.return_dict_in_generate = False
    if config.pad_token_id is None:
        named = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        config.pad_token_id = next((token for token in named if isinstance(token, int)), 0)
    return config
