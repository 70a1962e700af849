"""`serve`: export the draws of a posterior, start a real server with them, and write the record of what it answers."""

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from bayestune.errors import BayestuneWarning
from bayestune.files import file_sha256, new_folder, read_json
from bayestune.inference import predict
from bayestune.sampling import Posterior
from bayestune.serving.asking import described
from bayestune.serving.client import Client
from bayestune.serving.engines import check_engine, check_port, llamacpp, vllm
from bayestune.serving.lora import export_draws
from bayestune.serving.record import TOKENIZER, Served, ServedDraw, write_served
from bayestune.storage.manifest import CONFIG_FILE, TENSOR_FILE, write_manifest
from bayestune.tasks import Row, TokenizedTask

ADAPTERS = "adapters"
Backend = Literal["llamacpp", "vllm"]
_AGREES = 1e-3
"""The largest difference of probabilities that is not warned of; in float32 it is about 1e-6."""


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
    """Serve `draws` draws of a posterior, or its mean, as long as the context lasts.

    The folder `path` holds the adapters, the tokenizer, and, once the server answers, `served.json` for
    `bayestune.serving.Client`. A first question is put to the server and to `predict`; a difference is warned of.

    Args:
        posterior: whose draws are LoRA adapters.
        task: multiple choice by a causal language model.
        path: the folder to make. overwrite: replace one that bayestune wrote before.
        base: the base model: a GGUF file for llama.cpp; for vLLM a folder or a Hub id, by default the adapter's.
        draws, seed: number of draws, 0 for the mean alone, and their seed.
        backend: "llamacpp", in this process, or "vllm", in one of its own.
        host, port: where the server listens, port 0 being any free one. api_key: that every request must carry.
        context: tokens of a prompt and its answer; by default enough for the task, and 2048 or all positions.

    Yields:
        The record.

    Raises:
        ConfigError, TaskError: a package, the base or the port is missing, or the task has a head; as `export_lora`.
        ServingError: the server does not start, or does not answer as it should.
    """
    check_engine(backend, None if base is None else Path(base))
    folder, asked, port = Path(path), described(task), check_port(host, port)
    vocabulary, tokens = _sizes(posterior, task)
    listening = {"host": host, "port": port, "api_key": api_key, "context": context or tokens}
    adapters = _exported(posterior, task, folder, backend, draws=draws, seed=seed, overwrite=overwrite)
    with _started(
        backend, str(base or posterior.model.name_or_path), adapters, vocabulary=vocabulary, **listening
    ) as url:
        drawn = {"kind": posterior.kind, "draws": draws, "seed": seed, "temperature": posterior.temperature}
        sizes = {"vocabulary": vocabulary, "context": context or tokens}
        served = Served(url=url, backend=backend, adapters=adapters, task=asked, **drawn, **sizes)
        _compare(posterior, task, write_served(served, folder), api_key)
        yield served


def _sizes(posterior: Posterior, task: TokenizedTask) -> tuple[int, int]:
    """The number of tokens of the model, and of a prompt with its answer."""
    config = posterior.model.config.get_text_config()
    positions = config.to_dict().get("max_position_embeddings") or 2048
    return config.vocab_size, min(positions, max(2048, task.max_tokens + 1))


def _exported(
    posterior: Posterior,
    task: TokenizedTask,
    folder: Path,
    backend: str,
    *,
    draws: int,
    seed: int,
    overwrite: bool,
) -> tuple[ServedDraw, ...]:
    """Write the adapters and the tokenizer, and return what is to be served."""
    is_llama = backend == "llamacpp"
    with new_folder(folder, overwrite=overwrite) as made:
        inner, format = made / ADAPTERS, "gguf" if is_llama else "peft"
        written = export_draws(posterior, inner, draws=draws, seed=seed, format=format, limits=[])
        task.tokenizer.save_pretrained(made / TOKENIZER)
        inside = [file.relative_to(made).as_posix() for file in made.rglob("*") if file.is_file()]
        write_manifest(made, {"served": backend}, inside)
    paths = [folder / ADAPTERS / each.name for each in written if draws == 0 or each.stem != "mean"]
    return tuple(
        ServedDraw(
            name=path.stem,
            key=number if is_llama else path.name,
            path=str(path),
            sha256=file_sha256(path if is_llama else path / TENSOR_FILE),
        )
        for number, path in enumerate(paths)
    )


def _started(
    backend: str, base: str, draws: tuple[ServedDraw, ...], *, vocabulary: int, **listening: Any
) -> contextlib.AbstractContextManager[str]:
    """The server, whose context yields its URL."""
    paths = [Path(draw.path) for draw in draws]
    if backend == "llamacpp":
        return llamacpp(Path(base), paths, **listening)
    rank = read_json(paths[0] / CONFIG_FILE, "an adapter of PEFT")["r"]
    return vllm(base, paths, rank=rank, vocabulary=vocabulary, **listening)


def _compare(posterior: Posterior, task: TokenizedTask, record: Path, api_key: str | None) -> None:
    """Warn if the server and `predict` answer a first question otherwise, as with another base or precision."""
    choices = task.spec.fixed_choices or ("yes", "no")
    row = Row(id="first", question="Is it _?", choices=choices, answer=None)
    with Client(record, api_key=api_key) as client:
        here = predict(posterior, task, [row], draws=client.draws, seed=client.seed)
        difference = float((client.predict([row]).probs - here.probs).abs().max())
    if difference > _AGREES:
        warnings.warn(
            f"serve: a first question has probabilities that differ by {difference:.2g} between the server and "
            "`predict`; in float32 it is about 1e-6. The base is another model, quantized, or in half precision.",
            BayestuneWarning,
            stacklevel=3,
        )
