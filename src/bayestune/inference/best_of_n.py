"""`rewards`: rewards of texts under the draws of a reward model; `best_of_n`: rank the texts of one prompt by them."""

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from bayestune.errors import ConfigError
from bayestune.inference.predict import draw_outputs
from bayestune.sampling.base import Posterior
from bayestune.tasks import Candidate, Preference, Rewards


def rewards(
    model: nn.Module | Posterior,
    task: Preference,
    prompts: str | Sequence[str],
    texts: Sequence[str],
    *,
    draws: int = 10,
    seed: int = 0,
    batch_size: int = 8,
    progress: bool = False,
) -> Float[Tensor, "slices rows"]:
    """Return the reward of each text under each draw; ``draws=0`` gives those of the mean, in one slice.

    Under draw theta ``p(a better than b | x, theta) = sigmoid(r(x, a; theta) - r(x, b; theta))``. Rewards are divided
    by the posterior's temperature, so p is the probability that `predict` gives with the same `seed`.

    These probabilities determine rewards only up to a constant per prompt *and draw*. So the spread of one text's
    rewards over draws, and the difference between texts of different prompts, mean nothing. `best_of_n` compares the
    texts of one prompt.

    Args:
        model: a posterior, or a model.
        task: the preference task.
        prompts: one prompt per text, or one for all texts; an empty string for no prompt.
        texts: the texts to score, at least one.
        draws, seed, batch_size, progress: as in `predict`; a row is a text.

    Returns:
        [draws, texts], in logits, float64 on the CPU.

    Raises:
        ConfigError: the numbers of prompts and texts differ; or as `predict`.
        DataError, TaskError, DrawError, PosteriorError: as `predict`; a text is named by its index.
    """
    each = [prompts] * len(texts) if isinstance(prompts, str) else prompts
    if len(each) != len(texts):
        raise ConfigError(f"rewards: found {len(each)} prompts for {len(texts)} texts, expected one for each, or one.")
    rows = [Candidate(id=str(i), prompt=x, text=text) for i, (x, text) in enumerate(zip(each, texts, strict=True))]
    outputs, temperature = draw_outputs(
        model, Rewards.of(task), rows, draws=draws, seed=seed, batch_size=batch_size, progress=progress
    )
    return outputs.squeeze(-1) / temperature


def best_of_n(rewards: Float[Tensor, "draws candidates"], *, k: float = 1.0) -> list[tuple[int, float]]:
    r"""Rank the candidates of one prompt by a lower confidence bound of their reward.

    With K draws, n candidates, and each draw's rewards centered over the candidates,

        c_ji = r_ji - 1/n sum_l r_jl,    bound_i = mean_j c_ji - k std_j c_ji,

    where the std over draws (with divisor K - 1) is epistemic. Adding a constant to all rewards of a draw changes
    nothing, since a Bradley-Terry model does not determine it. Two candidates always have the same std, so `k` matters
    only for three or more.

    Args:
        rewards: rewards of the candidates of one prompt, [draws, candidates], as `rewards` returns them.
        k: number of standard deviations below the mean; 0 ranks by the mean.

    Returns:
        Index and bound of each candidate, best first; candidates with equal bounds keep their order.

    Raises:
        ConfigError: there are no candidates, `k` is not finite, or `k` is not 0 and there are fewer than two draws.

    Example:
        >>> rewards = bt.rewards(posterior, task, prompt, texts, draws=10)
        >>> texts[bt.best_of_n(rewards, k=1.0)[0][0]]

    References:
        Coste et al. 2024, arXiv 2310.02743, "uncertainty-weighted optimization": the mean of an ensemble of reward
        models minus a multiple of its variance. This function uses the standard deviation instead.
    """
    draws, candidates = rewards.shape
    if not candidates or not math.isfinite(k) or draws < (2 if k else 1):
        raise ConfigError(
            f"best_of_n: found {draws} draws of {candidates} candidates with k={k}, expected at least one candidate, "
            "a finite k, and two draws unless k is 0."
        )
    centered = rewards.double() - rewards.double().mean(1, keepdim=True)
    bounds = centered.mean(0) - k * centered.std(0) if k else centered.mean(0)
    return sorted(enumerate(bounds.tolist()), key=lambda pair: -pair[1])
