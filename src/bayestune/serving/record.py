"""`served.json`: the record of a server and of the posterior that it serves. Nothing here imports torch."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bayestune.errors import ConfigError

SERVED = "served.json"
PROBE = "The answer to this question is"
"""The text on which draws are compared with the record."""
TOKENIZER = "tokenizer"
"""The folder, beside the record, that holds the tokenizer of the base model."""


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", protected_namespaces=())


class ServedDraw(_Record):
    """A draw on a server.

    Attributes:
        name: mean, draw_0, draw_1, ....
        key: how requests name it: a number for llama.cpp, its name for vLLM.
        path: the GGUF file, or the PEFT folder, that the server loaded.
        sha256: checksum of that file, or of the weights in the folder.
        probe: log-probabilities of the tokens of `PROBE` under this draw, which identify it from another machine.
    """

    name: str
    key: int | str
    path: str
    sha256: str
    probe: tuple[float, ...]


class ServedTask(_Record):
    """A multiple-choice task of a language model; the fields are those of `DatasetSpec` and `Prompt`."""

    name: str
    classes: int = Field(ge=2)
    labels: tuple[str, ...] | None
    fixed_choices: tuple[str, ...] | None
    blank: bool
    max_tokens: int = Field(ge=1)
    scoring: Literal["letters", "text", "text_per_byte"]
    style: str
    system: str | None
    words: tuple[str, ...] | None
    shots: tuple[dict[str, Any], ...]


class Served(_Record):
    """A posterior on a server.

    Attributes:
        url: the server's URL. backend: the server program.
        kind: kind of posterior.
        draws: number of draws; 0 for the mean alone. seed: seed of the draws.
        adapters: each draw, or the mean.
        temperature: divisor of the choices' log-probabilities.
        vocabulary: size of the model's vocabulary. context: most tokens of a prompt and its answer together.
        ends: the tokens that end a text.
        task: the task that was trained.
    """

    format: Literal[1] = 1
    url: str
    backend: Literal["llamacpp", "vllm"]
    kind: str
    draws: int = Field(ge=0)
    seed: int
    adapters: tuple[ServedDraw, ...] = Field(min_length=1)
    temperature: float = Field(gt=0, allow_inf_nan=False)
    vocabulary: int = Field(ge=1)
    context: int = Field(ge=1)
    ends: tuple[int, ...]
    task: ServedTask

    @model_validator(mode="after")
    def _whole(self) -> "Served":
        expected = [f"draw_{k}" for k in range(self.draws)] or ["mean"]
        found = [adapter.name for adapter in self.adapters]
        if found != expected or len({adapter.key for adapter in self.adapters}) < len(found):
            raise ValueError(f"found adapters {', '.join(found)}, expected {', '.join(expected)}, each once")
        return self


def read_served(path: str | Path) -> tuple[Served, Path]:
    """Return the record in a file, or in a folder that `bayestune serve` wrote, and the folder that holds it.

    Raises:
        ConfigError: there is no record, or it is incomplete.
    """
    file = Path(path) / SERVED if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise ConfigError(f"{file}: found no such file, expected the {SERVED} that `bayestune serve` writes.")
    try:
        return Served.model_validate_json(file.read_bytes()), file.parent
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the record"
        raise ConfigError(f"{file}: {place}: {first['msg']}; serve the run again.") from None


def write_served(served: Served, folder: Path) -> Path:
    """Write the record into `folder`, and return its path."""
    from bayestune.files import write_text

    file = folder / SERVED
    write_text(file, json.dumps(served.model_dump(), indent=2, ensure_ascii=False) + "\n")
    return file
