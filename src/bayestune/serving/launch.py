"""`serve`: export the draws of a posterior, start a server with them, and write `served.json`."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.files import file_sha256, new_folder, read_json, replaced_if
from bayestune.inference import predict
from bayestune.packaged import model_source
from bayestune.sampling import Posterior
from bayestune.serving.asking import described
from bayestune.serving.client import Client
from bayestune.serving.engines import check_engine, check_port, llamacpp, vllm
from bayestune.serving.lora import export_draws
from bayestune.serving.record import SERVED, TOKENIZER, Served, ServedDraw, write_served
from bayestune.storage.manifest import CONFIG_FILE, TENSOR_FILE, write_manifest
from bayestune.tasks import Row, TokenizedTask

ADAPTERS = "adapters"
_KIND = "served"
"""The entry of the manifest by which `overwrite` knows a folder of `serve`."""
Backend = Literal["llamacpp", "vllm"]
_AGREES = 1e-3
"""Largest difference of probabilities without a warning."""


@contextlib.contextmanager
def serve(
    posterior: Posterior,
    task: TokenizedTask,
    path: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    draws: int = 10,
    seed: int = 0,
    backend: Backend = "llamacpp",
    host: str = "127.0.0.1",
    port: int = 8080,
    api_key: str | None = None,
    context: int | None = None,
    overwrite: bool = False,
) -> Iterator[Served]:
    """Context in which a server answers with `draws` draws of a posterior, or with its mean.

    The folder `path` holds the adapters, the tokenizer, and, once the server answers, `served.json` for
    `bayestune.serving.Client`. A first question goes to the server and to `predict`; a difference gives a warning.

    Args:
        posterior: a posterior whose draws are LoRA adapters.
        task: multiple choice by a causal language model.
        path: the folder to make. overwrite: replace one that bayestune wrote before.
        base: the base model: a GGUF file for llama.cpp; for vLLM a folder or a Hub id, by default the adapter's.
        draws, seed: number of draws, 0 for the mean alone, and their seed.
        backend: "llamacpp", which runs in this process, or "vllm", which runs in its own.
        host, port: where the server listens; port 0 is any free one. api_key: the key that requests must carry.
        context: tokens of a prompt and its answer; by default at least 2048 and the task's, within the positions.

    Yields:
        The record.

    Raises:
        ConfigError, TaskError: a package, the base or the port is missing, or the task has a head; as `export_lora`.
        ServingError: the server does not start, or does not answer as it should.
    """
    check_engine(backend, None if base is None else Path(base), api_key)
    folder, port, sizes = Path(os.path.abspath(path)), check_port(host, port), _sizes(posterior, task, context)
    source = model_source(posterior.model.name_or_path) if base is None else str(base)
    with replaced_if(folder, proof=SERVED, overwrite=overwrite, kind=_KIND) as succeed:
        paths = _exported(posterior, task, folder, backend, draws=draws, seed=seed)
        with _started(backend, source, paths, host=host, port=port, api_key=api_key, **sizes) as url:
            known = {"draws": draws, "seed": seed, "backend": backend, "api_key": api_key, **sizes}
            served = _recorded(posterior, task, url, folder, paths, **known)
            succeed()
            yield served


def _sizes(posterior: Posterior, task: TokenizedTask, context: int | None) -> dict[str, int]:
    """Return the sizes of the vocabulary and of the context; raise an error for a task that cannot be served."""
    described(task)
    config = posterior.model.config.get_text_config()
    positions = config.to_dict().get("max_position_embeddings") or 2048
    if context is not None and not task.max_tokens <= context <= positions:
        raise ConfigError(
            f"context: found {context}, expected {task.max_tokens}, the tokens of the task, to {positions}, the "
            "positions of the model."
        )
    return {"vocabulary": config.vocab_size, "context": context or min(positions, max(2048, task.max_tokens + 1))}


def _exported(
    posterior: Posterior, task: TokenizedTask, folder: Path, backend: str, *, draws: int, seed: int
) -> list[Path]:
    """Write the adapters and the tokenizer, and return the paths of the adapters to serve."""
    with new_folder(folder, overwrite=False) as made:
        inner, format = made / ADAPTERS, "gguf" if backend == "llamacpp" else "peft"
        written = export_draws(posterior, inner, draws=draws, seed=seed, format=format, limits=[])
        task.tokenizer.save_pretrained(made / TOKENIZER)
        inside = [file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file()]
        write_manifest(made, {_KIND: backend}, inside)
    return [folder / ADAPTERS / each.name for each in written if draws == 0 or each.stem != "mean"]


def _started(
    backend: str, base: str, paths: list[Path], *, vocabulary: int, **listening: Any
) -> contextlib.AbstractContextManager[str]:
    """Return the server as a context that yields its URL."""
    if backend == "llamacpp":
        return llamacpp(Path(base), paths, **listening)
    rank = read_json(paths[0] / CONFIG_FILE, "an adapter of PEFT")["r"]
    return vllm(base, paths, rank=rank, vocabulary=vocabulary, **listening)


def _recorded(
    posterior: Posterior,
    task: TokenizedTask,
    url: str,
    folder: Path,
    paths: list[Path],
    *,
    api_key: str | None,
    backend: Backend,
    **known: Any,
) -> Served:
    """Write and return the record of the server, and compare its first answer with `predict`."""
    url = url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    with Client(url, api_key=api_key) as client:
        probes = client.probes()[1:].tolist()
    is_llama = backend == "llamacpp"
    adapters = tuple(
        ServedDraw(
            name=path.stem,
            key=number if is_llama else path.name,
            path=str(path),
            sha256=file_sha256(path if is_llama else path / TENSOR_FILE),
            probe=tuple(probe),
        )
        for number, (path, probe) in enumerate(zip(paths, probes, strict=True))
    )
    served = Served(
        url=url,
        backend=backend,
        kind=posterior.kind,
        adapters=adapters,
        temperature=posterior.temperature,
        ends=_ends(posterior, task),
        task=described(task),
        **known,
    )
    _compare(posterior, task, write_served(served, folder), api_key)
    return served


def _ends(posterior: Posterior, task: TokenizedTask) -> tuple[int, ...]:
    """Return the tokens that end a text, according to the model's generation config and the tokenizer."""
    settings: Any = posterior.model.generation_config.eos_token_id
    named: list[Any] = [*(settings if isinstance(settings, list) else [settings]), task.tokenizer.eos_token_id]
    return tuple(sorted({token for token in named if token is not None}))


def _compare(posterior: Posterior, task: TokenizedTask, record: Path, api_key: str | None) -> None:
    """Warn if the server and `predict` answer a first question differently, as with another base or precision."""
    choices = task.spec.fixed_choices or ("yes", "no")
    row = Row(id="first", question="Is it _?", choices=choices, answer=None)
    if task.faults([row])[0] is not None:  # it is too long for the task
        return
    with Client(record, api_key=api_key) as client:
        here = predict(posterior, task, [row], draws=client.draws, seed=client.seed)
        difference = float((client.predict([row]).probs - here.probs).abs().max())
    if difference > _AGREES:
        warnings.warn(
            f"serve: a first question has probabilities that differ by {difference:.2g} between the server and "
            f"`predict`, expected at most {_AGREES:g}: the base is another model, quantized, or in half precision.",
            BayestuneWarning,
            stacklevel=4,
        )
