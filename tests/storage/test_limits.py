"""Absurd settings under right hashes: refused before PEFT or `re` sees them, so that none can take long."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bayestune.errors import PosteriorError
from bayestune.storage import load_posterior, loading, save_posterior, state
from models import LLAMA, adapter_state, assert_same, blob
from storage.spoil import CONFIG, seal


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "posterior"
    save_posterior(blob(), folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A saved posterior; nothing may build an adapter for it, not even one without weights."""

    def never(*args: Any, **kwargs: Any) -> None:
        pytest.fail("PEFT was given these settings")

    monkeypatch.setattr(loading, "skeleton", never)
    monkeypatch.setattr(state, "adapted", never)
    return shutil.copytree(saved, tmp_path / "posterior")


def refused(folder: Path, text: str, words: str) -> None:
    """The settings `text`, with a manifest that agrees with them, are refused with `words` on one line."""
    (folder / CONFIG).write_text(text)
    seal(folder)
    with pytest.raises(PosteriorError, match=words) as caught:
        load_posterior(LLAMA.build(), folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def changed(saved: Path, **changes: Any) -> str:
    return json.dumps(json.loads((saved / CONFIG).read_text()) | changes)


@pytest.mark.property("X07")
def test_the_fixture_notices_settings_that_reach_peft(folder: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="given these settings"):
        load_posterior(LLAMA.build(), folder)


@pytest.mark.property("X07")
def test_layers_found_by_a_regular_expression_are_saved_by_name(tmp_path: Path) -> None:
    """Whatever the expression was: loading compares names, and finds the same layers."""
    config = {
        "target_modules": r"(?:.*\.)?layers\.[01]{1,2}\.self_attn\.(q|k|v)_proj",
        "exclude_modules": r".*k_pro[j]",
    }
    model = blob(**config)
    save_posterior(model, tmp_path / "p")
    values = json.loads((tmp_path / "p" / CONFIG).read_text())
    assert values["exclude_modules"] is None
    assert values["target_modules"] == [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    loaded = load_posterior(LLAMA.build(), tmp_path / "p")
    assert_same(adapter_state(loaded), adapter_state(model))


@pytest.mark.property("X07")
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": 10**9}, "rank: found 1000000000"),
        ({"target_modules": ["m"] * 10**6}, "bytes of JSON, expected at most"),
        ({"lora_alpha": float("nan")}, "NaN is not a JSON number"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_absurd_settings_are_refused(saved: Path, folder: Path, changes: dict[str, Any], words: str) -> None:
    refused(folder, changed(saved, **changes), words)


@pytest.mark.property("X07")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"lora_alpha": 1e999}', "1e999 is too large a number"),
        ('{"r": 1' + "0" * 5000 + "}", "digits"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["overflow", "digits", "open"],
)
def test_json_without_bounds_is_refused(folder: Path, text: str, words: str) -> None:
    refused(folder, text, words)
