"""The wheel: the same bytes from the same source, and no binary but the packed rows of the built-in data."""

import gzip
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import bayestune

ROOT = Path(__file__).parent.parent
SOURCE = Path(bayestune.__file__).parent.parent
SOURCES = ("pyproject.toml", "README.md", "LICENSE")
PACKED = {f"bayestune/data/everyday/{split}.jsonl.gz" for split in ("train", "test", "ood")}
BUILD = "import sys, uv_build; print(uv_build.build_wheel(sys.argv[1]))"


def files() -> dict[str, bytes]:
    """The files of the package, by their path in it."""
    paths = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(SOURCE).as_posix(): path.read_bytes() for path in paths}


def build(folder: Path) -> Path:
    """A wheel of a copy of the source in `folder`, built there without a network."""
    project = folder / "project"
    for name in SOURCES:
        project.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, project / name)
    shutil.copytree(SOURCE, project / "src", ignore=shutil.ignore_patterns("__pycache__"))
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])  # uv-build is one
    environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000", "PATH": programs}
    command = [sys.executable, "-c", BUILD, str(folder)]
    subprocess.run(command, cwd=project, env=environment, capture_output=True, check=True)
    return next(folder.glob("*.whl"))


@pytest.mark.property("X08")
def test_the_package_holds_texts_and_packed_texts_only() -> None:
    for name, content in files().items():
        if name in PACKED:
            assert content[4:8] == bytes(4), f"{name}: the time in its header would change its bytes"
            rows = gzip.decompress(content).decode("utf-8").splitlines()
            assert all(isinstance(json.loads(row), dict) for row in rows)
        else:
            assert name.endswith((".py", ".md", ".jinja", ".json", ".csv", ".mplstyle", "py.typed")), name
            assert "\0" not in content.decode("utf-8"), name
    assert PACKED <= files().keys()


@pytest.mark.property("X08")
def test_the_wheel_is_reproducible_and_lists_every_file(tmp_path: Path) -> None:
    if importlib.util.find_spec("uv_build") is None:
        pytest.skip("needs uv_build, the build backend")
    wheels = [build(tmp_path / name) for name in ("one", "two")]
    first, second = (hashlib.sha256(wheel.read_bytes()).hexdigest() for wheel in wheels)
    assert first == second
    with zipfile.ZipFile(wheels[0]) as wheel:
        names = wheel.namelist()
        (record,) = [name for name in names if name.endswith(".dist-info/RECORD")]
        listed = {line.rsplit(",", 2)[0] for line in wheel.read(record).decode().splitlines()}
        assert listed == {name for name in names if not name.endswith("/")}
        package = {name: wheel.read(name) for name in listed if not name.split("/")[0].endswith(".dist-info")}
    assert package == files()


@pytest.mark.property("X08")
def test_the_build_backend_has_a_range() -> None:
    build_system = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    (backend,) = build_system["requires"]
    assert backend.startswith("uv_build>=") and ",<" in backend
