"""A task that the library does not know, regression, is defined here alone: it trains, predicts and is scored."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import bayestune as bt
from bayestune.errors import DataError
from bayestune.tasks import AnyPrediction, AnyRow, AnyScores, DatasetSpec, Task, read_rows
from bayestune.tasks.datasets import rows_of
from bayestune.tasks.rows import Fields
from models import BERT, blob
from toys import write_rows
from training.toys import arguments

NOISE = 0.5  # standard deviation of a label around its mean


@dataclass(frozen=True, kw_only=True)
class NumberRow(AnyRow):
    noun: ClassVar[str] = "number"
    marks: ClassVar[tuple[str, ...]] = ("value",)
    target_field: ClassVar[str] = "value"
    id: str
    ids: tuple[int, ...]
    value: float | None
    where: str = ""

    @classmethod
    def from_fields(cls, fields: Fields) -> "NumberRow":
        value = fields.label("value", float, expected="a number")
        return cls(id=fields.text("id"), ids=tuple(fields.values["ids"]), value=value, where=fields.where)

    @property
    def target(self) -> float | None:
        return self.value

    @property
    def texts(self) -> list[tuple[str, str]]:
        return [("ids", str(self.ids))]


@dataclass(frozen=True, kw_only=True)
class RegressionScores(AnyScores):
    headings: ClassVar[Mapping[str, str]] = {"rmse": "RMSE", "nll": "NLL"}
    rmse: float
    nll: float
    rows: int
    draws: int
    intervals: dict[str, tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class RegressionPrediction(AnyPrediction[RegressionScores]):
    means: Tensor  # [slices, rows]
    values: Tensor

    def row_nll(self) -> Tensor:
        densities = torch.distributions.Normal(self.means, NOISE).log_prob(self.values)
        return math.log(len(self.means)) - densities.logsumexp(0)

    def scores(self, **options: Any) -> RegressionScores:
        nll = self.row_nll().mean().item()
        rmse = (self.means.mean(0) - self.values).square().mean().sqrt().item()
        return RegressionScores(rmse=rmse, nll=nll, rows=len(self.ids), draws=self.draws, intervals={})

    def records(self, rows: Sequence[AnyRow]) -> list[dict[str, Any]]:
        return [{"id": row.id, "mean": mean} for row, mean in zip(rows, self.means.mean(0).tolist(), strict=True)]


class Regression(Task[RegressionPrediction]):
    name, columns = "numbers", 1

    def example(self, row: AnyRow) -> dict[str, Any]:
        assert isinstance(row, NumberRow)
        return {"ids": row.ids, "label": row.value}

    def tokens(self, example: dict[str, Any]) -> int:
        return len(example["ids"])

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        labels = torch.tensor([example["label"] for example in examples])
        return {"input_ids": torch.tensor([list(example["ids"]) for example in examples]), "labels": labels}

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        return model(input_ids=batch["input_ids"]).logits[:, :1].float()

    def row_loss(self, outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return -torch.distributions.Normal(outputs[:, 0], NOISE).log_prob(batch["labels"].to(outputs.dtype))

    def prediction(
        self, outputs: Tensor, rows: Sequence[AnyRow], *, draws: int, seed: int, temperature: float = 1.0
    ) -> RegressionPrediction:
        values = torch.tensor([row.target for row in rows], dtype=torch.float64)
        ids = tuple(row.id for row in rows)
        return RegressionPrediction(
            ids=ids, draws=draws, seed=seed, task=self.name, means=outputs[..., 0], values=values
        )


def test_a_regression_task_trains_predicts_and_is_scored(tmp_path: Path) -> None:
    made = [{"id": f"n{i}", "ids": [5 + i, 6, 7 + i], "value": 1.0 + i / 8} for i in range(8)]
    write_rows(tmp_path / "numbers.jsonl", made)
    rows = read_rows(tmp_path / "numbers.jsonl", formats=(NumberRow,))
    task, model = Regression(), blob(BERT)
    before = bt.evaluate(bt.predict(model, task, rows, draws=4))
    settings = arguments(tmp_path, max_steps=60, learning_rate=3e-2)
    trainer = bt.BayesTrainer(model, task=task, args=settings, train_rows=rows, eval_rows=rows)
    trainer.train()
    answer = bt.predict(model, task, rows, draws=4)
    scores = bt.evaluate(answer)
    assert scores.nll < before.nll
    assert scores.rmse < before.rmse
    assert (answer.means.var(0, correction=0) > 0).all()

    mean = bt.evaluate(bt.predict(model, task, rows, draws=0))  # one Gaussian: the NLL follows from the RMSE
    closed = mean.rmse**2 / (2 * NOISE**2) + math.log(NOISE * math.sqrt(2 * math.pi))
    assert abs(mean.nll - closed) <= 1e-9
    assert abs(trainer.evaluate()["eval_nll"] - closed) <= 1e-5


def test_its_rows_are_refused_as_all_rows_are(tmp_path: Path) -> None:
    write_rows(tmp_path / "numbers.jsonl", [{"id": "n0", "ids": [1], "value": "a"}])
    with pytest.raises(DataError, match=r"numbers.jsonl:1 \(id n0\): field 'value': found 'a', expected a number"):
        read_rows(tmp_path / "numbers.jsonl", formats=(NumberRow,))
    with pytest.raises(DataError, match="found none of 'question', 'text', 'chosen', 'prompt'"):
        read_rows(tmp_path / "numbers.jsonl")


def test_a_data_set_of_its_rows_is_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "numbers" / "train.jsonl", [{"id": "n0", "ids": [1], "value": 0.5}])
    spec = DatasetSpec(name="numbers", folder="numbers", row=NumberRow, classes=0)
    assert rows_of(spec, "train", tmp_path) == [NumberRow(id="n0", ids=(1,), value=0.5, where=mine(tmp_path))]


def mine(data: Path) -> str:
    return f"{data / 'numbers' / 'train.jsonl'}:1"
