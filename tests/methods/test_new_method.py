"""A method defined here alone trains, saves, loads in another process, predicts, and fills a line of a table.

No file of the library knows it: the class below is all that there is of it.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import PeftModel
from pydantic import Field
from torch import Tensor

from bayestune.errors import ConfigError
from bayestune.experiment import Experiment, load_run, run
from bayestune.methods import METHODS, Fitting, Method, Posterior, Sampler
from bayestune.report.markdown import markdown
from bayestune.sampling.base import SubstitutedDraws
from bayestune.storage.state import active_adapter, adapter_tensors, parameter_names
from bayestune.tables import layouts
from bayestune.tables.cells import read_cells
from bayestune.tables.fill import run_table
from bayestune.tables.grid import Grid
from bayestune.tables.layouts import Column, Layout, line_label
from bayestune.tables.table import table_view
from toys import pretrained_bert, write_data


class Pair(Posterior):
    """The adapter, and itself with B scaled: draw k has ``B (1 + k gap)``."""

    kind = "pair"
    default_draws = 2

    def __init__(self, model: PeftModel, gap: float = 0.0) -> None:
        super().__init__(model)
        self.gap = gap

    def sampler(self, *, draws: int, seed: int) -> Sampler:
        model, adapter, _ = active_adapter(self.model)
        tensors, names = adapter_tensors(model, adapter), parameter_names(model, adapter)
        matrices = {names[key]: tensor for key, tensor in tensors.items() if "lora_B" in key}
        scaled = [{name: tensor * (1 + k * self.gap) for name, tensor in matrices.items()} for k in (0, 1)]
        return SubstitutedDraws(self.model, scaled[: max(1, draws)])

    def tensors(self) -> dict[str, Tensor]:
        return {"gap": torch.tensor([self.gap])}

    @classmethod
    def from_saved(cls, model: PeftModel, settings: Any, tensors: Any, members: Any) -> "Pair":
        return cls(model, float(tensors["gap"]))


class TwoScales(Method):
    """Plain LoRA at two scales of B."""

    name: ClassVar[str] = "two_scales"
    label: ClassVar[str] = "Two scales"
    summary: ClassVar[str] = "plain LoRA at two scales of B"
    paper: ClassVar[str] = "none"
    posterior: ClassVar[type[Posterior]] = Pair

    gap: float = Field(0.5, gt=0, description="Relative difference of the two scales.")

    def draw_counts(self, draws: int) -> tuple[int, ...]:
        return (2,)

    def fit(self, model: PeftModel, run: Fitting) -> Pair:
        run.train(model, label=self.name)
        return Pair(model.eval(), self.gap)


def settings(world: Path) -> dict[str, Any]:
    return {
        "model": str(world / "bert"),
        "data": str(world / "data"),
        "steps": 3,
        "batch_size": 4,
        "learning_rate": 0.05,
        "max_tokens": 200,
    }


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    write_data(folder / "data")
    return folder


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, TwoScales.name, TwoScales)


def test_a_new_method_needs_no_other_file(world: Path, tmp_path: Path) -> None:
    experiment = Experiment.from_dict(
        {**settings(world), "task": "colours", "method": "two_scales", "gap": 1.5}, where="test"
    )
    trained = run(experiment, tmp_path / "run")
    assert list(trained.scores) == ["two_scales"]
    record = json.loads((tmp_path / "run" / "experiment.json").read_text())
    assert (record["method"], record["gap"]) == ("two_scales", 1.5) and "prior_std" not in record
    with pytest.raises(ConfigError, match="gap: found -1, expected a number above 0"):
        Experiment.from_dict({**settings(world), "task": "colours", "method": "two_scales", "gap": -1}, where="test")

    here = trained.predictions["two_scales"]
    assert not torch.equal(*here.draw_log_probs)
    code = (
        "import json, sys; sys.path[:0] = sys.argv[1:2]; from pathlib import Path\n"
        "import torch; torch.set_num_threads(1)\n"
        "from methods.test_new_method import TwoScales\nimport bayestune.methods as m; m.register(TwoScales)\n"
        "from bayestune.experiment import load_run\n"
        "found = load_run(Path(sys.argv[2])); rows = found.task.rows(found.experiment.eval_split)\n"
        "print('RESULT', json.dumps(found.predict(rows, draws=2).draw_log_probs.tolist()))\n"
    )
    tests = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, tests, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=True,
    )
    line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))
    there = torch.tensor(json.loads(line.removeprefix("RESULT ")), dtype=torch.float64)
    assert torch.equal(there, here.draw_log_probs)


def test_a_new_method_fills_a_line_of_a_table(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Layout(title="Toy", columns=(Column(label="toy", task="colours", eval_task="colours"),))
    monkeypatch.setattr(layouts, "TABLES", {"toy": toy})
    grid = Grid(
        table="toy",
        seeds=[1],
        methods=["mle", "two_scales"],
        tasks=None,
        settings=settings(world),
        results=tmp_path / "results",
        runs=tmp_path / "runs",
        command=["test"],
    )
    assert run_table(grid) == 2
    text = markdown(table_view(read_cells(tmp_path / "results"), "toy"))
    assert line_label("two_scales", 2) == "Two scales, N = 2" and "| Two scales, N = 2 |" in text
    assert load_run(tmp_path / "runs" / "colours" / "two_scales-seed1").experiment.method == TwoScales()
