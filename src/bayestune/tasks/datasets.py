"""The data sets known by name, your own folders of data, and the files of their splits."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bayestune.errors import DataError, MissingSplitError
from bayestune.tasks import hub
from bayestune.tasks.data import (
    FORMATS,
    check_kinds,
    check_labels,
    check_together,
    formats_of,
    parse_row,
    read_rows,
    scan_rows,
)
from bayestune.tasks.rows import AnyRow, NumberRow, Row, TextRow, shown

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""The names that a data set or a split can have; they become part of a path."""


@dataclass(frozen=True, kw_only=True)
class DatasetSpec:
    """The description of a data set.

    Attributes:
        folder: its folder under the data folder.
        row: the class of its rows.
        classes: the largest number of choices, the number of classes, or the count of numbers per row.
        splits: by split, the file stems to look for, in order, if they differ from the name of the split.
        evaluation: the split that is usually reported; for your own data set dev, or test if there is no dev.
        labels: names of the classes, if labels are texts.
        fixed_choices: the answers, if they are the same for all rows.
        blank: whether every question has one `_` to fill.
        source: where it is on the Hub; None for your own data set.
    """

    name: str
    folder: str
    row: type[AnyRow]
    classes: int
    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    evaluation: str = "dev"
    labels: tuple[str, ...] | None = None
    fixed_choices: tuple[str, ...] | None = None
    blank: bool = False
    source: hub.HubSource | None = None

    def check(self, row: AnyRow) -> None:
        """Raise a DataError, naming the row and the field, if a row cannot belong to this data set."""
        if not isinstance(row, AnyRow):  # such as a dict, if no type checker is used
            found = type(row).__name__
            raise DataError(f"row: found a {found}, expected a row such as those from tasks.read_rows(path)")
        row.check_in(self)


_ARC_SPLITS = {"train": "train", "dev": "validation", "test": "test"}
_GLUE_SPLITS = {"train": "train", "dev": "validation"}


def _winogrande(size: str) -> DatasetSpec:
    source = hub.HubSource(
        repository="allenai/winogrande",
        configuration=f"winogrande_{size}",
        splits={"train": "train", f"train_{size}": "train", "dev": "validation"},
        convert=hub.winogrande,
    )
    splits = {"train": (f"train_{size}",)}
    return DatasetSpec(
        name=f"winogrande_{size}",
        folder="winogrande",
        row=Row,
        classes=2,
        splits=splits,
        blank=True,
        source=source,
    )


def _lettered(name: str, repository: str, configuration: str, classes: int) -> DatasetSpec:
    source = hub.HubSource(
        repository=repository, configuration=configuration, splits=_ARC_SPLITS, convert=hub.lettered
    )
    return DatasetSpec(name=name, folder=name, row=Row, classes=classes, source=source)


def _boolq() -> DatasetSpec:
    source = hub.HubSource(repository="google/boolq", configuration=None, splits=_GLUE_SPLITS, convert=hub.boolq)
    return DatasetSpec(
        name="boolq",
        folder="boolq",
        row=Row,
        classes=2,
        fixed_choices=("False", "True"),
        source=source,
    )


def _mmlu(name: str) -> DatasetSpec:
    source = hub.HubSource(
        repository="cais/mmlu",
        configuration=name.removeprefix("mmlu_"),
        splits={"dev": "dev", "validation": "validation", "test": "test"},
        convert=hub.mmlu,
    )
    return DatasetSpec(name=name, folder=name, row=Row, classes=4, evaluation="test", source=source)


def _sentences(name: str, repository: str, convert: hub.Converter) -> DatasetSpec:
    source = hub.HubSource(repository=repository, configuration=name, splits=_GLUE_SPLITS, convert=convert)
    return DatasetSpec(name=name, folder=name, row=TextRow, classes=2, source=source)


KNOWN: tuple[DatasetSpec, ...] = (
    _winogrande("s"),
    _winogrande("m"),
    _lettered("arc_easy", "allenai/ai2_arc", "ARC-Easy", 5),
    _lettered("arc_challenge", "allenai/ai2_arc", "ARC-Challenge", 5),
    _lettered("openbookqa", "allenai/openbookqa", "main", 4),
    _boolq(),
    _sentences("rte", "nyu-mll/glue", hub.glue),
    _sentences("mrpc", "nyu-mll/glue", hub.glue),
    _sentences("cola", "nyu-mll/glue", hub.glue),
    _sentences("wic", "aps/super_glue", hub.wic),
)
"""The data sets known by name; `dataset` also knows any `mmlu_<subject>`."""


def dataset(
    name: str,
    data: str | Path | None = None,
    *,
    classes: int | None = None,
    labels: tuple[str, ...] | None = None,
    numbers: int | None = None,
) -> DatasetSpec:
    """Return the description of the data set `name`: a known one, or your own in the folder `data/name`.

    Args:
        name: name of the data set.
        data: folder with data sets.
        classes: number of classes of your own data set; by default counted in all its files.
        labels: names of the classes of your own data set, whose files are then not read; by default the text labels of
            its train split, sorted.
        numbers: numbers per row of your own data set of numbers, whose files are then not read.

    Raises:
        DataError: `name` is neither a known data set nor a folder in `data`.
    """
    for spec in KNOWN:
        if spec.name == name:
            return spec
    if re.fullmatch(r"mmlu_[a-z_]+", name):
        return _mmlu(name)
    folder = None if data is None or not NAME.fullmatch(name) else Path(data) / name
    if folder is not None and labels is not None:
        return _named(name, folder, labels)
    if folder is not None and numbers is not None:
        return DatasetSpec(name=name, folder=name, row=NumberRow, classes=numbers, evaluation=_evaluation(folder))
    if folder is not None and folder.is_dir():
        return _own(name, folder, classes)
    if data is not None and not Path(data).is_dir():
        raise MissingSplitError(f"{data}: no such folder, expected the one with the data sets (data=, --data DIR)")
    known = ", ".join([spec.name for spec in KNOWN] + ["mmlu_<subject>"])
    looked = "no data folder was given (data=, --data DIR)" if data is None else f"no folder {Path(data) / name}"
    raise DataError(f"unknown data set {shown(name)}: not one of {known}; and {looked}")


