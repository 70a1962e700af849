"""Packages of other versions than bayestune asks for are refused on import, before any of them is loaded."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import bayestune
from bayestune.errors import BayestuneError, VersionError
from bayestune.requirements import check_versions

ROOT = Path(__file__).parent.parent
FLOORS = {"torch": "2.10", "transformers": "5.23", "peft": "0.21", "safetensors": "0.8"}
IMPORT = """
import importlib.metadata, sys
real = importlib.metadata.version
importlib.metadata.version = lambda name: {found!r} if name == {name!r} else real(name)
try:
    import bayestune
except ImportError as error:
    print(type(error).__name__, error)
print(sorted({{"torch", "transformers", "peft", "safetensors"}} & sys.modules.keys()))
"""


def installed(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str | None]) -> None:
    """As if these versions were installed; None for a package without metadata."""
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = versions[name] if name in versions else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


def declared() -> list[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [Requirement(text) for text in project["dependencies"]]


@pytest.mark.property("X02")
def test_the_floors_are_declared_and_the_metadata_read_is_that_of_the_project() -> None:
    floors = {requirement.name: str(requirement.specifier) for requirement in declared()}
    assert all(f">={floor}" in floors[name].split(",") for name, floor in FLOORS.items())
    found = {r.name: str(r.specifier) for r in map(Requirement, importlib.metadata.requires("bayestune") or [])}
    assert {name: found[name] for name in FLOORS} == {name: floors[name] for name in FLOORS}


@pytest.mark.property("X02")
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("torch", "2.9.1+cu128"),
        ("torch", "2.10.0a0"),
        ("transformers", "5.22.9"),
        ("transformers", "4.57.0"),
        ("transformers", "5.24.0"),
        ("peft", "0.20.5"),
        ("peft", "0.23.0"),
        ("safetensors", "0.7.0"),
    ],
)
def test_a_version_out_of_range_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, found: str) -> None:
    installed(monkeypatch, {name: found})
    with pytest.raises(VersionError, match=rf"^{name}: found version {re.escape(found)}, expected [^;]*>=") as caught:
        check_versions()
    assert f">={FLOORS[name]}" in str(caught.value) and "pip install" in str(caught.value)
    assert isinstance(caught.value, ImportError) and isinstance(caught.value, BayestuneError)


@pytest.mark.property("X02")
@pytest.mark.parametrize(
    "versions",
    [
        FLOORS,
        {"torch": "2.10.0+cpu", "peft": "0.22.9"},
        {"torch": "3.0.dev20270101", "transformers": "5.23.9"},
        dict.fromkeys(FLOORS),
    ],
    ids=["floors", "local", "newer", "no metadata"],
)
def test_versions_in_range_are_taken(monkeypatch: pytest.MonkeyPatch, versions: Any) -> None:
    installed(monkeypatch, versions)
    check_versions()


@pytest.mark.property("X02")
def test_a_source_tree_that_is_not_installed_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    installed(monkeypatch, {"torch": "1.0"})
    monkeypatch.setattr(importlib.metadata, "requires", requires)
    check_versions()


@pytest.mark.property("X02")
def test_an_import_says_so_before_anything_is_loaded() -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(bayestune.__file__).parent.parent)}
    code = IMPORT.format(name="peft", found="0.20.0")
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    told, loaded = done.stdout.splitlines()
    assert told.startswith("VersionError peft: found version 0.20.0, expected ") and loaded == "[]"
