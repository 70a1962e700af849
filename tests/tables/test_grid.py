"""Tables run: the missing cells and no others, again after a stop, and never over another configuration."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from bayestune.errors import ConfigError, DataError
from bayestune.experiment import Run
from bayestune.experiment.train import Training
from bayestune.tables.cells import read_cells
from bayestune.tables.fill import run_table
from bayestune.tables.grid import Grid, plan
from bayestune_cli.app import invoke
from tables.grids import OTHERS, four, make, make_like, make_world, with_settings
from toys import write_rows

pytestmark = pytest.mark.filterwarnings("ignore::bayestune.errors.BayestuneWarning")  # so small a model knows little


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("grid"))


@pytest.fixture
def grid(world: Path, tmp_path: Path) -> Grid:
    return make(world, tmp_path)


@pytest.fixture(scope="module")
def ran(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Grid:
    """One run of MLE with its five cells; shared, so tests must leave both as they are."""
    grid = make(world, tmp_path_factory.mktemp("ran"), methods=("mle",), seeds=(1,))
    assert run_table(grid) == 5
    return grid


def test_a_grid_makes_every_cell_once(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(grid)
    assert len(found.runs) == 10 and found.seconds is None
    assert run_table(grid) == found.cells == 2 * 5 * (1 + 3 + 1 + 3 + 1)
    cells = read_cells(grid.results / "table2")
    assert len(cells) == found.cells
    lines = {(cell["method"], cell["draws"]) for cell in cells}
    drawn = {(method, draws) for method in ("blob", "laplace") for draws in (0, 2, 3)}
    assert lines == drawn | {("mle", 0), ("ensemble", 2), ("temperature", 0)}
    assert {cell["eval_task"] for cell in cells} == {"openbookqa", *OTHERS}
    assert all(cell["experiment"]["eval_split"] == "test" and cell["steps"] == 2 for cell in cells)
    monkeypatch.setattr(Training, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert plan(grid).runs == () and run_table(grid) == 0


def test_post_hoc_methods_start_from_the_mle_of_their_seed(grid: Grid) -> None:
    trained: list[str] = []
    train = Training.train

    def counting(self: Training, *args: Any, label: str, **rest: Any) -> None:
        trained.append(label)
        train(self, *args, label=label, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "train", counting)
        run_table(make_like(grid, seeds=(1,), methods=("temperature", "laplace", "mle")))
    assert trained == ["mle"]
    adapter = json.loads((grid.runs / "openbookqa" / "laplace-seed1" / "experiment.json").read_text())["adapter"]
    assert adapter == (grid.runs / "openbookqa" / "mle-seed1").as_posix()


def test_a_killed_call_goes_on_with_the_missing_cells(grid: Grid) -> None:
    grid = make_like(grid, methods=("mle", "blob"), seeds=(1,))
    train = Training.train

    def dying(self: Training, *args: Any, label: str, **rest: Any) -> None:
        if label == "blob":
            raise KeyboardInterrupt
        train(self, *args, label=label, **rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "train", dying)
        with pytest.raises(KeyboardInterrupt):
            run_table(grid)
    before = {path: path.read_bytes() for path in grid.results.rglob("*.json")}
    assert len(before) == 5 and len(plan(grid).runs) == 1 and plan(grid).seconds is not None
    assert run_table(grid) == 15
    assert all(path.read_bytes() == content for path, content in before.items())


def test_another_configuration_is_refused_and_nothing_is_overwritten(ran: Grid, world: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in ran.results.rglob("*.json")}
    nowhere = str(tmp_path / "nowhere")
    for changed, message in (
        ({"learning_rate": 0.3}, "the cells in results have learning_rate="),
        ({"target_modules": ["key"]}, "the cells in results have target_modules="),
        ({"data": nowhere}, f"--data {nowhere}: no such folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            run_table(make_like(with_settings(ran, **changed), seeds=(1, 2)))
    elsewhere = make_like(ran, results=tmp_path / "others")
    with pytest.raises(ConfigError, match="mle-seed1: found a run with steps=2, expected 3"):
        run_table(with_settings(elsewhere, steps=3))
    shutil.copytree(world / "data", tmp_path / "data")
    write_rows(tmp_path / "data" / "openbookqa" / "train.jsonl", four(60, 12))
    with pytest.raises(ConfigError, match="trained on other rows"):
        run_table(with_settings(elsewhere, data=str(tmp_path / "data")))
    assert before == {path: path.read_bytes() for path in ran.results.rglob("*.json")}
    assert not elsewhere.results.exists()


def test_settings_without_effect_are_the_same_configuration(ran: Grid) -> None:
    """The layers that are the default, and the KL of a method that has none."""
    for changed in ({"target_modules": ["query", "value"]}, {"kl_learning_rate": 0.5, "kl_schedule": "elbo"}):
        assert plan(with_settings(ran, **changed)).runs == ()
    assert [planned.experiment.seed for planned in plan(make_like(ran, seeds=(1, 2))).runs] == [2]


def test_lost_cells_are_made_again_without_training(
    ran: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(ran.results, tmp_path / "results")
    grid = make_like(ran, results=tmp_path / "results")
    lost = grid.results / "table2" / "openbookqa" / "arc_easy" / "mle_n0_seed1.json"
    before = lost.read_bytes()
    lost.unlink()
    assert plan(grid).cells == 1
    monkeypatch.setattr(Training, "train", lambda *args, **kwargs: pytest.fail("trained again"))
    assert run_table(grid) == 1
    assert lost.read_bytes() == before


def test_without_a_test_split_a_table_leaves_out_the_temperature(world: Path, tmp_path: Path) -> None:
    write_rows(world / "data" / "rte" / "train.jsonl", [{"id": "a", "text": "x", "text_pair": "y", "label": 0}] * 1)
    write_rows(world / "data" / "rte" / "dev.jsonl", [{"id": "b", "text": "u", "text_pair": "v", "label": 1}])
    grid = make(world, tmp_path, table="roberta", tasks=("rte",), methods=("mle", "temperature"), seeds=(1,))
    found = plan(grid)
    assert [planned.experiment.eval_split for planned in found.runs] == ["dev"]
    assert found.left_out == ("temperature on rte: no rows other than those it is scored on",)


def test_a_method_alone_trains_the_adapter_that_it_starts_from(grid: Grid) -> None:
    grid = make_like(grid, methods=("temperature",), seeds=(1,))
    assert run_table(grid) == 5
    assert (grid.runs / "openbookqa" / "mle-seed1" / "result.json").is_file()
    other = make_like(grid, settings={**grid.settings, "steps": 3}, results=grid.results.with_name("other"))
    with pytest.raises(ConfigError, match="mle-seed1: found a run with steps=2"):
        run_table(make_like(other, methods=("laplace",)))


def test_data_sets_that_are_not_there_are_left_out_by_name(world: Path, tmp_path: Path) -> None:
    found = plan(make(world, tmp_path, table="table1", methods=("mle",), seeds=(1,)))
    assert [planned.experiment.task for planned in found.runs] == ["openbookqa"]
    assert len(found.left_out) == 5 and all("boolq" in line for line in found.left_out if line.startswith("boolq"))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["table3"], "table: found 'table3'"),
        (["table2", "--seeds", "1,x"], "--seeds: found '1,x'"),
        (["table2", "--methods", "mle,magic"], "--methods: found 'magic'"),
        (["table2", "--tasks", "arc_easy"], "--tasks: found 'arc_easy'"),
        (["table2", "--gpus-per-cell", "1"], "found --gpus-per-cell without --ray"),
    ],
)
def test_wrong_arguments_are_named(
    world: Path, tmp_path: Path, arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    model = ["--model", str(world / "bert"), "--data", str(world / "data")]
    assert invoke(["table", *arguments, *places, *model]) == 2
    error = capsys.readouterr().err
    assert named in error and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_dry_run_says_how_much_and_does_nothing(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    model = ["--model", str(world / "bert"), "--data", str(world / "data")]
    chosen = ["--methods", "mle,blob", "--seeds", "1,2,3"]
    assert invoke(["table", "table2", "--dry-run", *chosen, *places, *model]) == 0
    assert "table2: 6 runs missing, for 60 cells, an unknown time" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [{"method": "mle"}, {"steps": "few"}])
def test_settings_that_no_table_has_are_named(world: Path, tmp_path: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        plan(make(world, tmp_path, settings=setting))


def test_a_split_that_cannot_be_read_is_an_error_and_not_a_missing_one(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    with (tmp_path / "data" / "openbookqa" / "test.jsonl").open("a") as file:
        file.write("{\n")
    with pytest.raises(DataError, match=r"test\.jsonl:13"):
        plan(make(world, tmp_path, settings={"data": str(tmp_path / "data")}))


def test_a_run_that_another_process_makes_is_not_made_twice(grid: Grid) -> None:
    """`bayestune train` with the same --output."""
    grid = make_like(grid, methods=("mle",), seeds=(1,))
    output = grid.runs / "openbookqa" / "mle-seed1"
    output.parent.mkdir(parents=True)
    words = "mle-seed1: another process is saving to it: wait for that one"
    with FileLock(output.with_name(".mle-seed1.lock")), pytest.raises(ConfigError, match=words):
        run_table(grid)
    assert run_table(grid) == 5


def test_layers_in_any_order_are_one_configuration(grid: Grid) -> None:
    """Post-hoc methods record the layers of the adapter they start from, which PEFT keeps as a set."""
    settings = {**grid.settings, "target_modules": ["value", "query"]}
    grid = make_like(grid, methods=("mle", "swag", "tfb"), seeds=(1,), settings=settings | {"tolerance": 0.5})
    assert run_table(grid) == 5 * (1 + 3 + 3)
    assert plan(grid).runs == ()
    assert len(read_cells(grid.results / "table2")) == 35


def test_other_data_without_a_folder_is_left_out_and_does_not_stop_the_rest(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "arc_easy")
    settings = {"data": str(tmp_path / "data")}
    grid = make(world, tmp_path, methods=("mle",), seeds=(1,), settings=settings)
    assert [line.partition(":")[0] for line in plan(grid).left_out] == ["arc_easy"]
    assert run_table(grid) == 4 and plan(grid).runs == ()


def test_other_data_that_cannot_be_used_is_found_before_anything_is_trained(world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "data", tmp_path / "data")
    row = {**four(0, 1)[0], "id": "long", "question": "long " * 400}
    with (tmp_path / "data" / "mmlu_college_physics" / "test.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"long.*expected at most 200"):
        run_table(make(world, tmp_path, settings={"data": str(tmp_path / "data")}))
    assert not (tmp_path / "runs").exists()


def test_rows_are_answered_once_and_the_cells_are_those_of_the_loaded_run(
    grid: Grid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the run has just answered is not asked again; cells made from the finished run later are the same."""
    grid = make_like(grid, methods=("blob",), seeds=(1,))
    asked: list[tuple[str, int]] = []
    predict = Run.predict

    def counting(self: Run, rows: Any, *, draws: int, task: Any = None, **rest: Any) -> Any:
        asked.append(((task or self.task).name, draws))
        return predict(self, rows, draws=draws, task=task, **rest)

    monkeypatch.setattr(Run, "predict", counting)
    run_table(grid)
    assert sorted(asked) == sorted((name, draws) for name in ("openbookqa", *OTHERS) for draws in (0, 3))
    again = make_like(grid, results=tmp_path / "again")
    run_table(again)
    one, other = (read_cells(folder.results / "table2") for folder in (grid, again))
    assert one == other


