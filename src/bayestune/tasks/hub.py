"""Rows from the Hugging Face Hub: a converter turns a row in the Hub's schema into the fields of one of our rows."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bayestune.errors import ConfigError, DataError, MissingSplitError

Converter = Callable[[Mapping[str, Any], str], dict[str, Any]]
"""Turns a row of the Hub and an id (for data sets without ids) into the fields of one of our rows."""


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """Where a data set is on the Hub: repository, configuration, the Hub's name of each split, and the converter."""

    repository: str
    configuration: str | None
    splits: Mapping[str, str]
    convert: Converter


def fetch(source: HubSource, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place (`hub:repository/configuration/split:number`) and fields of every row of one split.

    Raises:
        ConfigError: the package `datasets` is not installed.
        DataError: the split is not on the Hub, or the data set could not be loaded.
    """
    if split not in source.splits:
        raise MissingSplitError(
            f"split '{split}': not on the Hub in {source.repository}; it has {', '.join(source.splits)}"
        )
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ConfigError(
            f"loading {source.repository} from the Hub needs the package 'datasets': "
            "pip install '.[hub]', or name a folder of files with data= (--data DIR)"
        ) from error
    their_split = source.splits[split]
    place = "/".join(part for part in ("hub:" + source.repository, source.configuration, their_split) if part)
    try:
        rows = datasets.load_dataset(source.repository, source.configuration, split=their_split)
    except (OSError, ValueError) as error:
        raise DataError(f"{place}: could not be loaded: {error}; check the network, or use data=") from error
    for number, row in enumerate(rows, start=1):
        try:
            fields = source.convert(row, f"{their_split}-{number - 1}")
        except KeyError as error:
            raise DataError(
                f"{place}:{number}: found no field {error}; the data set has changed, use data="
            ) from error
        yield f"{place}:{number}", fields


def _strip(value: Any) -> Any:
    return value.strip() if isinstance(value, str) else value


def _position(value: Any, among: list[Any]) -> Any:
    """Return the index of a lettered answer, or the value itself, so that the error of the row's check shows it."""
    return among.index(value) if value in among else value


def winogrande(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    """Convert `sentence`, `option1`, `option2`, and `answer` "1" or "2"; there are no ids."""
    return {
        "id": row_id,
        "question": _strip(row["sentence"]),
        "choices": [_strip(row["option1"]), _strip(row["option2"])],
        "answer": _position(row["answer"], ["1", "2"]),
    }


def lettered(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    """Convert ARC and OpenBookQA: `question` or `question_stem`, `choices` {text, label}, `answerKey`, a label."""
    return {
        "id": row["id"],
        "question": _strip(row["question_stem"] if "question_stem" in row else row["question"]),
        "choices": [_strip(text) for text in row["choices"]["text"]],
        "answer": _position(row["answerKey"], list(row["choices"]["label"])),
    }


def boolq(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    """Convert `question`, `passage`, and `answer`, a bool; there are no ids."""
    return {
        "id": row_id,
        "question": _strip(row["question"]),
        "passage": _strip(row["passage"]),
        "choices": ["False", "True"],
        "answer": int(row["answer"]) if isinstance(row["answer"], bool) else row["answer"],
    }


def mmlu(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    """Convert `question`, `choices`, and `answer`, an index; there are no ids."""
    return {
        "id": row_id,
        "question": _strip(row["question"]),
        "choices": [_strip(text) for text in row["choices"]],
        "answer": row["answer"],
    }


def glue(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    """Convert `sentence`, or `sentence1` and `sentence2`, and `label`, which is -1 if it is withheld."""
    pair = {"text_pair": _strip(row["sentence2"])} if "sentence2" in row else {}
    return {"id": row_id, "text": _strip(row["sentence1"] if pair else row["sentence"]), **pair, "label": row["label"]}


def wic(row: Mapping[str, Any], row_id: str) -> dict[str, Any]:
    """Convert `word`, `sentence1`, `sentence2` and `label`; the first text becomes `word: sentence1`."""
    return {**glue(row, row_id), "text": f"{_strip(row['word'])}: {_strip(row['sentence1'])}"}
