"""`Decoder`: run transformers' `generate` on a batch that holds every row once per draw."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)

from bayestune.adapters import drawn_weights, row_major_sizes
from bayestune.errors import BayestuneError, ConfigError, DrawError, PosteriorError, one_line
from bayestune.functional import derive_seed
from bayestune.inference.generation_settings import NEW_TOKENS, PASSED, merged_config
from bayestune.inference.score import Scorer, writing_base
from bayestune.sampling.base import Posterior
from bayestune.sampling.stacked import StackedDraws
from bayestune.tasks.tensors import pad

Mode = Literal["averaged", "per_draw"]
Figures = tuple[Tensor, Tensor, Tensor]
"""`draw_log_probs` [slices, tokens], `total` and `aleatoric` [tokens] of a text; see `Generation`."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """The new tokens of one text.

    Attributes:
        ids: the tokens.
        finished: whether the text ended by itself.
        figures: the uncertainty of the tokens under the draws that wrote them.
    """

    ids: Int[Tensor, " tokens"]
    finished: bool
    figures: Figures


class Decoder:
    """Decodes, with transformers, a batch whose rows are repeated for every draw; the draw is the outermost index.

    Args:
        scorer: the draws.
        posterior: the posterior whose model writes.
        tokenizer: the model's tokenizer.
        seed: seed of sampled tokens.
        mode: "averaged" if the draws write one text together, "per_draw" if each writes its own.
        settings: settings of `transformers.GenerationConfig`.
    """

    def __init__(
        self,
        scorer: Scorer,
        posterior: Posterior,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int,
        mode: Mode,
        settings: dict[str, Any],
    ) -> None:
        if mode not in ("averaged", "per_draw"):
            raise ConfigError(f"mode: found {mode!r}, expected 'averaged' or 'per_draw'.")
        if not isinstance(scorer.sampler, StackedDraws):
            raise DrawError(
                f"generate: found a posterior of kind {posterior.kind!r}, whose draws cannot write in one batch, "
                "expected Gaussian or dropout adapters; serve its draws instead (bayestune serve --proxy)."
            )
        if mode == "per_draw" and not scorer.sampler.weights:
            raise ConfigError("mode: found 'per_draw' with draws=0, expected at least one draw.")
        self.scorer, self.draws, self.model, self.tokenizer = scorer, scorer.sampler, posterior.model, tokenizer
        self.seed, self.mode = seed, mode
        base = writing_base(posterior, "generate")
        self.config = merged_config(base.generation_config, tokenizer, settings)
        self.stop_strings, self.config.stop_strings = self.config.stop_strings, None
        self.others = {name: settings[name] for name in PASSED if settings.get(name) is not None}
        self.plain = True
        """Whether tokens are sampled from the unmodified distributions of the draws; set when a text is written."""

    @property
    def new_tokens(self) -> int:
        """The largest number of new tokens."""
        return self.config.max_new_tokens or NEW_TOKENS

    def write(self, contexts: Sequence[Sequence[int]], keys: Sequence[int | str]) -> list[list[Written]]:
        """Return the texts that are generated after each context: one, or one per draw.

        Args:
            contexts: token ids of the prompts.
            keys: one key per prompt, for the noise that samples its tokens and for errors.
        """
        slices, rows = self.draws.slices, len(contexts)
        mask = pad([[1] * len(ids) for ids in contexts], 0, left=True)
        inputs = {"input_ids": pad(contexts, self.config.pad_token_id, left=True), "attention_mask": mask}
        inputs = {name: tensor.repeat(slices, 1).to(self.model.device) for name, tensor in inputs.items()}
        width = mask.shape[1]
        sizes = row_major_sizes((slices * rows, width), slices)
        loop = _Loop(self, keys)
        others = {**self.others, "stopping_criteria": self._stopping()}
        with drawn_weights(self.draws.weights, sizes=sizes):
            try:
                out = self.model.generate(**inputs, generation_config=self.config, custom_generate=loop, **others)
            except BayestuneError:
                raise
            except (ValueError, TypeError) as error:
                raise ConfigError(f"generate: transformers refuses these settings: {one_line(error)}") from error
        assert loop.ends is not None and loop.average is not None
        loop.average.choose(out)
        found = []
        for row in range(slices * rows if self.mode == "per_draw" else rows):
            count = int(loop.ends.length[row]) - width
            figures = loop.average.figures(row, count)
            ids, finished = out[row, width : width + count].cpu(), bool(loop.ends.finished[row])
            found.append(Written(ids=ids, finished=finished, figures=figures))
        return [found[row::rows] for row in range(rows)]

    def _stopping(self) -> StoppingCriteriaList:
        """Return the user's criteria and the stop strings, since transformers loses the tokenizer that they need."""
        criteria = StoppingCriteriaList(self.others.get("stopping_criteria") or [])
        if self.stop_strings is not None:
            criteria.append(StopStringCriteria(self.tokenizer, self.stop_strings))
        return criteria