def test_all_methods_of_a_table_train_on_the_same_rows(grid: Grid) -> None:
    """Unless rows of another split choose the scale, there is none."""
    blob = make_like(grid, methods=("blob",), seeds=(1,))
    assert [dict(planned.experiment.method)["posterior_scale"] for planned in plan(blob).runs] == [1.0]
    for changes, scale in (({"fit_split": "dev"}, None), ({"posterior_scale": 2.0}, 2.0)):
        [planned] = plan(with_settings(blob, **changes)).runs
        assert dict(planned.experiment.method)["posterior_scale"] == scale


def test_a_line_with_settings_is_a_run_of_its_own(grid: Grid) -> None:
    """Beside "blob" with the settings of the table, scored apart, and found again."""
    settings = {**grid.settings, "rho_init": 0.1, "kl_learning_rate": 0.003}
    both = make_like(grid, settings=settings, methods=("blob", "blob_wide"), seeds=(1,))
    assert run_table(both) == plan(make_like(both, results=grid.results / "none")).cells == 2 * 5 * 3
    cells = read_cells(grid.results / "table2")
    fixed = {(c["method"], c["experiment"]["kl_learning_rate"], c["experiment"]["posterior_std"]) for c in cells}
    assert fixed == {("blob", 0.003, None), ("blob_wide", None, 0.06)}
    assert {cell["experiment"]["method"] for cell in cells} == {"blob"}
    assert plan(both).runs == ()
    with pytest.raises(ConfigError, match="kl_learning_rate=0.003, expected 0.004"):
        plan(make_like(both, settings={**settings, "kl_learning_rate": 0.004}))
