"""Multiple-choice tasks on a server: convert tasks to records and back, rows to requests, answers to predictions."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

from bayestune.errors import ConfigError, DataError, TaskError, one_line
from bayestune.serving.record import ServedTask
from bayestune.serving.wire import Asked
from bayestune.tasks import TASKS, AnyRow, DatasetSpec, Prediction, Prompt, Row, TokenizedTask
from bayestune.tasks.causal import CausalChoice
from bayestune.tasks.data import parse_row


def described(task: TokenizedTask) -> ServedTask:
    """Return the record of a task.

    Raises:
        TaskError: its answers are not the next tokens of a language model.
    """
    if not isinstance(task, CausalChoice):
        raise TaskError(
            f"serve: found task {task.name} with a head of its own ({type(task).__name__}), expected multiple choice "
            "by a causal language model, whose next tokens a server gives."
        )
    spec, prompt = task.spec, task.prompt
    return ServedTask(
        name=spec.name,
        classes=spec.classes,
        labels=spec.labels,
        fixed_choices=spec.fixed_choices,
        blank=spec.blank,
        max_tokens=task.max_tokens,
        scoring=prompt.scoring,
        style=prompt.style,
        system=prompt.system,
        words=prompt.words,
        shots=tuple(_fields(shot) for shot in prompt.shots),
    )


def _fields(row: Row) -> dict[str, Any]:
    found = {name: value for name, value in vars(row).items() if name != "where" and value is not None}
    return found | {"choices": list(row.choices)}


def task_of(record: ServedTask, tokenizer: Path) -> CausalChoice:
    """Return the task of a record, with the tokenizer in the folder `tokenizer`.

    Raises:
        ConfigError: the folder holds no tokenizer.
    """
    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{tokenizer}: found no tokenizer: {one_line(error)}; serve the run again.") from error
    shots: list[Any] = [parse_row(dict(row), where=f"shot {i}", formats=(Row,)) for i, row in enumerate(record.shots)]
    prompt = Prompt(
        scoring=record.scoring, style=record.style, system=record.system, words=record.words, shots=tuple(shots)
    )
    spec = DatasetSpec(
        name=record.name,
        folder=record.name,
        row=Row,
        classes=record.classes,
        labels=record.labels,
        fixed_choices=record.fixed_choices,
        blank=record.blank,
    )
    (make,) = (each for each in TASKS if issubclass(each, CausalChoice) and record.scoring in each.scorings)
    return make(spec, loaded, data=None, max_tokens=record.max_tokens, prompt=prompt)


def asked_rows(task: CausalChoice, rows: Sequence[AnyRow]) -> tuple[list[dict[str, Any]], list[Asked]]:
    """Return the example of each row, and the question about it for a server."""
    if not rows:
        raise DataError("predict: found no rows, expected at least one.")
    examples = [task.example(row) for row in rows]
    asked = []
    for example in examples:
        answers = task.continuations(example)
        single = all(len(answer) == 1 for answer in answers)
        asked.append(Asked(example["context"], answers, relative=single and task.shift_invariant))
    return examples, asked


def prediction(
    task: CausalChoice,
    rows: Sequence[AnyRow],
    examples: Sequence[Mapping[str, Any]],
    log_probs: NDArray[Any],
    *,
    draws: int,
    seed: int,
    temperature: float,
) -> Prediction:
    """Return the prediction from the log-probabilities [slices, rows, choices] of the answers' texts."""
    outputs = torch.full((*log_probs.shape[:2], task.columns), float("-inf"), dtype=torch.float64)
    for row, example in enumerate(examples):
        count = len(task.continuations(example))
        outputs[:, row, :count] = task.scored(example, torch.from_numpy(log_probs[:, row, :count]))
    return task.prediction(outputs, rows, draws=draws, seed=seed, temperature=temperature)
