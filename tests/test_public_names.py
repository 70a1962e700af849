"""What `import bayestune` offers, and what it costs."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import bayestune

NAMES = [
    "BayesLoraConfig",
    "BayesTrainer",
    "BlobConfig",
    "Experiment",
    "Generation",
    "KLCallback",
    "KLSettings",
    "Prediction",
    "Scores",
    "answer_scores",
    "best_of_n",
    "diagnostics",
    "draw",
    "evaluate",
    "export_lora",
    "generate",
    "load_posterior",
    "methods",
    "metrics",
    "novelty",
    "predict",
    "rewards",
    "save_posterior",
    "score",
    "serving",
    "tasks",
]


def test_the_public_names_are_these() -> None:
    tree = ast.parse(Path(bayestune.__file__).read_text(encoding="utf-8"))
    exported = [alias.asname for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(name for name in exported if name is not None) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_each_public_name_is_there_and_documented(name: str) -> None:
    thing = getattr(bayestune, name)
    assert (thing.__doc__ or "").strip(), f"bayestune.{name} has no docstring"
    assert name in dir(bayestune)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        bayestune.no_such_name  # noqa: B018


def test_the_package_is_typed_and_versioned() -> None:
    assert (Path(bayestune.__file__).parent / "py.typed").is_file()
    assert importlib.metadata.version("bayestune") == "0.1.0"


def test_importing_bayestune_teaches_peft_the_type() -> None:
    code = "import bayestune; from peft import PeftConfig, PeftType; print(PeftType('BAYES_LORA').value)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "BAYES_LORA"


def test_import_reads_no_optional_package() -> None:
    code = "import sys, bayestune; print([m for m in ('matplotlib', 'typer', 'datasets', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
