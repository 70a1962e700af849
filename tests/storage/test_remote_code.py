"""Nothing in a saved posterior can make a module be imported or anything be fetched."""

import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import peft.utils.save_and_load
import pytest
import torch

from bayestune.errors import PosteriorError
from bayestune.methods import load_posterior, save_posterior
from models import LLAMA, blob
from storage.spoil import edit_config, seal


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_posterior(blob(), tmp_path / "posterior")
    return tmp_path / "posterior"


@pytest.fixture
def canary(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Modules named `canary` within reach of the import system, which leave a file where they are imported."""
    mark = folder.parent / "imported"
    package = folder.parent / "modules" / "canary"
    package.mkdir(parents=True)
    for name in ("__init__.py", "modeling.py"):
        (package / name).write_text(f"open({str(mark)!r}, 'w').close()\nclass Model: pass\n")
    monkeypatch.syspath_prepend(package.parent)
    yield mark
    for name in [name for name in sys.modules if name.split(".")[0] == "canary"]:
        del sys.modules[name]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Any attempt at a connection raises and is listed; nothing is kept from trying by a setting."""
    attempts: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        attempts.append(str(args))
        raise AssertionError(f"a connection was attempted: {args}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(peft.utils.save_and_load, "check_file_exists_on_hf_hub", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return attempts


@pytest.mark.property("X01")
@pytest.mark.parametrize(
    "changes",
    [
        {
            "auto_mapping": {
                "base_model_class": "Model",
                "parent_library": "canary.modeling",
                "trust_remote_code": True,
            }
        },
        {"base_model_name_or_path": "someone/elsewhere", "revision": "main"},
        {"task_type": None, "auto_mapping": {"parent_library": "canary"}, "base_model_name_or_path": "canary"},
    ],
    ids=["trust in mapping", "another repository", "all"],
)
def test_where_the_base_came_from_is_not_followed(
    folder: Path, canary: Path, no_network: list[str], changes: dict[str, Any]
) -> None:
    edit_config(folder, **changes)
    seal(folder)
    base = LLAMA.build()
    model = load_posterior(base, folder)
    assert model.get_base_model() is base
    assert torch.equal(model(**LLAMA.inputs()).logits, blob().eval()(**LLAMA.inputs()).logits)
    config = model.peft_config["default"]
    assert (config.auto_mapping, config.revision) == (None, None)
    assert config.base_model_name_or_path not in ("canary", "someone/elsewhere")
    save_posterior(model, folder.parent / "again")
    assert not canary.exists() and "canary" not in sys.modules and no_network == []


@pytest.mark.property("X01")
@pytest.mark.parametrize(
    "changes",
    [
        {"auto_map": {"AutoModel": "modeling.Model"}},
        {"megatron_config": {"a": 1}, "megatron_core": "canary.modeling"},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_settings_that_name_code_are_refused(
    folder: Path, canary: Path, no_network: list[str], changes: dict[str, Any]
) -> None:
    edit_config(folder, **changes)
    seal(folder)
    with pytest.raises(PosteriorError, match=f"adapter_config.json: ({'|'.join(changes)}): "):
        load_posterior(LLAMA.build(), folder)
    assert not canary.exists() and "canary" not in sys.modules and no_network == []


@pytest.mark.property("X01")
def test_code_in_the_folder_is_refused_unread(folder: Path, canary: Path) -> None:
    for name in ("modeling_canary.py", "config.json"):
        shutil.copy(folder.parent / "modules" / "canary" / "__init__.py", folder / name)
        with pytest.raises(PosteriorError, match=f"{name} is not in the manifest and is not opened"):
            load_posterior(LLAMA.build(), folder)
        (folder / name).unlink()
    assert not canary.exists() and "canary" not in sys.modules


@pytest.mark.property("X01")
def test_saving_asks_no_one_about_the_base(tmp_path: Path, no_network: list[str]) -> None:
    """PEFT, left to itself, looks the base up on the Hub to see whether its vocabulary grew."""
    model = blob()
    model.peft_config["default"].base_model_name_or_path = "someone/model"
    save_posterior(model, tmp_path / "p")
    assert no_network == []


@pytest.mark.property("X01")
def test_the_canary_sings_where_it_is_imported(canary: Path) -> None:
    __import__("canary.modeling")
    assert canary.exists()
