"""Code beside a model, a tokenizer or an adapter that `train` is pointed at is not run, whatever files there say."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from bayestune_cli.app import invoke
from toys import pretrained_llama, write_data

CODE = """\
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
pathlib.Path({mark!r}).touch()
class CanaryConfig(LlamaConfig):
    model_type = "zzcanary"
class Canary(LlamaForCausalLM):
    config_class = CanaryConfig
class CanaryTokenizer(PreTrainedTokenizerFast):
    pass
"""
MAP = {"AutoConfig": "canary.CanaryConfig", "AutoModelForCausalLM": "canary.Canary"}
TOKENIZER_MAP = {"AutoTokenizer": ["canary.CanaryTokenizer", "canary.CanaryTokenizer"]}
ELSEWHERE = {
    "AutoConfig": "someone/elsewhere--canary.CanaryConfig",
    "AutoModelForCausalLM": "someone/x--canary.Canary",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama/, data/, and lora/, the mean of a run as any other program would have written it."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    assert train(folder, folder / "llama", folder / "run") == 0
    assert invoke(["export", str(folder / "run"), "--output", str(folder / "lora"), "--draws", "0"]) == 0
    return folder


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Attempts at a connection, which raise; no setting keeps anyone from trying."""
    found: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        found.append(str(args))
        raise OSError(f"a connection was attempted: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return found


def train(world: Path, model: Path, output: Path, *more: str) -> int:
    flags = ["--model", str(model), "--data", str(world / "data"), "--task", "colours", "--steps", "1"]
    return invoke(["train", *flags, "--max-tokens", "200", "--draws", "1", "--output", str(output), *more])


def edited(source: Path, target: Path, file: str, **changes: Any) -> Path:
    """A copy of the folder `source` with other settings in `file`, and beside them code that leaves a mark."""
    shutil.copytree(source, target)
    (target / file).write_text(json.dumps(json.loads((target / file).read_text()) | changes))
    (target / "canary.py").write_text(CODE.format(mark=str(target.parent / "mark")))
    return target


@pytest.mark.property("X01")
@pytest.mark.parametrize(
    ("file", "changes", "codes"),
    [
        ("config.json", {"auto_map": MAP}, {0}),
        ("config.json", {"auto_map": MAP, "model_type": "zzcanary", "trust_remote_code": True}, {2}),
        ("config.json", {"auto_map": ELSEWHERE, "trust_remote_code": True}, {0}),
        ("config.json", {"auto_map": ELSEWHERE, "model_type": "zzcanary"}, {2}),
        (
            "config.json",
            {"text_config": {"trust_remote_code": True, "auto_map": MAP, "model_type": "zzcanary"}},
            {0, 2},
        ),
        ("config.json", {"_attn_implementation_internal": "someone/kernel"}, {0, 2}),
        ("config.json", {"_attn_implementation": "someone/kernel"}, {0, 2}),
        ("config.json", {"attn_implementation": "someone/kernel"}, {0, 2}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP, "trust_remote_code": True}, {0}),
        ("tokenizer_config.json", {"auto_map": TOKENIZER_MAP, "tokenizer_class": "CanaryTokenizer"}, {0, 2}),
        ("tokenizer_config.json", {"tokenizer_class": "CanaryTokenizer", "trust_remote_code": True}, {0, 2}),
        ("generation_config.json", {"custom_generate": "canary.py", "trust_remote_code": True}, {0}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_code_in_a_model_folder_is_not_run_by_train(
    world: Path,
    tmp_path: Path,
    attempts: list[str],
    capsys: pytest.CaptureFixture[str],
    file: str,
    changes: dict[str, Any],
    codes: set[int],
) -> None:
    """Where both codes are allowed, transformers ignores the setting or refuses it; it never follows it."""
    model = edited(world / "llama", tmp_path / "model", file, **changes)
    assert train(world, model, tmp_path / "run") in codes
    assert not (tmp_path / "mark").exists() and attempts == []
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.property("X01")
@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "Canary", "parent_library": "canary"}},
        {"base_model_name_or_path": "someone/elsewhere", "revision": "main"},
        {"base_model_name_or_path": "https://example.org/model", "auto_mapping": {"parent_library": "canary"}},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_an_adapter_from_elsewhere_leads_nowhere(
    world: Path, tmp_path: Path, attempts: list[str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    adapter = edited(world / "lora" / "mean", tmp_path / "adapter", "adapter_config.json", **changes)
    monkeypatch.syspath_prepend(adapter)
    command = ("--method", "tfb", "--adapter", str(adapter))
    assert train(world, world / "llama", tmp_path / "run", *command) == 0
    assert not (tmp_path / "mark").exists() and attempts == []
    posterior = json.loads((tmp_path / "run" / "posterior" / "adapter_config.json").read_text())
    assert (posterior["auto_mapping"], posterior["revision"]) == (None, None)
    assert posterior["base_model_name_or_path"] == str(world / "llama")


@pytest.mark.property("X01")
def test_the_code_leaves_its_mark_where_it_is_run(tmp_path: Path, world: Path) -> None:
    model = edited(world / "llama", tmp_path / "model", "config.json")
    run: Callable[[str, dict[str, Any]], None] = exec
    run((model / "canary.py").read_text(), {})
    assert (tmp_path / "mark").exists()


@pytest.mark.property("X01")
def test_no_flag_switches_it_on(capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("train", "evaluate", "predict", "export", "table"):
        assert invoke([command, "--help"]) == 0
        assert "trust" not in capsys.readouterr().out
    assert invoke(["train", "--trust-remote-code", "--output", "nowhere"]) == 2
