"""`novelty`: how far rows are from the training rows, in the features of the frozen base model."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.functional import normalize
from tqdm.auto import tqdm

from bayestune.adapters import is_merged
from bayestune.errors import ConfigError, DataError
from bayestune.inference.draws import evaluation_mode
from bayestune.sampling.base import Posterior
from bayestune.tasks import AnyRow, TokenizedTask
from bayestune.tasks.tensors import pad_encodings

NEIGHBORS = 5


def features(
    model: nn.Module | Posterior,
    task: TokenizedTask,
    rows: Sequence[AnyRow],
    *,
    batch_size: int = 32,
    progress: bool = False,
) -> Float[Tensor, "rows width"]:
    """Return the mean over tokens of the base model's last hidden state for the main text of each row.

    The adapter is disabled, so the features do not depend on the training. Other threads must not use the model
    during the call. For an encoder-decoder, the hidden state is the encoder's.

    Args:
        model: a posterior, or a model with or without an adapter.
        task: the task whose tokenizer reads the rows.
        rows: at least one; labels are not needed. The main text is the question, without passage and choices, or the
            first text of a pair.
        batch_size: rows per forward; fewer if memory runs out.
        progress: show a bar on stderr.

    Returns:
        [rows, width], float32 on the CPU.

    Raises:
        ConfigError: `batch_size` is less than 1, the adapter is merged, or the model has no hidden state per token.
        DataError: there are no rows, or a row cannot be used; names the row.
    """
    module = model.model if isinstance(model, Posterior) else model
    _check(module, rows, batch_size)
    task.examples(rows, module)  # refuses rows that cannot be used
    encodings = task.encode([(row.texts[0][1], None) for row in rows])
    bar = tqdm(total=len(rows), desc="features", unit="row", disable=not progress)
    with bar, evaluation_mode(module), torch.inference_mode(), _without_adapter(module) as base:
        return _all_means(base, encodings, task.pad_id, batch_size, bar)


def _all_means(
    base: Any, encodings: Sequence[dict[str, list[int]]], pad_id: int, batch_size: int, bar: tqdm
) -> Float[Tensor, "rows width"]:
    """Return `_means` of every text; the longest are computed first, and a batch that does not fit is halved."""
    longest_first = sorted(range(len(encodings)), key=lambda i: -len(encodings[i]["input_ids"]))
    todo = [longest_first[start : start + batch_size] for start in range(0, len(encodings), batch_size)]
    found: list[Tensor] = [torch.empty(0)] * len(encodings)
    while todo:
        places = todo.pop(0)
        try:
            means = _means(base, pad_encodings([encodings[i] for i in places], pad_id)).cpu()
        except torch.OutOfMemoryError:
            if len(places) == 1:
                raise
            half = len(places) // 2
            todo[:0] = [places[:half], places[half:]]
            continue
        for i, mean in zip(places, means, strict=True):
            found[i] = mean
        bar.update(len(places))
    return torch.stack(found)


def _check(model: nn.Module, rows: Sequence[AnyRow], batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError(f"features: found batch_size={batch_size}, expected at least 1.")
    if not rows:
        raise DataError("features: found no rows, expected at least one.")
    if is_merged(model):
        raise ConfigError("features: the adapter is merged into the base weights: call unmerge_adapter() before.")


def _means(base: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows width"]:
    """Return the mean of the last hidden state over the tokens of each row."""
    device = next(base.parameters()).device
    inputs = {key: tensor.to(device) for key, tensor in batch.items() if key != "special_tokens_mask"}
    options = {"use_cache": False} if "use_cache" in inspect.signature(base.forward).parameters else {}
    hidden = base(**inputs, **options).last_hidden_state.float()
    mask = inputs["attention_mask"].to(hidden.device).unsqueeze(-1)
    if hidden.shape[:2] != mask.shape[:2]:
        raise ConfigError(
            f"features: found {hidden.shape[1]} hidden states for {mask.shape[1]} tokens, expected one for each."
        )
    return (hidden * mask).sum(1) / mask.sum(1)


def novelty(
    model: nn.Module | Posterior,
    task: TokenizedTask,
    rows: Sequence[AnyRow],
    *,
    known: Float[Tensor, "known width"] | None = None,
    neighbors: int = NEIGHBORS,
    progress: bool = False,
) -> Float[Tensor, " rows"]:
    r"""Return the mean cosine distance of each row to its nearest training rows, from 0 to 2.

        novelty(x) = mean over the `neighbors` smallest of 1 - cos(f(x), f(x_i)),

    where f are the `features`. It shows whether a question is *about* something other than the training rows, not
    whether the answer is wrong.

    Args:
        model, task, rows, progress: as in `features`.
        known: features of training rows; by default those that the posterior keeps.
        neighbors: number of nearest training rows; all of them if there are fewer.

    Returns:
        [rows], float64 on the CPU; higher is farther.

    Raises:
        ConfigError: as `features`; or the features of training rows are missing, not finite, or of a different width,
            or `neighbors` is less than 1.
        DataError: as `features`.

    Example:
        >>> known = bt.inference.features(model, task, train_rows)  # a run keeps them as posterior.known
        >>> bt.novelty(model, task, rows, known=known)

    References:
        Sun et al. 2022, arXiv 2204.06507 (nearest neighbors), section 3; van Amersfoort et al. 2020, arXiv 2003.02037
        (distance in features for uncertainty).
    """
    if neighbors < 1:
        raise ConfigError(f"novelty: found neighbors={neighbors}, expected at least 1.")
    known = _checked(known if known is not None or not isinstance(model, Posterior) else model.known)
    found = features(model, task, rows, progress=progress)
    if known.shape[1] != found.shape[1]:
        raise ConfigError(
            f"novelty: found known of width {known.shape[1]}, expected {found.shape[1]}, that of this model."
        )
    return distances(found, known.to(found.device), neighbors=neighbors)


def _checked(known: Tensor | None) -> Float[Tensor, "known width"]:
    if known is None:
        raise ConfigError(
            "novelty: found no features of training rows, expected those that a run keeps with its posterior; pass "
            "known=bayestune.inference.features(model, task, train_rows)."
        )
    if known.ndim != 2 or len(known) == 0 or not known.isfinite().all():
        raise ConfigError(
            f"novelty: found known of shape {tuple(known.shape)}, expected [rows, width] with at least one row and "
            "finite values."
        )
    return known


def distances(
    vectors: Float[Tensor, "rows width"], known: Float[Tensor, "known width"], *, neighbors: int
) -> Float[Tensor, " rows"]:
    """Return the mean cosine distance of each vector to the nearest of `known`."""
    here, there = (normalize(each.double(), dim=-1) for each in (vectors, known))
    return (1 - here @ there.T).topk(min(neighbors, len(known)), dim=-1, largest=False).values.mean(-1)


@contextmanager
def _without_adapter(model: nn.Module) -> Iterator[Any]:
    """Yield the model below its head, or its encoder, with its adapters disabled."""
    if not isinstance(model, PeftModel):
        yield _below_head(model)
        return
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with model.disable_adapter():
            yield _below_head(model.get_base_model())
    finally:
        for parameter in model.parameters():  # PEFT has made the active adapter trainable
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _below_head(model: Any) -> Any:
    base = model.base_model
    return base.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else base
