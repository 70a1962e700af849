"""`score`: the uncertainty of every token of existing texts."""

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bayestune.errors import ConfigError, DataError, DrawError, PosteriorError, TaskError, one_line
from bayestune.inference.draws import evaluation_mode
from bayestune.inference.generation import Generation
from bayestune.inference.logits import Logits
from bayestune.sampling.base import Posterior, Sampler
from bayestune.storage.saving import as_posterior
from bayestune.tasks.causal import without_appended
from bayestune.tasks.tensors import widen

Prompt = str | Sequence[Mapping[str, Any]]
"""A text, or the messages of a chat."""


def score(
    model: nn.Module | Posterior,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    texts: Sequence[str],
    *,
    draws: int,
    seed: int = 0,
    progress: bool = False,
) -> Generation:
    """Return the uncertainty of every token of each text after its prompt; ``draws=0`` uses the mean.

    Prompt and text are tokenized separately and joined, without an end-of-text token.

    Args:
        model: a posterior, or a causal language model with an adapter.
        tokenizer: the model's tokenizer.
        prompts: texts, or chats (lists of messages), which the tokenizer's chat template formats.
        texts: one for each prompt.
        draws, seed: number and seed of the draws.
        progress: show a bar on stderr.

    Raises:
        ConfigError: the numbers of prompts and texts differ, or `draws` is below 0.
        DataError: there are no prompts, a prompt or a text has no token, or both together are too long for the model.
        TaskError: the model is not a causal language model, or the tokenizer has no chat template for a chat.
        DrawError: the posterior has no such draws.
        PosteriorError: the model's answers are not finite; names the prompt.
    """
    if isinstance(texts, str) or len(prompts) != len(texts):
        found = f"the text {texts!r}" if isinstance(texts, str) else f"{len(texts)} texts"
        raise ConfigError(f"score: found {len(prompts)} prompts and {found}, expected a list with one text for each.")
    posterior = as_posterior(model)
    contexts = encoded(posterior, tokenizer, prompts, range(len(prompts)), "score")
    sequences = [_text_ids(posterior, tokenizer, *pair) for pair in enumerate(zip(contexts, texts, strict=True))]
    scorer = Scorer(posterior, draws, seed)
    pairs = tqdm(list(zip(contexts, sequences, strict=True)), desc="score", unit="prompt", disable=not progress)
    with evaluation_mode(posterior.model), torch.inference_mode():
        found = [scorer.figures(*pair, number) for number, pair in enumerate(pairs)]
    return Generation(
        texts=tuple(texts),
        sequences=tuple(sequences),
        pieces=tuple(pieces(tokenizer, ids) for ids in sequences),
        draw_log_probs=tuple(each[0] for each in found),
        total=tuple(each[1] for each in found),
        aleatoric=tuple(each[2] for each in found),
        finished=(True,) * len(texts),
        draws=draws,
        seed=seed,
    )


def _text_ids(
    posterior: Posterior, tokenizer: PreTrainedTokenizerBase, number: int, pair: tuple[list[int], str]
) -> Int[Tensor, " tokens"]:
    context, text = pair
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    if not ids:
        raise DataError(f"score: text {number}: found no token in {text!r}, expected at least one.")
    check_length(posterior, len(context) + len(ids), number, "score")
    return torch.tensor(ids)


class Scorer:
    """Scores texts under the draws of a posterior, one draw after another, since all together would not fit in memory.

    Args:
        posterior: a posterior over a causal language model.
        draws, seed: number and seed of the draws.

    Raises:
        ConfigError: `draws` is below 0.
        DrawError: the posterior has no such draws, or draws outputs instead of weights, as linearized ones do.
    """

    def __init__(self, posterior: Posterior, draws: int, seed: int) -> None:
        for name, value in {"draws": draws, "seed": seed}.items():
            if not isinstance(value, SupportsIndex) or isinstance(value, bool) or operator.index(value) < 0:
                raise ConfigError(f"{name}: found {value!r}, expected a whole number, at least 0.")
        self.sampler: Sampler = posterior.sampler(draws=draws, seed=seed)
        if self.sampler.gradients:
            raise DrawError("draws: found draws of the answers alone, expected draws of the weights.")
        self.device = next(posterior.model.parameters()).device

    def figures(
        self, context: Sequence[int], ids: Int[Tensor, " tokens"], name: int | str
    ) -> tuple[Float[Tensor, "slices tokens"], Float[Tensor, " tokens"], Float[Tensor, " tokens"]]:
        """Return `draw_log_probs`, `total` and `aleatoric` of the tokens `ids` after a context.

        Raises:
            PosteriorError: they are not finite; names the prompt.
        """
        count, slices = len(ids), self.sampler.slices
        chosen = torch.empty(slices, count, dtype=torch.float64)
        if not count:
            return chosen, torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        whole = torch.tensor([[*context, *ids.tolist()]], device=self.device)
        reader: Any = Logits(last=count + 1)
        mean, entropy = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for k in range(slices):
            logits = self.sampler.outputs(reader, {"input_ids": whole}, range(k, k + 1))[0, 0, -count - 1 : -1]
            log_probs = widen(logits).log_softmax(-1).double()
            if not log_probs.gather(1, whole[0, -count:, None]).isfinite().all():
                raise PosteriorError(
                    f"prompt {name!r}: found answers that are not finite, expected finite ones: the adapter's "
                    "weights, or the precision, are too large or too small for this model."
                )
            chosen[k] = log_probs.gather(1, whole[0, -count:, None])[:, 0].cpu()
            probs = log_probs.exp()
            mean = mean + probs / slices
            entropy = entropy + torch.special.entr(probs).sum(-1) / slices
        return chosen, torch.special.entr(mean).sum(-1).cpu(), entropy.cpu()