def _own(name: str, folder: Path, classes: int | None) -> DatasetSpec:
    formats = _formats(folder)
    splits = [(_split(path), read_rows(path, labelled=False, formats=formats)) for path in _files(folder)]
    rows = [row for _, found in splits for row in found]
    if not rows:
        raise DataError(f"{folder}: found no .jsonl or .jsonl.gz file, expected one per split, such as train.jsonl")
    check_kinds(rows)
    check_labels(rows)
    if any(isinstance(row.target, str) for row in rows):
        train = [row for split, found in splits if split == "train" for row in found]
        return _named_by(train, rows, name, folder, classes)
    counted, kind = rows[0].count_classes(rows), type(rows[0])
    if (classes or counted) < kind.fewest:
        found = f"{counted} {kind.counted} in its labels"
        raise DataError(f"{folder}: found {found}, expected at least {kind.fewest}; label more rows")
    evaluation = _evaluation(folder)
    return DatasetSpec(name=name, folder=name, row=kind, classes=classes or counted, evaluation=evaluation)


def _formats(folder: Path) -> tuple[type[AnyRow], ...]:
    """Return the row classes to expect in a folder; a labeled first row shows the class of its unlabeled rows."""
    firsts = [next(scan_rows(path, labelled=False), None) for path in _files(folder)]
    labeled = [type(row) for row in firsts if isinstance(row, AnyRow) and row.target is not None]
    return formats_of(labeled[0]) if labeled else FORMATS


def _named_by(train: list[Any], rows: list[Any], name: str, folder: Path, classes: int | None) -> DatasetSpec:
    """Return a data set whose classes are the text labels of its train split; all rows are checked against them."""
    labels = tuple(sorted({row.target for row in train if isinstance(row.target, str)}))
    if not train:
        raise DataError(f"{folder}: found text labels but no train split, expected train.jsonl with every label")
    if len(labels) < 2 or classes not in (None, len(labels)):
        expected = "at least 2; label more rows" if classes is None else f"the {classes} of classes={classes}"
        raise DataError(f"{folder}: found {len(labels)} class names in its train split, expected {expected}")
    spec = _named(name, folder, labels)
    for row in rows:
        spec.check(row)
    return spec


def _named(name: str, folder: Path, labels: tuple[str, ...]) -> DatasetSpec:
    return DatasetSpec(
        name=name, folder=name, row=TextRow, classes=len(labels), labels=labels, evaluation=_evaluation(folder)
    )


def _split(path: Path) -> str:
    return path.name.partition(".")[0]


def _evaluation(folder: Path) -> str:
    splits = {_split(path) for path in _files(folder)}
    return "test" if "test" in splits and "dev" not in splits else "dev"


def _files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.jsonl"), *folder.glob("*.jsonl.gz")])


def load_rows(name: str, split: str, data: str | Path | None = None) -> list[Any]:
    """Return the labeled rows of a split, or of several: `"dev+test"`.

    They come from `data/<folder>/<split>.jsonl[.gz]` or, without `data`, from the Hugging Face Hub (package
    `datasets`), with the same checks. The `train` split of winogrande_s is `train_s`.

    Raises:
        DataError: the data set is unknown, a split is missing, or a row is invalid; the message names the place.
        ConfigError: the Hub is needed and `datasets` is not installed.
    """
    return rows_of(dataset(name, data), split, data)


def rows_of(spec: DatasetSpec, split: str, data: str | Path | None = None) -> list[Any]:
    """Like `load_rows`, for a data set whose description is known."""
    rows: list[Any] = []
    formats = formats_of(spec.row)
    for part in split.split("+"):
        if data is not None:
            rows += read_rows(_split_file(spec, part, Path(data)), formats=formats)
        elif spec.source is not None:
            rows += [parse_row(fields, where=place, formats=formats) for place, fields in hub.fetch(spec.source, part)]
    check_together(rows)
    for row in rows:
        spec.check(row)
    return rows


def _split_file(spec: DatasetSpec, split: str, data: Path) -> Path:
    folder = data / spec.folder
    if not NAME.fullmatch(split):
        raise DataError(f"{folder}: found split {shown(split)}, expected a name such as train, dev or dev+test")
    if not folder.is_dir():
        raise MissingSplitError(f"{folder}: no such folder, expected data set {spec.name} there")
    for stem in spec.splits.get(split, (split,)):
        found = [path for path in (folder / f"{stem}.jsonl", folder / f"{stem}.jsonl.gz") if path.is_file()]
        if len(found) == 2:
            raise DataError(f"{found[0]}: found both this and {found[1].name}, expected one of them; remove the other")
        if found:
            return found[0]
    stem = spec.splits.get(split, (split,))[-1]
    there = ", ".join(path.name for path in _files(folder)) or "no split"
    raise MissingSplitError(f"{folder / stem}.jsonl: no such file, nor {stem}.jsonl.gz; the folder has {there}")
