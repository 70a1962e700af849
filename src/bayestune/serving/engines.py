"""Start a server of LoRA adapters: llama.cpp in this process, or vLLM in its own."""

import contextlib
import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import torch

from bayestune.errors import ConfigError, ServingError, one_line
from bayestune.serving.connection import check_api_key

_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM accepts as its largest rank."""


def check_engine(backend: str, base: Path | None, api_key: str | None) -> None:
    """Raise a ConfigError if the backend is unknown, its package or base is missing, or the API key is unusable."""
    check_api_key(api_key)
    if backend not in ("llamacpp", "vllm"):
        raise ConfigError(f"backend: found {backend!r}, expected 'llamacpp' or 'vllm'.")
    package, install = {
        "llamacpp": ("xllamacpp", "pip install '.[serve]'"),
        "vllm": ("vllm", "install it beside this project's transformers, as docs/serving.md says"),
    }[backend]
    if importlib.util.find_spec(package) is None:
        raise ConfigError(f"backend {backend}: found no package {package}, expected it; {install}.")
    if backend == "llamacpp" and (base is None or not base.is_file()):
        found = "nothing" if base is None else f"no file {base}"
        raise ConfigError(
            f"base: found {found}, expected the base model as a GGUF file; make it with llama.cpp's "
            "`python convert_hf_to_gguf.py MODEL --outtype f32 --outfile base.gguf`."
        )


def check_port(host: str, port: int) -> int:
    """Return the port, or for 0 a free one; raise a ConfigError if it cannot be opened."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return int(probe.getsockname()[1])
        except OSError as error:
            raise ConfigError(f"port {port}: cannot be opened on {host}: {error.strerror}; choose another.") from error


@contextlib.contextmanager
def llamacpp(
    base: Path, adapters: Sequence[Path], *, host: str, port: int, api_key: str | None, context: int
) -> Iterator[str]:
    """Run llama.cpp's server in this process, in float32, with as many threads as torch uses, and yield its URL.

    Adapters have the scale 0 until a request sets it. The prompt cache is off, since it is not keyed by adapter.
    """
    xllamacpp: Any = importlib.import_module("xllamacpp")
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx = str(base), context
    settings.hostnames, settings.port = [host], port
    settings.api_keys = [] if api_key is None else [api_key]
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
    settings.cache_prompt, settings.cache_idle_slots, settings.cache_ram_mib = False, False, 0
    settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
    settings.warmup, settings.verbosity, settings.ui = False, 0, False
    try:
        server = xllamacpp.Server(settings)
    except RuntimeError as error:
        raise ServingError(
            f"llama.cpp did not start with {base} and {len(adapters)} adapters ({one_line(error)}): the file is not "
            f"a GGUF model or not the adapters' base, or port {port} is taken."
        ) from error
    try:
        # Wait for an answer of the server's loop: stopped before the loop runs, the server would hang.
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        url = server.listening_address
        try:
            httpx2.get(f"{url}/lora-adapters", headers=headers, timeout=60, trust_env=False).raise_for_status()
        except httpx2.HTTPError as error:
            raise ServingError(f"{url}: llama.cpp was started and does not answer: {one_line(error)}") from error
        yield url
    finally:
        del server  # this stops it


@contextlib.contextmanager
def vllm(
    base: str,
    adapters: Sequence[Path],
    *,
    host: str,
    port: int,
    api_key: str | None,
    context: int,
    rank: int,
    vocabulary: int,
) -> Iterator[str]:
    """Run vLLM's server in a process of its own, and yield its URL."""
    fitting = next((each for each in _RANKS if each >= rank), None)
    if fitting is None:
        raise ConfigError(f"rank: found {rank}, expected at most {_RANKS[-1]}, vLLM's largest.")
    names = [f"{path.name}={path.resolve()}" for path in adapters]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", base, "--host", host]
    command += ["--port", str(port), "--max-model-len", str(context), "--dtype", "float32", "--enable-lora"]
    command += ["--max-loras", str(len(adapters)), "--max-lora-rank", str(fitting)]
    command += ["--max-logprobs", str(vocabulary), "--lora-modules", *names]
    environment = os.environ | ({} if api_key is None else {"VLLM_API_KEY": api_key})
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=2)  # its log goes to stderr
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    try:
        _wait(process, url)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)  # it has child processes
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], url: str, seconds: float = 900) -> None:
    """Return once the server answers; raise an error if it ends first, or after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise ServingError(f"vLLM ended with code {process.returncode} before it answered; its words are above.")
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(f"{url}/health", trust_env=False).is_success:
                return
        time.sleep(0.5)
    raise ServingError(f"{url}: found no answer of vLLM within {seconds:g} s.")
