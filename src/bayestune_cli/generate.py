"""`bayestune generate`, which writes a text for each prompt of a file, in batches."""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from bayestune_cli.arguments import (
    Data,
    Draws,
    Overwrite,
    RunFolder,
    Seed,
    check_output_file,
    check_run,
    draw_count,
    writing_lines,
)
from bayestune_cli.batches import check_files
from bayestune_cli.errors import FlagError
from bayestune_cli.signals import Stopped

if TYPE_CHECKING:
    from bayestune.experiment import Run
    from bayestune.inference import Generation
    from bayestune.tasks.prompted import PromptRow

_FIELDS = {"id", "text", "tokens"}
"""Fields of every text; they distinguish a file of texts from other files."""
_SETTINGS = "settings"

Input = Annotated[
    Path, typer.Option(help='Prompts, .jsonl or .jsonl.gz: {"id", "prompt"} or {"id", "messages"} in each line.')
]
Output = Annotated[Path, typer.Option(help="File for the texts, one JSON object per prompt.")]
Together = Annotated[
    Literal["averaged", "per_draw"],
    typer.Option(
        help="averaged: all draws write one text; per_draw: each draw writes its own, and agreement is shown."
    ),
]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Limit of new tokens.")]
Temperature = Annotated[float, typer.Option(min=0, help="Sampling temperature; 0 takes the most probable token.")]
TopP = Annotated[
    float, typer.Option(min=0, max=1, help="Sample from the likeliest tokens with this total probability.")
]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; can be repeated.")]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put each prompt into the chat template as a user's message; default: as the run was trained.",
    ),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts per batch, before draws are stacked.")]
Resume = Annotated[bool, typer.Option("--resume", help="Append texts for the prompts that have none in --output.")]


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
    chat: Chat = None,
    batch_size: BatchSize = 8,
    data: Data = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
) -> None:
    """Write a text for each prompt, with the uncertainty of every token; if --input has answers, score the texts."""
    check_run(run)
    check_output_file(output, overwrite=overwrite or resume)
    if overwrite and resume:
        raise FlagError("generate: found --overwrite with --resume, expected one of the two.")
    if not temperature and top_p < 1:
        raise FlagError("--top-p: found it without --temperature, expected both: at temperature 0 nothing is sampled.")
    check_files(input, output, flag="--input", whole=False)

    from bayestune.experiment import load_run
    from bayestune.experiment.processes import together
    from bayestune.files import MANIFEST, file_sha256
    from bayestune.tasks import read_rows
    from bayestune.tasks.prompted import PromptRow

    rows: list[PromptRow] = read_rows(input, labelled=False, formats=(PromptRow,))
    loaded = load_run(run, data=data)
    settings: dict[str, Any] = {"draws": draw_count(loaded, draws), "seed": seed, "mode": mode}
    settings |= {"max_new_tokens": max_new_tokens, "stop_strings": stop, "do_sample": temperature > 0}
    settings |= {"temperature": temperature, "top_p": top_p, "top_k": 0} if temperature > 0 else {}
    chat = loaded.experiment.prompt == "chat" if chat is None else chat
    prompts = _checked(loaded, rows, chat, settings)
    record = {**settings, "chat": chat, "posterior": file_sha256(run / "posterior" / MANIFEST)}
    done, length = _written(output, record, prompts) if resume and output.exists() else (set[str](), None)
    done, length = together((done, length))[0]  # from here on the main process may write
    todo, keeps = [row.id for row in rows if row.id not in done], not (overwrite and output.exists())
    with writing_lines(output, keeps=keeps, length=length) as write:
        for names, found in _texts(loaded, todo, prompts, batch_size, output if keeps else None, settings):
            for name, made in zip(names, found.records(), strict=True):
                own = {"prompt_sha256": _sha256(prompts[name]), _SETTINGS: record}
                write(json.dumps({"id": name, **made, **own}, ensure_ascii=False) + "\n")
    _conclude(output, rows, f"{len(todo)} texts{f', {len(done)} written before' if resume else ''}", settings["draws"])


