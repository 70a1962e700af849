"""A table on a local Ray: a worker that is killed is replaced, and the cells are those of a serial table."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import bayestune
from bayestune.errors import ConfigError
from bayestune.tables.cells import read_cells
from bayestune.tables.fill import run_table
from bayestune.tables.grid import Grid
from bayestune_cli.app import invoke
from tables.grids import make, make_like, make_world, with_settings

pytestmark = pytest.mark.filterwarnings("ignore::bayestune.errors.BayestuneWarning")  # so small a model knows little

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs ray: pip install '.[cluster]'")

WATCHED = """
import os, signal
from watching import watch

def die(path):
    if path.endswith("mle-seed1/checkpoints/checkpoint-2") and not os.path.exists(os.environ["DIED"]):
        open(os.environ["DIED"], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

watch(os.open(os.environ["RENAMES"], os.O_WRONLY | os.O_APPEND | os.O_CREAT), before=die)
"""
"""sitecustomize.py of Ray's workers: the first that is about to make a certain checkpoint is killed."""


def small(world: Path, place: Path) -> Grid:
    settings = {"steps": 3, "checkpoint_steps": 1, "recipe": "paper"}
    return make(world, place, methods=("mle", "blob", "temperature"), seeds=(1,), settings=settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("cluster"), others=("arc_easy",))


def cells(results: Path) -> list[dict[str, Any]]:
    """The cells, without the time that they took and the command."""
    return [{**cell, "seconds": None, "command": None} for cell in read_cells(results / "table2")]


def table(grid: Grid, place: Path) -> None:
    """`bayestune table --ray local`, whose workers are watched; relative paths are those of `place`."""
    (place / "site").mkdir()
    (place / "site" / "sitecustomize.py").write_text(WATCHED)
    paths = [place / "site", Path(bayestune.__file__).parents[1], Path(__file__).parents[1]]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*map(str, paths), os.environ.get("PYTHONPATH", "")]),
        "DIED": str(place / "died"),
        "RENAMES": str(place / "renames"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_worker_niceness": "0",
    }
    config = place / "settings.yaml"
    config.write_text("".join(f"{name}: {value}\n" for name, value in grid.settings.items()))
    command = [sys.executable, "-m", "bayestune", "table", "table2", "--ray", "local", "--config", str(config)]
    command += [
        "--seeds",
        "1",
        "--methods",
        "mle,blob,temperature",
        "--results",
        "results",
        "--runs",
        str(place / "runs"),
    ]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_ray
def test_a_worker_killed_in_the_middle_of_a_run_loses_nothing(world: Path, tmp_path: Path) -> None:
    serial = small(world, tmp_path / "serial")
    run_table(serial)
    table(serial, tmp_path)
    assert (tmp_path / "died").exists()
    renames = [Path(line) for line in (tmp_path / "renames").read_text().splitlines()]
    made = [path for path in renames if path.suffix == ".json" and "table2" in path.parts]
    assert len(made) == len(set(made)) == 2 * (1 + 3 + 1)
    for run in ("mle-seed1", "blob-seed1"):
        checkpoints = [path.name for path in renames if path.parts[-3:-1] == (run, "checkpoints")]
        assert checkpoints == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert cells(tmp_path / "results") == cells(serial.results)


@needs_ray
def test_a_run_that_fails_does_not_stop_the_others(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bayestune.tables.cluster import run_on_ray

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    grid = small(world, tmp_path)
    run_table(make_like(with_settings(grid, steps=1), methods=("mle",), results=tmp_path / "others"))
    with pytest.raises(ConfigError, match="mle-seed1: found a run with steps=1, expected 3"):
        run_on_ray(grid, address="local")
    assert {cell["method"] for cell in cells(grid.results)} == {"blob"}


def test_without_ray_the_package_to_install_is_named(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "bayestune.tables.cluster", raising=False)
    places = ["--results", str(tmp_path / "results"), "--runs", str(tmp_path / "runs")]
    model = ["--model", str(world / "bert"), "--data", str(world / "data")]
    assert invoke(["table", "table2", "--ray", "local", *places, *model]) == 2
    assert capsys.readouterr().err == (
        "error: --ray: found no package ray, expected it installed; run: pip install '.[cluster]'\n"
    )
    assert not any(tmp_path.iterdir())
