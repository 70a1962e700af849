"""The rows of a run: to train on, to fit settings of the method or a temperature on, and to score."""

import random
from dataclasses import dataclass

from bayestune.experiment.overlap import count_repeated
from bayestune.experiment.settings import Experiment
from bayestune.functional import derive_seed
from bayestune.methods.base import FIT_SPLIT
from bayestune.tasks import AnyRow, Task, TokenizedTask, read_rows
from bayestune.tasks.data import formats_of


def own_splits(experiment: Experiment) -> dict[str, str]:
    """Return the splits that the method's own settings name, by setting."""
    settings = dict(experiment.method)
    return {name: settings[name] for name in experiment.method.splits if settings[name] is not None}


def own_files(experiment: Experiment) -> dict[str, str]:
    """Return the files of further rows that the method's own settings name, by setting."""
    settings = dict(experiment.method)
    return {name: settings[name] for name in experiment.method.files if settings[name] is not None}


@dataclass(frozen=True, kw_only=True)
class RunRows:
    """The rows of a run, checked.

    Attributes:
        train: rows to train on.
        evaluation: rows to score.
        more: rows of the splits and files that the method's own settings name, by setting; also those held out from
            `train`.
        temperature: rows to fit a temperature on; empty if no split is named.
        worked: rows that the prompt shows with their answers; none of them is trained on.
    """

    train: list[AnyRow]
    evaluation: list[AnyRow]
    more: dict[str, list[AnyRow]]
    temperature: list[AnyRow]
    worked: tuple[AnyRow, ...] = ()

    @classmethod
    def of(cls, experiment: Experiment, task: TokenizedTask) -> "RunRows":
        """Read and check the rows.

        Raises:
            DataError: a split or file is missing, or a row cannot be used.
        """
        train = _checked(task, experiment.train_split)
        more = {name: _checked(task, split) for name, split in own_splits(experiment).items()}
        for name, path in own_files(experiment).items():
            more[name] = read_rows(path, labelled=False, formats=formats_of(task.row))
            task.check(more[name])
        count = experiment.method.held_out(len(train))
        if count:
            train, more[FIT_SPLIT] = _cut(train, count, experiment.seed)
        return cls(
            train=train,
            evaluation=_checked(task, experiment.eval_split if experiment.eval else None, experiment.eval_rows),
            more=more,
            temperature=_checked(task, experiment.temperature_split),
            worked=task.worked,
        )

    def by_use(self) -> dict[str, list[AnyRow]]:
        """Return the rows by their setting without "_split" or "_rows", such as "train", "eval" and "temperature"."""
        used = {"train": self.train, "eval": self.evaluation, **self.more, HELD_OUT: self.temperature}
        return {name.removesuffix("_split").removesuffix("_rows"): rows for name, rows in used.items()}

    def repeated(self, experiment: Experiment) -> dict[str, dict[str, int]]:
        """Count the scored rows that are also in each split that the run learns from, and warn if there are any."""
        assert experiment.eval_split is not None
        cut = [] if FIT_SPLIT in own_splits(experiment) else self.more.get(FIT_SPLIT, [])
        used = {experiment.train_split: [*self.train, *cut, *self.worked]}
        if experiment.temperature_split is not None:  # it may be the train split
            used.setdefault(experiment.temperature_split, self.temperature)
        named = own_splits(experiment) | own_files(experiment)
        used |= {split: self.more[name] for name, split in named.items()}
        return count_repeated(self.evaluation, experiment.eval_split, used)


HELD_OUT = "temperature_split"


def _cut(rows: list[AnyRow], count: int, seed: int) -> tuple[list[AnyRow], list[AnyRow]]:
    """Take out `count` rows chosen by `seed`; return the remaining rows and the chosen ones, both in order."""
    chosen = set(random.Random(derive_seed("held out", seed)).sample(range(len(rows)), count))
    kept = [row for i, row in enumerate(rows) if i not in chosen]
    return kept, [row for i, row in enumerate(rows) if i in chosen]


def _checked(task: Task, split: str | None, count: int | None = None) -> list[AnyRow]:
    rows = [] if split is None else task.rows(split)[:count]
    task.check(rows)
    return rows