def encoded(
    posterior: Posterior,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    names: Sequence[int | str],
    call: str,
    new_tokens: int = 1,
) -> list[list[int]]:
    """Return the token ids of prompts; errors name `call` and the prompt.

    Raises:
        ConfigError: the numbers of names and prompts differ.
        DataError: there are no prompts, or one has no token, or is too long with `new_tokens` more.
        TaskError: the model does not generate, or the tokenizer has no chat template for a chat.
    """
    writing_base(posterior, call)
    if isinstance(prompts, str) or not prompts:
        raise DataError(f"{call}: found {prompts!r}, expected a list of prompts, at least one.")
    found = []
    if len(names) != len(prompts):
        raise ConfigError(f"{call}: found {len(names)} keys for {len(prompts)} prompts, expected one each.")
    for name, prompt in zip(names, prompts, strict=True):
        ids = _ids(tokenizer, prompt, f"{call}: prompt {name!r}")
        if not ids:
            raise DataError(f"{call}: prompt {name!r}: found no token in {prompt!r}, expected at least one.")
        check_length(posterior, len(ids) + new_tokens, name, call)
        found.append(ids)
    return found


def writing_base(posterior: Posterior, call: str) -> Any:
    """Return the model under the adapter.

    Raises:
        TaskError: it is not a causal language model.
    """
    base: Any = posterior.model.get_base_model()
    if not base.can_generate() or base.config.is_encoder_decoder:
        raise TaskError(f"{call}: found {type(base).__name__}, expected a causal language model, such as smollm2.")
    return base


def _ids(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, where: str) -> list[int]:
    if isinstance(prompt, str):
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise DataError(f"{where}: found a lone surrogate, expected Unicode.")
        return without_appended(tokenizer(prompt, return_special_tokens_mask=True)) if prompt else []
    if not tokenizer.chat_template:
        raise TaskError(f"{where}: found messages, expected a string: the tokenizer has no chat template.")
    messages: list[Any] = [*prompt]
    if isinstance(prompt, Mapping) or not all(isinstance(message, Mapping) for message in messages):
        raise DataError(f"{where}: found {prompt!r}"[:120] + ", expected a string or a list of messages.")
    try:
        encoding: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:  # whatever the template raises
        raise DataError(f"{where}: the chat template refuses it: {one_line(error)}; correct the messages.") from error
    return encoding["input_ids"]


def check_length(posterior: Posterior, tokens: int, name: int | str, call: str) -> None:
    """Raise a DataError if a text has more tokens than the model has positions for."""
    limit = getattr(posterior.model.config.get_text_config(), "max_position_embeddings", None)  # GPT-2 has an alias
    if limit is not None and tokens > limit:
        raise DataError(
            f"{call}: prompt {name!r}: found {tokens} tokens including new ones, expected at most {limit}, the "
            "positions of the model; shorten it, or ask for fewer new tokens."
        )


def pieces(tokenizer: PreTrainedTokenizerBase, ids: Int[Tensor, " tokens"]) -> tuple[str, ...]:
    """Return the text that each token adds; parts of a character are shown with the token that completes it."""
    decode: Any = functools.partial(tokenizer.decode, clean_up_tokenization_spaces=False)
    found, start, done = [], 0, 0  # decoded with the piece before: a first token may lose its space
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        complete = not text.endswith("�") or end == len(ids)
        found.append(text[len(decode(ids[start:done])) :] if complete else "")
        start, done = (done, end) if complete else (start, done)
    return tuple(found)
