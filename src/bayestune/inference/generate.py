r"""`generate`: generate texts from a posterior, with the uncertainty of every token.

In mode "averaged" all draws write one text: at every step the next token comes from

    p(t | before) = 1/K sum_k p(t | before, theta_k),

with K draws in one batch, each with its own part of one cache. In mode "per_draw" each draw writes its own text, and
the answer is the first text of the largest cluster of equivalent texts.

transformers does the decoding: generation config, stopping, logits processors, chat template and cache. Processors and
sampling settings act on the log-probabilities of the average, so a repetition penalty, which is made for logits, has
a different effect than with a single draw. Tokens are sampled with the Gumbel-max trick; its noise is keyed by the
seed, the key of the prompt, the step, and in mode "per_draw" the draw. All draws of an average therefore take the same
token, the global random state is unchanged, and a text does not depend on the other prompts. The posterior's
temperature is not used, since it is fitted to choices.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from bayestune.errors import ConfigError
from bayestune.inference.decoding import Decoder, Figures, Mode, Written
from bayestune.inference.draws import evaluation_mode
from bayestune.inference.generation import Generation, Same, clusters
from bayestune.inference.score import Prompt, Scorer, encoded, pieces, writing_base
from bayestune.sampling.base import Posterior
from bayestune.storage.saving import as_posterior


def generate(
    model: nn.Module | Posterior,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    draws: int,
    seed: int = 0,
    mode: Mode = "averaged",
    same: Same = "normalized",
    keys: Sequence[int | str] | None = None,
    batch_size: int = 8,
    progress: bool = False,
    **generation_config: Any,
) -> Generation:
    """Return a text for each prompt, with the uncertainty of every token; ``draws=0`` decodes with the mean.

    Args:
        model: a posterior or a model with Gaussian or dropout adapters; with ``draws=0`` also plain LoRA.
        tokenizer: the model's tokenizer.
        prompts: texts, or chats (lists of messages), which the tokenizer's chat template formats.
        draws, seed: number and seed of the draws; the seed also chooses sampled tokens.
        mode: "averaged" for one text from all draws, or "per_draw" for one text from each draw.
        same: in mode "per_draw", the rule by which two texts are one answer; see `clusters`.
        keys: keys of the prompts, for the noise that samples tokens and for errors; by default their indices.
        batch_size: prompts per batch, before draws are stacked.
        progress: show a bar on stderr.
        **generation_config: settings of `transformers.GenerationConfig` (`max_new_tokens`, by default 128;
            `do_sample`, `temperature`, `top_p`, `stop_strings`, ...), or ``generation_config=`` with one such object.

    Raises:
        ConfigError: a setting is out of range, or asks for another kind of decoding, such as beam search.
        DataError: there are no prompts, or one has no token, or is too long for the model with its new tokens.
        TaskError: the model is not a causal language model, or the tokenizer has no chat template for a chat.
        DrawError: the posterior has no such draws, or its draws cannot be stacked.
        PosteriorError: the model's answers are not finite; names the prompt.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size: found {batch_size}, expected at least 1.")
    clusters([], same)
    names = range(len(prompts)) if keys is None else keys
    decoder, contexts = prepared(model, tokenizer, prompts, names, draws, seed, mode, generation_config)
    with evaluation_mode(decoder.model), torch.inference_mode():
        found = _written(decoder, contexts, names, batch_size, progress)
        if mode == "per_draw":
            return _per_draw(decoder, contexts, names, found, same, progress, draws=draws, seed=seed)
    answers = [each[0] for each in found]
    return _generation(tokenizer, answers, [each.figures for each in answers], draws=draws, seed=seed)


def prepared(
    model: nn.Module | Posterior,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    names: Sequence[int | str],
    draws: int,
    seed: int,
    mode: Mode,
    settings: dict[str, Any],
) -> tuple[Decoder, list[list[int]]]:
    """Return the decoder and the token ids of all prompts, after all checks that `generate` makes before it writes."""
    posterior = as_posterior(model)
    writing_base(posterior, "generate")
    decoder = Decoder(Scorer(posterior, draws, seed), posterior, tokenizer, seed=seed, mode=mode, settings=settings)
    return decoder, encoded(posterior, tokenizer, prompts, names, "generate", decoder.new_tokens)


def _written(
    decoder: Decoder, contexts: Sequence[list[int]], names: Sequence[int | str], batch_size: int, progress: bool
) -> list[list[Written]]:
    """Return the texts that are generated after each context: one, or one per draw."""
    found: list[list[Written]] = []
    with tqdm(total=len(contexts), desc="generate", unit="prompt", disable=not progress) as bar:
        for start in range(0, len(contexts), batch_size):
            part = slice(start, start + batch_size)
            found += decoder.write(contexts[part], names[part])
            bar.update(len(found) - bar.n)
    return found


def _generation(tokenizer: Any, found: Sequence[Written], figures: Sequence[Figures], **fields: Any) -> Generation:
    return Generation(
        texts=tuple(tokenizer.decode(each.ids, skip_special_tokens=True) for each in found),
        sequences=tuple(each.ids for each in found),
        pieces=tuple(pieces(tokenizer, each.ids) for each in found),
        draw_log_probs=tuple(each[0] for each in figures),
        total=tuple(each[1] for each in figures),
        aleatoric=tuple(each[2] for each in figures),
        finished=tuple(each.finished for each in found),
        **fields,
    )


def _per_draw(
    decoder: Decoder,
    contexts: Sequence[list[int]],
    names: Sequence[int | str],
    found: Sequence[Sequence[Written]],
    same: Same,
    progress: bool,
    **asked: int,
) -> Generation:
    tokenizer: Any = decoder.tokenizer
    texts = [[tokenizer.decode(each.ids, skip_special_tokens=True) for each in several] for several in found]
    largest = [clusters(several, same)[0] for several in texts]
    answers = [several[group[0]] for several, group in zip(found, largest, strict=True)]
    figures, information = [], []
    prompts = list(zip(contexts, names, found, largest, strict=True))
    for context, name, several, (chosen, *_) in tqdm(prompts, desc="score", unit="prompt", disable=not progress):
        read = {
            place: decoder.scorer.figures(context, each.ids, name)
            for place, each in enumerate(several)
            if decoder.plain or place == chosen
        }
        figures.append(read[chosen])
        if decoder.plain:
            information.append(_information([each[0].sum(-1) for each in read.values()]))
    return _generation(
        tokenizer,
        answers,
        figures,
        draw_texts=tuple(map(tuple, texts)),
        agreement=tuple(len(group) / len(several) for group, several in zip(largest, found, strict=True)),
        information=tuple(information) if decoder.plain else None,
        **asked,
    )


def _information(likelihoods: Sequence[Float[Tensor, " draws"]]) -> float:
    """Return the estimate of `Generation.information` from log p(y_k | theta_j), given as one tensor per text y_k."""
    table = torch.stack(list(likelihoods))
    return float((table.diagonal() - table.logsumexp(1) + math.log(len(table))).mean())
