"""`bayestune serve`, which serves the draws of a run, and `ServedRun`, which asks such a server."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from bayestune_cli.arguments import (
    ApiKey,
    Data,
    Draws,
    Overwrite,
    RunFolder,
    Seed,
    check_run,
    draw_count,
    load,
)
from bayestune_cli.errors import FlagError
from bayestune_cli.signals import Stopped

if TYPE_CHECKING:
    from bayestune.serving import Client
    from bayestune.serving.record import Served
    from bayestune.tasks import AnyRow, Prediction
    from bayestune.tasks.causal import CausalChoice


Output = Annotated[Path, typer.Option(help="Folder to write: adapters, tokenizer and served.json.")]
Base = Annotated[
    Path | None,
    typer.Option(help="Base model: a GGUF file for llama.cpp; for vllm a folder, by default that of the run."),
]
Backend = Annotated[
    Literal["llamacpp", "vllm"], typer.Option(help="llamacpp, in this process; or vllm, if it is installed.")
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")]
AsProxy = Annotated[
    bool, typer.Option("--proxy", help="Serve averaged completions and chats at --port, with OpenAI's API.")
]
Context = Annotated[
    int | None,
    typer.Option(min=8, help="Largest number of tokens of prompt and answer; default: enough for the task."),
]


def serve(
    run: RunFolder,
    output: Output,
    base: Base = None,
    draws: Draws = None,
    seed: Seed = 0,
    backend: Backend = "llamacpp",
    host: Host = "127.0.0.1",
    port: Port = 8080,
    proxy: AsProxy = False,
    api_key: ApiKey = None,
    context: Context = None,
    data: Data = None,
    overwrite: Overwrite = False,
) -> None:
    """Serve the draws of a run with llama.cpp or vLLM until Ctrl-C; `predict --served` and `Client` average them."""
    check_run(run)
    if output.exists() and not overwrite:
        raise FlagError(f"--output {output}: it exists; choose another, or pass --overwrite.")
    if backend == "llamacpp" and base is not None and not base.is_file():
        raise FlagError(f"--base {base}: found no such file, expected the base model as a GGUF file; check the path.")

    from bayestune.files import check_writable
    from bayestune.serving.engines import check_engine, check_port
    from bayestune.serving.launch import serve as serving
    from bayestune.serving.record import SERVED

    check_engine(backend, base, api_key)
    port = check_port(host, port)
    check_writable(output.parent, f"--output {output}")
    loaded = load(run, data, None)
    drawn = {"draws": draw_count(loaded, draws), "seed": seed, "overwrite": overwrite}
    asked = {"host": "127.0.0.1", "port": 0} if proxy else {"host": host, "port": port}
    asked |= {"base": base, "backend": backend, "api_key": api_key, "context": context}
    with serving(loaded.posterior, loaded.task, output, **drawn, **asked) as served:
        what = f"{served.draws} draws" if served.draws else "the mean"
        print(f"{output / SERVED}: {what} at {served.url}; Ctrl-C stops the server", flush=True)
        try:
            if proxy:
                _speak(output, host=host, port=port, api_key=api_key)
            _wait(served)
        except Stopped:
            print("stopped")


def _wait(served: "Served") -> None:
    """Wait for the signal that stops the server; raise an error if a server in its own process ends."""
    from bayestune.errors import ServingError

    if served.backend == "llamacpp":
        signal.pause()
    while os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        time.sleep(1)
    raise ServingError(
        f"{served.url}: the server ended by itself; its output is above; start it again with --overwrite."
    )


def _speak(folder: Path, *, host: str, port: int, api_key: str | None) -> None:
    """Serve averaged answers with OpenAI's API, until a signal."""
    from bayestune.serving import Client
    from bayestune.serving.proxy import Proxy, run

    with Client(folder, api_key=api_key) as client:
        shown = f"[{host}]" if ":" in host else host
        address = f"the model 'posterior' at http://{shown}:{port}/v1; Ctrl-C stops it"
        run(Proxy(client, api_key=api_key), host=host, port=port, listening=lambda: print(address, flush=True))


@dataclass(frozen=True, kw_only=True)
class ServedRun:
    """A running server with the interface of a run."""

    client: "Client"

    @classmethod
    def of(cls, path: Path, api_key: str | None, *, draws: int | None, seed: int) -> "ServedRun":
        """Connect to the server recorded at `path`; raise an error if its draws are not those that are asked for."""
        from bayestune.serving import Client

        client = Client(path, api_key=api_key)
        if draws not in (None, client.draws) or seed not in (0, client.seed):
            client.close()
            raise FlagError(
                f"predict: found {client.draws} served draws of seed {client.seed}, and another --draws or --seed; "
                "leave both out."
            )
        return cls(client=client)

    @property
    def task(self) -> "CausalChoice":
        """The task that was trained."""
        return self.client.task

    @property
    def default_draws(self) -> int:
        """The number of draws that are served."""
        return self.client.draws

    def predict(self, rows: "Sequence[AnyRow]", *, draws: int, seed: int = 0, progress: bool = False) -> "Prediction":
        """Answer rows with all draws that are served."""
        return self.client.predict(rows, progress=progress)
