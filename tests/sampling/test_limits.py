"""Absurd settings under right hashes: refused before PEFT or `re` sees them, so that none can take long."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from bayestune.adapters import BayesLoraConfig
from bayestune.adapters.patterns import EXPRESSIONS, FORKS, LONGEST, pattern_fault
from bayestune.errors import ConfigError, PosteriorError
from bayestune.methods import load_posterior, save_posterior, storage
from bayestune.storage.manifest import file_record, read_manifest, write_manifest
from bayestune.storage.state import MAX_NAMES
from models import LLAMA, adapter_state, assert_same, blob

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
NESTED: Any = json.loads("[" * 200 + "]" * 200)
RUNAWAYS = [
    "(a+)+$",
    "(a*)*b",
    "(.*)*x",
    "(a|a)*b",
    "(a|aa)+$",
    "(?:a?){40}b",
    "a?" * 30 + "a" * 30,
    "(.|.)" * 40,
    ".*.*.*.*x",
    ".+.+.+.+x",
    "(.*)(.*)",
    r"[\w.]*[\w.]*[\w.]*x",
    r"(?=(.*a){20})",
    "q_proj{1,60000}",
    "|".join(["q_proj"] * 100),
]


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

    monkeypatch.setattr(storage, "skeleton", never)
    monkeypatch.setattr(storage, "adapted", never)
    return shutil.copytree(saved, tmp_path / "posterior")


def refused(folder: Path, text: str, words: str) -> None:
    """The settings `text`, with a manifest that agrees with them, are refused with `words` on one line."""
    (folder / CONFIG).write_text(text)
    content = read_manifest(folder) | {"files": {name: file_record(folder / name) for name in (CONFIG, TENSORS)}}
    del content["format"]
    write_manifest(folder, content=content)
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
@pytest.mark.parametrize("pattern", RUNAWAYS, ids=[pattern[:20] for pattern in RUNAWAYS])
def test_a_pattern_that_may_take_for_ever_is_never_run(saved: Path, folder: Path, pattern: str) -> None:
    for setting in (
        {"target_modules": pattern},
        {"exclude_modules": pattern},
        {"layers_pattern": pattern, "layers_to_transform": [0]},
        {"layers_pattern": ["layers", pattern], "layers_to_transform": [0]},
        {"rank_pattern": {pattern: 4}},
        {"alpha_pattern": {"v_proj": 4, pattern: 4}},
        {"modules_to_save": [pattern]},
    ):
        refused(folder, changed(saved, **setting), rf"{CONFIG}: {next(iter(setting))}: found .*expected names, or a")
        if not {"target_modules", "exclude_modules"} & setting.keys():  # those are the caller's own, run once
            with pytest.raises(ConfigError, match=f"BayesLoraConfig {next(iter(setting))}: found"):
                BayesLoraConfig(**{"target_modules": ["q_proj"], **setting})


@pytest.mark.property("X07")
@pytest.mark.parametrize(
    "pattern",
    [
        "all-linear",
        r".*\.1\.self_attn\.(q|o)_proj",
        r".*language_model\..*\.(q_proj|v_proj)",
        r"^model\.decoder\.layers.0.encoder_attn.k_proj",
        "a" * LONGEST,
        ".*" * FORKS,
    ],
)
def test_patterns_as_they_are_in_use_are_taken(pattern: str) -> None:
    assert pattern_fault({"target_modules": pattern, "rank_pattern": {pattern: 4}}) is None


@pytest.mark.property("X07")
def test_many_patterns_together_are_never_run(saved: Path, folder: Path) -> None:
    """Each is bounded, and so is their number; names are not counted."""
    half = EXPRESSIONS // 2 + 1
    settings = {name: {f".*.*{name}{i}": 4 for i in range(half)} for name in ("rank_pattern", "alpha_pattern")}
    refused(folder, changed(saved, **settings), f"alpha_pattern: found more than {EXPRESSIONS} regular expressions")
    names = {f"model.layers.{i}.self_attn.q_proj": 4 for i in range(10 * EXPRESSIONS)}
    assert pattern_fault({"rank_pattern": names, "alpha_pattern": names}) is None


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
        ({"rank_pattern": {"q_proj": 10**9}}, "rank: found 1000000000"),
        ({"target_modules": [f"m{i}" for i in range(MAX_NAMES + 1)]}, f"found {MAX_NAMES + 1} entries, expected at"),
        ({"target_modules": ["m"] * 10**6}, "bytes of JSON, expected at most"),
        ({"alpha_pattern": {f"m{i}": 1 for i in range(MAX_NAMES + 1)}}, f"alpha_pattern: found {MAX_NAMES + 1}"),
        ({"layers_to_transform": list(range(MAX_NAMES + 1))}, f"layers_to_transform: found {MAX_NAMES + 1}"),
        ({"alpha_pattern": {"q_proj": NESTED}}, "nested too deeply, expected at most 64 levels"),
        ({"alpha_pattern": {"q_proj": "4"}}, "alpha_pattern: found a str in it"),
        ({"layers_to_transform": [True]}, "layers_to_transform: found a bool in it"),
        ({"target_modules": [["q_proj"]]}, "target_modules: found a list in it"),
        ({"auto_mapping": {"a": NESTED}}, "nested too deeply"),
        ({"lora_alpha": float("nan")}, "NaN is not a JSON number"),
        ({"lora_alpha": float("-inf")}, "-Infinity is not a JSON number"),
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
        ('{"a": ' * 1000 + "1" + "}" * 1000, "nested too deeply"),
        ("[" * 900 + "]" * 900, "nested too deeply"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["overflow", "digits", "objects", "lists", "open"],
)
def test_json_without_bounds_is_refused(folder: Path, text: str, words: str) -> None:
    refused(folder, text, words)
