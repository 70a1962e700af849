r"""Distillation: one plain LoRA adapter that answers like the average over a posterior's draws.

The student q minimizes, over training rows and unlabeled rows, the mean of

    KL( 1/K sum_k p(y | x, theta_k)  ||  q(y | x) ),

in nats, with draws theta_k of the teacher. The loss is linear in the teacher's probabilities up to a constant, so the
average over all draws, taken once, has the same expected gradient as fresh draws in every pass, and less noise.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from pydantic import Field
from torch import Tensor, nn

from bayestune.errors import ConfigError
from bayestune.functional import derive_seed
from bayestune.inference import Prediction, predict
from bayestune.methods.base import Fitting, Line, PointMethod, Updates
from bayestune.sampling import Posterior
from bayestune.settings import LARGEST_WHOLE
from bayestune.storage.state import adapter_tensors
from bayestune.tasks import AnyRow, Task


class Distillation(Task[Prediction]):
    """A task with classes that is trained on a teacher's answers: the loss is ``KL(teacher || model)`` of each row.

    Args:
        task: the task that the teacher answered.
        rows: the rows to train on; their labels are not used.
        probs: the teacher's probabilities.
        temperature: T of the model's answers, ``softmax(outputs / T)``.
    """

    def __init__(
        self,
        task: Task[Prediction],
        rows: Sequence[AnyRow],
        probs: Float[Tensor, "rows classes"],
        *,
        temperature: float = 1.0,
    ) -> None:
        self.name, self.columns, self.labels, self.worked = task.name, task.columns, task.labels, task.worked
        self._task, self._temperature = task, temperature
        self._probs = {id(row): (row, values) for row, values in zip(rows, probs.tolist(), strict=True)}

    def target(self, row: AnyRow) -> list[float]:
        return self._probs[id(row)][1]

    def example(self, row: AnyRow) -> dict[str, Any]:
        return {**self._task.example(row), "teacher": self.target(row)}

    def examples(self, rows: Sequence[AnyRow], model: nn.Module) -> list[dict[str, Any]]:
        examples = self._task.examples(rows, model)
        return [{**example, "teacher": self.target(row)} for row, example in zip(rows, examples, strict=True)]

    def identity(self, example: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in example.items() if key != "teacher"}  # whose last bits may differ

    def collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        teacher = torch.tensor([example["teacher"] for example in examples], dtype=torch.float64)
        return {**self._task.collate(examples), "teacher": teacher.float()}

    def tokens(self, example: dict[str, Any]) -> int:
        return self._task.tokens(example)

    def outputs(self, model: Any, batch: dict[str, Tensor]) -> Float[Tensor, "rows columns"]:
        return self._task.outputs(model, batch)

    def row_loss(self, outputs: Float[Tensor, "rows columns"], batch: dict[str, Tensor]) -> Float[Tensor, " rows"]:
        teacher = batch["teacher"]
        log_probs = (outputs / self._temperature).log_softmax(-1)
        log_probs = log_probs.masked_fill(teacher == 0, 0.0)  # -inf for choices that a row lacks
        return -(teacher * log_probs).sum(-1) - torch.special.entr(teacher).sum(-1)

    def prediction(
        self,
        outputs: Float[Tensor, "slices rows columns"],
        rows: Sequence[AnyRow],
        *,
        draws: int,
        seed: int,
        temperature: float = 1.0,
    ) -> Prediction:
        return self._task.prediction(outputs, rows, draws=draws, seed=seed, temperature=temperature)


class Distilled(PointMethod):
    """Plain LoRA trained to answer in one forward pass like the average over the draws of another run.

    The student starts at the teacher's mean (its mode, or its first member) and learns the tempered answers. It keeps
    the teacher's temperature, if there is one, unless the run fits its own (`temperature_split`). The `nll` that
    training shows is the KL divergence from the teacher's answers.
    """

    name = "distilled"
    label = "Distilled"
    summary = "one plain LoRA adapter trained on the averaged answers of another run"
    paper = "Hinton et al. 2015, arXiv 1503.02531; of posteriors Balan et al. 2015, arXiv 1506.04416"
    one_training = False
    files = ("distil_rows",)

    teacher: str | None = Field(None, min_length=1, description="Run whose averaged answers distilled learns.")
    teacher_draws: int = Field(50, ge=1, le=LARGEST_WHOLE, description="Draws of the teacher that are averaged.")
    distil_rows: str | None = Field(
        None, min_length=1, description="File of further rows that the teacher answers; labels are not needed."
    )

    @property
    def source_run(self) -> str | None:
        return self.teacher

    @classmethod
    def lines(cls) -> dict[str, Line]:
        return {cls.name: Line(label=cls.label, settings={}, by_default=False)}

    def check_task(self, task: Task) -> None:
        if not task.has_classes:
            raise ConfigError(
                f"distilled: found task {task.name} without classes, expected classes, whose probabilities it learns."
            )

    def check(self, model: PeftModel, updates: Updates) -> None:
        if self.teacher is None:
            raise ConfigError("teacher: found none, expected the folder of a run, as `bayestune distil` gives it.")

    def fit(self, model: PeftModel, run: Fitting) -> Posterior:
        assert self.teacher is not None, "check has refused it"
        rows = [*run.rows, *run.more_rows.get("distil_rows", ())]
        teacher = run.load(model, Path(self.teacher))
        sampled = teacher.has_mean and teacher.default_draws > 0  # not members, and not a point
        draws = self.teacher_draws if sampled else teacher.default_draws
        with run.precision():
            seed = derive_seed("teacher", run.seed)
            answers = predict(teacher, run.task, rows, draws=draws, seed=seed, progress=run.progress)
        mean = {key: tensor.detach().clone() for key, tensor in adapter_tensors(teacher.model, "default").items()}
        student = run.renew(teacher.model, run.seed)
        _start_at(student, mean)
        task = Distillation(run.task, rows, answers.probs, temperature=teacher.temperature)
        run.train(student, label=self.name, task=task, rows=rows)
        run.found["teacher_draws"] = draws
        return self.posterior(student.eval(), temperature=1.0 if run.tempered else teacher.temperature)


@torch.no_grad()
def _start_at(student: PeftModel, mean: dict[str, Tensor]) -> None:
    """Copy the teacher's weights to a new adapter.

    Raises:
        ConfigError: their sizes differ.
    """
    for key, tensor in adapter_tensors(student, "default").items():
        if key not in mean or mean[key].shape != tensor.shape:
            raise ConfigError(
                f"teacher: found an adapter with different layers or another rank ({key}), expected those of this "
                "run: set rank and target_modules as in the teacher's run."
            )
        tensor.copy_(mean[key])