def _checked(loaded: "Run", rows: Sequence["PromptRow"], chat: bool, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the prompts by id; raise an error if one cannot be used."""
    from bayestune.inference.generate import prepared

    prompts = {
        row.id: [{"role": "user", "content": row.prompt}] if chat and isinstance(row.prompt, str) else row.prompt
        for row in rows
    }
    own = {name: value for name, value in settings.items() if name not in ("draws", "seed", "mode")}
    asked = settings["draws"], settings["seed"], settings["mode"], own
    prepared(loaded.posterior, loaded.task.tokenizer, list(prompts.values()), list(prompts), *asked)
    return prompts


def _sha256(prompt: Any) -> str:
    return hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()


def _texts(
    loaded: "Run",
    names: Sequence[str],
    prompts: Mapping[str, Any],
    batch_size: int,
    kept: Path | None,
    settings: dict[str, Any],
) -> Iterator[tuple[Sequence[str], "Generation"]]:
    """Yield and print the texts of one batch of prompts after another; sampled tokens are keyed by the prompts' ids.

    Each process of a launcher writes `batch_size` texts at a time.
    """
    from bayestune.experiment.processes import process_count, rank, together

    starts = range(0, len(names), batch_size)
    for first in range(0, len(starts), process_count()):
        parts = [names[start : start + batch_size] for start in starts[first : first + process_count()]]
        try:
            mine = _written_by(loaded, parts[rank()], prompts, batch_size, settings) if rank() < len(parts) else None
            found = together(mine)
        except Stopped as stopped:
            if first and kept is not None:
                stopped.args = (f"{starts[first]} more prompts have a text in {kept}; continue with --resume",)
            raise
        for start, part, texts in zip(starts[first:], parts, found, strict=False):
            assert texts is not None
            yield part, texts
            _show(part, texts, start, len(names))


def _written_by(
    loaded: "Run", part: Sequence[str], prompts: Mapping[str, Any], batch_size: int, settings: dict[str, Any]
) -> "Generation":
    from bayestune.experiment.fitting import autocast
    from bayestune.inference import generate as written

    asked = [prompts[name] for name in part]
    with autocast(loaded.experiment):
        return written(loaded.posterior, loaded.task.tokenizer, asked, keys=part, batch_size=batch_size, **settings)


def _show(ids: Sequence[str], found: "Generation", start: int, total: int) -> None:
    """Print a line for each text, with its uncertain tokens shaded in a terminal."""
    from bayestune.inference.shading import shaded

    texts = shaded(found) if sys.stdout.isatty() else found.texts
    for i, (name, text) in enumerate(zip(ids, texts, strict=True)):
        ended = "" if found.finished[i] else " [limit reached]"
        agree = "" if found.agreement is None else f" ({found.agreement[i]:.0%} of draws)"
        line = f"[{start + i + 1}/{total}] {name}: {' '.join(text.split())}{agree}{ended}"
        encoding = sys.stdout.encoding or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), flush=True)


def _conclude(output: Path, rows: Sequence["PromptRow"], made: str, draws: int) -> None:
    """Print what was made and, if each row has an answer, the scores of the texts and the AUROC of uncertainties."""
    from bayestune.experiment import score_table
    from bayestune.experiment.processes import is_main
    from bayestune.inference.answer_scores import scores_of_texts

    print(f"{output}: {made}")
    answers = {row.id: row.answer for row in rows if row.answer is not None}
    if len(answers) < len(rows) or not is_main():
        return
    with output.open("rb") as lines:
        texts = [text for text in map(json.loads, lines) if text["id"] in answers]
    scores = scores_of_texts(texts, [answers[text["id"]] for text in texts], draws=draws)
    print(score_table({f"texts N={draws}": scores}))
    known = {name: value for name, value in scores.auroc.items() if value is not None}
    if known:
        print("AUROC, how well a score tells right answers from wrong ones:")
        print("\n".join(f"{'':4}{name:<24} {value:.3f}" for name, value in known.items()))


def _written(output: Path, settings: dict[str, Any], prompts: Mapping[str, Any]) -> tuple[set[str], int]:
    """Return the ids that have a text in `output`, and the bytes of its whole lines; only the last may be cut.

    Raises:
        FlagError: a line is not a text of this command, or was made with a different run, settings or prompt.
    """
    found: set[str] = set()
    whole = 0
    with output.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") and (found or line.startswith(b'{"id": ')):
                break
            text, where = _parsed(line), f"--output {output}:{number}"
            if text is None:
                raise FlagError(f"{where}: found another line, expected a text of `bayestune generate`.")
            if text.get(_SETTINGS) != settings:
                raise FlagError(
                    f"{where}: found a text made with {text.get(_SETTINGS)}, expected {settings}: pass the run and "
                    "the options of the command that made it, or another --output."
                )
            if text["id"] in prompts and text.get("prompt_sha256") != _sha256(prompts[text["id"]]):
                raise FlagError(f"{where}: found a text of another prompt with the id {text['id']!r}; rename one.")
            found.add(text["id"])
            whole += len(line)
    return found, whole


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the text that a line holds, or None."""
    try:
        text: Any = json.loads(line)
    except ValueError:
        return None
    return text if isinstance(text, dict) and text.keys() >= _FIELDS else None