class _Loop:
    """transformers' decoding loop with `_Average` before its logits processors and `_Gumbel` after them."""

    def __init__(self, decoder: Decoder, keys: Sequence[int | str]) -> None:
        self.decoder, self.keys = decoder, keys
        self.average: _Average | None = None
        self.ends: _Ends | None = None

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: Any,
        **others: Any,
    ) -> Tensor:
        slices = self.decoder.draws.slices
        together = slices if self.decoder.mode == "averaged" else 1
        self.average = _Average(together, self.keys, input_ids.shape[1])
        last = []
        self.decoder.plain = bool(generation_config.do_sample) and not logits_processor
        if generation_config.do_sample:
            last = [_Gumbel(self.decoder.seed, self.keys, slices // together, together, input_ids.shape[1])]
            generation_config = copy.deepcopy(generation_config)
            generation_config.do_sample = False  # after Gumbel noise, the largest score is a sample
        self.ends = _Ends(stopping_criteria, len(input_ids))
        processors = LogitsProcessorList([self.average, *logits_processor, *last])
        return model._sample(input_ids, processors, self.ends, generation_config, **others)


class _Average(LogitsProcessor):
    """Replaces the logits by log-probabilities averaged over each row's draws, and records the uncertainty.

    Args:
        slices: number of draws to average.
        names: names of the prompts in the batch, for errors.
        width: number of tokens of the padded prompts.
    """

    def __init__(self, slices: int, names: Sequence[int | str], width: int) -> None:
        self.slices, self.names, self.width = slices, names, width
        self.total: list[Tensor] = []
        self.aleatoric: list[Tensor] = []
        self.chosen: list[Tensor] = []
        self._latest: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.choose(input_ids)
        log_probs = scores.double().log_softmax(-1)
        bad = log_probs.isnan().any(-1)
        if bad.any():
            name = self.names[int(bad.nonzero()[0, 0]) % len(self.names)]
            raise PosteriorError(
                f"generate: prompt {name!r}: found answers that are not finite, expected finite ones: the adapter's "
                "weights, or the precision, are too large or too small for this model."
            )
        self._latest = log_probs.unflatten(0, (self.slices, -1))
        averaged = self._latest.logsumexp(0) - math.log(self.slices)
        self.total.append(torch.special.entr(averaged.exp()).sum(-1).cpu())
        self.aleatoric.append(torch.special.entr(self._latest.exp()).sum(-1).mean(0).cpu())
        if self.slices == 1:
            return scores  # so that logits processors act as in transformers
        return averaged.repeat(self.slices, 1)

    def choose(self, input_ids: Tensor) -> None:
        """Record each draw's log-probability of the token that was chosen last, if `input_ids` holds it."""
        step = self.width + len(self.chosen)
        if self._latest is not None and input_ids.shape[1] > step:
            taken = input_ids[:, step].view(self.slices, -1, 1)
            self.chosen.append(self._latest.gather(2, taken)[..., 0].cpu())

    def figures(self, row: int, count: int) -> Figures:
        """Return the recorded figures of the first `count` tokens of a row."""
        if not count:
            return torch.zeros(self.slices, 0).double(), torch.zeros(0).double(), torch.zeros(0).double()
        chosen, total, aleatoric = (torch.stack(each[:count]) for each in (self.chosen, self.total, self.aleatoric))
        return chosen[:, :, row].T, total[:, row], aleatoric[:, row]


class _Gumbel(LogitsProcessor):
    """Adds Gumbel noise keyed by seed, prompt, draw and step, so that the largest score is a sample (Gumbel 1954)."""

    def __init__(self, seed: int, keys: Sequence[int | str], draws: int, copies: int, width: int) -> None:
        self.keys = [(seed, key, draw) for draw in range(draws) for key in keys]
        self.copies, self.width = copies, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.width
        noise = torch.empty(len(self.keys), scores.shape[1], dtype=torch.float64)
        for row, key in zip(noise, self.keys, strict=True):
            row.exponential_(generator=torch.Generator().manual_seed(derive_seed("token", *key, step)))
        return scores - noise.log().to(scores.device).repeat(self.copies, 1)


class _Ends(StoppingCriteriaList):
    """Stopping criteria that record at which length each row ended, and whether it ended by itself or at a limit."""

    def __init__(self, criteria: StoppingCriteriaList, rows: int) -> None:
        super().__init__(criteria)
        self.length, self.finished = torch.zeros(rows, dtype=torch.long), torch.zeros(rows, dtype=torch.bool)

    def __call__(self, input_ids: Tensor, scores: Any, **others: Any) -> Tensor:
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        ended = done.clone()
        for criterion in self:
            found = criterion(input_ids, scores, **others)
            done |= found
            ended |= found & (not isinstance(criterion, MaxLengthCriteria | MaxTimeCriteria))
        new = done.cpu() & (self.length == 0)
        self.finished |= new & ended.cpu()
        self.length[new] = input_ids.shape[1]
        return done
