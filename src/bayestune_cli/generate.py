"""`bayestune generate`: prompts in, texts out, some at a time."""

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bayestune_cli.arguments import Data, Draws, Overwrite, RunFolder, Seed, check_output_file, check_run, draw_count
from bayestune_cli.errors import FlagError
from bayestune_cli.signals import Stopped

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune.inference import Generation
    from bayestune.tasks.prompted import PromptRow

_FIELDS = {"id", "text", "tokens"}
"""Fields of every text, by which a file of texts is known from other files."""
_SETTINGS = "settings"

Input = Annotated[
    Path, typer.Option(help='Prompts, .jsonl or .jsonl.gz: {"id", "prompt"} or {"id", "messages"} in each line.')
]
Output = Annotated[Path, typer.Option(help="File for the texts, one JSON object per prompt.")]
Together = Annotated[
    Literal["averaged", "per_draw"],
    typer.Option(help="averaged: all draws write one text; per_draw: each draw its own, and how many agree."),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Limit of new tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="Of sampling; 0 takes the most probable token.")]
TopP = Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens of this mass.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given again.")]
Chat = Annotated[bool, typer.Option("--chat", help="Put each prompt to the chat template as a user's message.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts at a time, before draws are stacked.")]
Resume = Annotated[bool, typer.Option("--resume", help="Append to --output the prompts without a text there.")]


def generate(
    run: RunFolder,
    input: Input,
    output: Output,
    draws: Draws = None,
    seed: Seed = 0,
    mode: Together = "averaged",
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    stop: Stop = None,
    chat: Chat = False,
    batch_size: BatchSize = 8,
    data: Data = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a text for each prompt, with the log-probability and the uncertainty in nats of every token."""
    check_run(run)
    check_output_file(output, overwrite=overwrite or resume)
    if overwrite and resume:
        raise FlagError("generate: found --overwrite with --resume, expected one of the two.")
    if output.resolve() == input.resolve():
        raise FlagError(f"--output {output}: found the file of --input, expected another file.")

    from bayestune.experiment import load_run
    from bayestune.files import appending, replacing
    from bayestune.tasks import read_rows
    from bayestune.tasks.prompted import PromptRow

    rows: list[PromptRow] = read_rows(input, labelled=False, formats=(PromptRow,))
    loaded = load_run(run, data=data)
    settings: dict[str, Any] = {"draws": draw_count(loaded, draws), "seed": seed, "mode": mode}
    settings |= {"max_new_tokens": max_new_tokens, "stop_strings": stop, "do_sample": temperature > 0}
    settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    record = {**settings, "chat": chat}
    done = _written(output, record) if resume and output.exists() else set()
    todo, keeps = [row for row in rows if row.id not in done], not (overwrite and output.exists())
    with appending(output) if keeps else replacing(output) as write:
        for part, found in _texts(loaded, todo, batch_size, output if keeps else None, chat=chat, settings=settings):
            records = [
                {"id": row.id, **made, _SETTINGS: record} for row, made in zip(part, found.records(), strict=True)
            ]
            write("".join(f"{json.dumps(each, ensure_ascii=False)}\n" for each in records))
    print(f"{output}: {len(todo)} texts{f', {len(done)} written before' if resume else ''}")


def _texts(
    loaded: "Run",
    rows: Sequence["PromptRow"],
    batch_size: int,
    kept: Path | None,
    *,
    chat: bool,
    settings: dict[str, Any],
) -> Iterator[tuple[Sequence["PromptRow"], "Generation"]]:
    """Yield the texts of some prompts at a time, and print them; sampled tokens are keyed by the prompts' ids."""
    from bayestune.experiment.fitting import autocast
    from bayestune.inference import generate as written
    from bayestune.inference.score import encoded

    prompts: list[Any] = [
        [{"role": "user", "content": row.prompt}] if chat and isinstance(row.prompt, str) else row.prompt
        for row in rows
    ]
    names, tokenizer = [row.id for row in rows], loaded.task.tokenizer
    if rows:
        encoded(loaded.posterior, tokenizer, prompts, names, "generate", settings["max_new_tokens"])  # refuses early
    for start in range(0, len(rows), batch_size):
        part = slice(start, start + batch_size)
        try:
            with autocast(loaded.experiment):
                found = written(
                    loaded.posterior,
                    tokenizer,
                    prompts[part],
                    keys=names[part],
                    batch_size=batch_size,
                    **settings,
                )
        except Stopped as stopped:
            if start and kept is not None:
                stopped.args = (f"{start} prompts have a text in {kept}; continue with --resume",)
            raise
        yield rows[part], found
        _show(names[part], found, start, len(rows))


def _show(ids: Sequence[str], found: "Generation", start: int, total: int) -> None:
    """A line for each text, with its uncertain tokens shaded in a terminal."""
    from bayestune.inference.shading import shaded

    texts = shaded(found) if sys.stdout.isatty() else found.texts
    for i, (name, text) in enumerate(zip(ids, texts, strict=True)):
        ended = "" if found.finished[i] else " [limit reached]"
        agree = "" if found.agreement is None else f" ({found.agreement[i]:.0%} of draws)"
        print(f"[{start + i + 1}/{total}] {name}: {' '.join(text.split())}{agree}{ended}", flush=True)


def _written(output: Path, settings: dict[str, Any]) -> set[str]:
    """The ids that have a text in `output`, whose last line is taken away if it is cut.

    Raises:
        FlagError: a line is no text of this command, or was made with other settings.
    """
    found: set[str] = set()
    whole = 0
    with output.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and found:
                break
            try:
                text: Any = json.loads(line)
            except ValueError:
                text = None
            if not isinstance(text, dict) or not text.keys() >= _FIELDS:
                expected = "a text of `bayestune generate`, to --resume from"
                raise FlagError(f"--output {output}:{number}: found another line, expected {expected}.")
            if text.get(_SETTINGS) != settings:
                raise FlagError(
                    f"--output {output}:{number}: found a text made with {text.get(_SETTINGS)}, expected {settings}: "
                    "pass the options of the command that made it, or another --output."
                )
            found.add(text["id"])
            whole += len(line)
    os.truncate(output, whole)
    return found
