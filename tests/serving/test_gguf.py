"""GGUF exports: llama.cpp's own converter gives the same tensors, and its server answers as plain PEFT does."""

import hashlib
import importlib.util
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from bayestune.adapters import BayesLoraConfig
from bayestune.errors import ConfigError
from bayestune.serving.gguf import ARCHITECTURES, permuted_rows
from bayestune.serving.lora import export_lora
from gguf_files import llama, symbols, write_gguf
from models import BERT, GPT2, LLAMA, blob, scatter
from serving.gguf_cases import CASES, CONVERTED, SOME, Case, described
from storage.spoil import CONFIG, MANIFEST, TENSORS

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tensors(path: Path) -> dict[str, Tensor]:
    return {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("name", CASES)
def test_the_tensors_are_those_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    (path,) = export_lora(CASES[name].model(), tmp_path / "served", draws=0, format="gguf")
    expected = json.loads(CONVERTED.read_text())["adapters"]
    assert described(path) == expected[name] and expected.keys() == CASES.keys()


def test_every_architecture_is_compared_with_the_converter() -> None:
    assert {case.model_type for case in CASES.values()} == ARCHITECTURES.keys()


@pytest.mark.parametrize(("heads", "size"), [(1, 2), (2, 4), (3, 10), (4, 16)])
def test_row_2i_plus_p_of_a_head_is_row_i_of_its_half_p(heads: int, size: int) -> None:
    weight = torch.arange(heads * size * 3.0).view(heads * size, 3)
    found = permuted_rows(weight, heads)
    for head in range(heads):
        for pair in range(size // 2):
            for half in range(2):
                row = found[head * size + 2 * pair + half]
                assert torch.equal(row, weight[head * size + half * (size // 2) + pair])


def test_neighbors_of_the_permuted_rows_rotate_as_the_halves_of_the_rows_do() -> None:
    """Attention scores by transformers' rotation of halves equal those by llama.cpp's rotation of neighbors."""
    size, angles = 8, torch.rand(4, dtype=torch.float64)
    query, key = torch.randn(2, size, 1, dtype=torch.float64)

    def rotated(vector: Tensor, pairs: list[tuple[int, int]], position: int) -> Tensor:
        out = vector.clone()
        for (a, b), angle in zip(pairs, angles * position, strict=True):
            out[a] = vector[a] * angle.cos() - vector[b] * angle.sin()
            out[b] = vector[a] * angle.sin() + vector[b] * angle.cos()
        return out

    halves = [(pair, pair + size // 2) for pair in range(size // 2)]
    neighbors = [(2 * pair, 2 * pair + 1) for pair in range(size // 2)]
    expected = (rotated(query, halves, 5) * rotated(key, halves, 2)).sum()
    query, key = permuted_rows(query, 1), permuted_rows(key, 1)
    torch.testing.assert_close((rotated(query, neighbors, 5) * rotated(key, neighbors, 2)).sum(), expected)


def test_each_file_holds_what_the_peft_folder_of_its_draw_holds(tmp_path: Path) -> None:
    model = blob(target_modules=LINEAR, use_rslora=True, rank_pattern={"o_proj": 6})
    folders = export_lora(model, tmp_path / "peft", draws=2, seed=5)
    files = export_lora(model, tmp_path / "gguf", draws=2, seed=5, format="gguf")
    assert files == [tmp_path / "gguf" / name for name in ("mean.gguf", "draw_0.gguf", "draw_1.gguf")]
    for folder, file in zip(folders, files, strict=True):
        expected, found = load_file(folder / TENSORS), tensors(file)
        for layer in (0, 1):
            for hf, name in (("self_attn.v_proj", "attn_v"), ("self_attn.o_proj", "attn_output")):
                for side in "AB":
                    key = f"base_model.model.model.layers.{layer}.{hf}.lora_{side}.weight"
                    assert torch.equal(found[f"blk.{layer}.{name}.weight.lora_{side.lower()}"], expected[key])
        alpha = gguf.GGUFReader(file).fields["adapter.lora.alpha"].contents()
        assert alpha == json.loads((folder / CONFIG).read_text())["r"] == 6
    a, b, c = (tensors(file)["blk.1.attn_v.weight.lora_a"] for file in files)
    assert min((a - b).abs().max(), (a - c).abs().max(), (b - c).abs().max()) > 0.1


def test_tensors_are_float32_whatever_the_adapter_is(tmp_path: Path) -> None:
    model = blob().to(torch.float64)
    (folder,) = export_lora(model, tmp_path / "peft", draws=0)
    (file,) = export_lora(model, tmp_path / "gguf", draws=0, format="gguf")
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    expected = load_file(folder / TENSORS)[key]
    assert expected.dtype == torch.float64
    assert {tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors} == {"F32"}
    assert torch.equal(tensors(file)["blk.0.attn_v.weight.lora_b"], expected.float())


def test_the_manifest_vouches_for_each_file_and_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    model = blob()
    files = export_lora(model, tmp_path / "a", draws=2, seed=3, format="gguf")
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest["exported"] == {"kind": "variational", "draws": 2, "seed": 3} and manifest["notes"] == []
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert {name: record["sha256"] for name, record in manifest["files"].items()} == digests
    assert sorted(os.listdir(tmp_path / "a")) == sorted([*digests, MANIFEST])
    again = export_lora(model, tmp_path / "b", draws=2, seed=3, format="gguf")
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]
    fields = gguf.GGUFReader(files[2]).fields
    assert (fields["bayestune.draw"].contents(), fields["bayestune.seed"].contents()) == ("1", "3")


def test_one_format_replaces_the_other_only_if_asked(tmp_path: Path) -> None:
    export_lora(blob(), tmp_path / "e", draws=1)
    with pytest.raises(ConfigError, match="exists already"):
        export_lora(blob(), tmp_path / "e", draws=0, format="gguf")
    export_lora(blob(), tmp_path / "e", draws=0, format="gguf", overwrite=True)
    assert sorted(os.listdir(tmp_path / "e")) == [MANIFEST, "mean.gguf"]


def custom() -> PeftModel:
    """An adapter on a model that is not of transformers."""
    return scatter(get_peft_model(nn.Sequential(nn.Linear(4, 4)), BayesLoraConfig(r=2, target_modules=["0"])))


def on_embeddings() -> PeftModel:
    return scatter(get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])))


def on_the_head(tied: bool, model_type: str = "llama") -> PeftModel:
    settings = {"tie_word_embeddings": tied} | ({"head_dim": 8} if model_type == "gemma" else {})
    return Case(model_type=model_type, targets=(*SOME, "lm_head"), settings=settings).model()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "architecture": (
        lambda: blob(GPT2),
        "found the architecture 'gpt2', expected one of gemma, .*, smollm3; export with format 'peft' and convert "
        "each folder: python convert_lora_to_gguf.py --base BASE DRAW_FOLDER$",
    ),
    "classifier": (lambda: blob(BERT), "found the architecture 'bert'"),
    "custom": (custom, "found the architecture 'Sequential'"),
    "head": (lambda: blob(modules_to_save=["lm_head"]), r"found modules_to_save \['lm_head'\], expected LoRA layers"),
    "tied": (lambda: on_the_head(True), "found an adapter on lm_head, whose weight is tied"),
    "embeddings": (on_embeddings, "found an adapter on the embeddings model.embed_tokens, expected linear layers"),
    "unnamed": (
        lambda: on_the_head(False, "gemma"),
        "found an adapter on lm_head, expected a layer that GGUF names in the architecture 'gemma'",
    ),
}


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")  # PEFT, when the adapter is made
@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_cannot_load_is_refused_in_one_line_before_any_write(name: str, tmp_path: Path) -> None:
    make, words = REFUSED[name]
    with pytest.raises(ConfigError, match=words) as caught:
        export_lora(make(), tmp_path / "e", draws=0, format="gguf")
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == []


def test_an_unknown_format_and_a_missing_package_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="format: found 'onnx', expected 'peft' or 'gguf'"):
        export_lora(blob(), tmp_path / "e", draws=0, format="onnx")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"found no package gguf.*pip install '\.\[serve\]'"):
        export_lora(blob(), tmp_path / "e", draws=0, format="gguf")
    assert os.listdir(tmp_path) == []


PROMPTS = ([1, 40, 77, 200, 13, 99], [1, 5, 5, 250, 31])


@pytest.fixture
def answers() -> Callable[..., Callable[..., Tensor]]:
    """Starts llama.cpp's server; what it returns asks for the next token's probabilities, under given scales."""
    server = pytest.importorskip("xllamacpp", reason="llama.cpp's server, xllamacpp, is not installed")

    def start(base: Path, adapters: list[Path]) -> Callable[..., Tensor]:
        settings = server.CommonParams()
        settings.model.path, settings.n_ctx, settings.warmup, settings.verbosity = str(base), 256, False, 0
        settings.n_parallel = settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
        settings.cache_type_k = settings.cache_type_v = server.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = server.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.lora_adapters = [server.CommonAdapterLoraInfo(str(path), 0.0) for path in adapters]
        running = server.Server(settings)

        def ask(prompt: list[int], vocabulary: int, scales: dict[int, float]) -> Tensor:
            lora = [{"id": number, "scale": scales.get(number, 0.0)} for number in range(len(adapters))]
            request: dict[str, Any] = {"prompt": prompt, "max_tokens": 1, "temperature": 1.0, "logprobs": vocabulary}
            request |= {"samplers": [], "cache_prompt": False, "lora": lora}
            request["logit_bias"] = [[symbols().index("a"), 100]]  # bytes that are no text have no logprobs
            (choice,) = running.handle_completions(request)["choices"]
            found = choice["logprobs"]["content"][0]["top_logprobs"]
            probabilities = torch.zeros(vocabulary, dtype=torch.float64)
            for token in found:
                probabilities[token["id"]] = math.exp(token["logprob"])
            assert len(found) == vocabulary
            return probabilities

        return ask

    return start


@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_answers_with_each_draw_as_peft_does(
    tied: bool, answers: Callable[..., Callable[..., Tensor]], tmp_path: Path
) -> None:
    config = BayesLoraConfig(
        r=3,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 5},
        rho_init=0.4,
        target_modules=LINEAR if tied else [*LINEAR, "lm_head"],
        task_type="CAUSAL_LM",
    )
    base = llama(tied=tied)
    write_gguf(tmp_path / "base.gguf", base, gguf.GGMLQuantizationType.F32)
    model = scatter(get_peft_model(base, config))
    folders = export_lora(model, tmp_path / "peft", draws=3)
    files = export_lora(model, tmp_path / "gguf", draws=3, format="gguf")
    ask, size = answers(tmp_path / "base.gguf", files), base.config.vocab_size
    for prompt in PROMPTS:
        seen = [ask(prompt, size, {})]
        for number, folder in enumerate(folders):
            plain = PeftModel.from_pretrained(llama(tied=tied), folder).eval()
            with torch.no_grad():
                expected = plain(torch.tensor([prompt])).logits[0, -1].double().softmax(-1)
            seen.append(ask(prompt, size, {number: 1.0}))
            assert (seen[-1] - expected).abs().max() < 1e-5
        assert min((a - b).abs().max() for i, a in enumerate(seen) for b in seen[:i]) > 1e-4
