"""Exports: ordinary LoRA folders that plain PEFT loads without a word and that answer as the draw they are of."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneWarning, ConfigError, DrawError, PosteriorError
from bayestune.functional import prediction_noise
from bayestune.inference.draws import draw, evaluation_mode
from bayestune.methods import EnsemblePosterior, SwagPosterior, fit_laplace, load_posterior, save_posterior
from bayestune.methods.swag import Moments, trained_weights
from bayestune.sampling.base import Substituted, SubstitutedDraws
from bayestune.serving.lora import export_lora
from bayestune.storage.state import adapter_tensors
from inference.cases import Letters, rows
from models import BERT, GPT2, LLAMA, QWEN2, blob, logits, scatter
from storage.cases import Case
from storage.spoil import CONFIG, MANIFEST, TENSORS

DRAWS, SEED = 3, 11
CASES = {
    "llama": Case(architecture=LLAMA),
    "gpt2": Case(architecture=GPT2),
    "qwen2": Case(architecture=QWEN2, settings={"alpha_pattern": {"k_proj": 3}}),
    "bert": Case(architecture=BERT),
    "bert_modules_to_save": Case(architecture=BERT, settings={"task_type": None, "modules_to_save": ["classifier"]}),
    "rslora": Case(
        architecture=QWEN2,
        settings={"use_rslora": True, "r": 3, "rank_pattern": {"layers.0.self_attn.q_proj": 5}},
    ),
    "mixed": Case(
        architecture=QWEN2,
        settings={
            "use_rslora": True,
            "r": 3,
            "rank_pattern": {r"layers\.[0]\.self_attn\.q_pro?j": 5},
            "alpha_pattern": {"q_proj": 7, r".*\.\d+\.mlp\.down_proj": 2},
        },
    ),
    "rslora_float64": Case(architecture=LLAMA, settings={"use_rslora": True, "r": 3}, dtype=torch.float64),
    "float64": Case(architecture=GPT2, dtype=torch.float64),
    "gaussian_ab": Case(architecture=LLAMA, settings={"distribution": "gaussian_ab"}),
    "dropout": Case(architecture=GPT2, settings={"distribution": "dropout", "lora_dropout": 0.3}),
    "regex": Case(architecture=LLAMA, settings={"target_modules": r"(?:.*\.)?layers\.[1]\.self_attn\.(q|o)_pro?j"}),
    "some_layers": Case(architecture=QWEN2, settings={"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "several": Case(architecture=LLAMA, adapters=("default", "default2", "ad")),
    "plain": Case(architecture=LLAMA, plain=True),
}
NAMES = ["mean", *(f"draw_{index}" for index in range(DRAWS))]

# Plain PEFT in a process that never sees bayestune. Every warning is an error but the one that PEFT itself causes in
# transformers with any adapter; every log record at WARNING or above is an error, too.
CHILD = """
import json, logging, sys, warnings
from pathlib import Path
import torch, transformers
from peft import PeftModel
from safetensors.torch import load_file

torch.set_num_threads(1)
records = []
class Listener(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())
listener = Listener(logging.WARNING)
for name in (None, "transformers", "peft"):
    logging.getLogger(name).addHandler(listener)

root, found = Path(sys.argv[1]), {}
for case in sorted(root.iterdir()):
    settings = json.loads((case / "case.json").read_text())
    inputs, expected = load_file(case / "inputs.safetensors"), load_file(case / "expected.safetensors")
    for name in expected:
        base = getattr(transformers, settings["class"]).from_pretrained(case / "base", dtype=settings["dtype"]).eval()
        records.clear()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
            model = PeftModel.from_pretrained(base, case / "exported" / name)
            logits = model(**inputs).logits
        assert records == [], (case.name, records)
        difference = (logits - expected[name]).abs().max() / expected[name].abs().max().clamp(min=1)
        found[f"{case.name} {name}"] = difference.item()
assert "bayestune" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case exported, with its base, inputs and the logits that each folder must give."""
    root = tmp_path_factory.mktemp("exported")
    for name, case in CASES.items():
        folder = root / name
        base, model, inputs = case.base(), case.model(), case.architecture.inputs()
        base.save_pretrained(folder / "base")
        save_file(inputs, folder / "inputs.safetensors")
        export_lora(model, folder / "exported", draws=0 if case.plain else DRAWS, seed=SEED)
        with torch.no_grad(), evaluation_mode(model):
            expected = {"mean": model(**inputs).logits}
            for index in range(0 if case.plain else DRAWS):
                with draw(model, index=index, seed=SEED):
                    expected[f"draw_{index}"] = model(**inputs).logits
        save_file(expected, folder / "expected.safetensors")
        dtype = str(case.dtype).removeprefix("torch.")
        (folder / "case.json").write_text(json.dumps({"class": type(base).__name__, "dtype": dtype}))
    return root


@pytest.fixture(scope="module")
def differences(exported: Path) -> dict[str, float]:
    """Largest difference of the logits, relative to the largest logit (at least 1), in plain PEFT."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(exported)], env=environment, capture_output=True, text=True, cwd=exported
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_plain_peft_loads_each_folder_silently_and_answers_as_the_draw(differences: dict[str, float]) -> None:
    for name, case in CASES.items():
        bound = 1e-12 if case.dtype == torch.float64 else 1e-6
        for folder in ["mean"] if case.plain else NAMES:
            assert differences[f"{name} {folder}"] <= bound, (name, folder)


def test_the_draws_differ_from_one_another(exported: Path) -> None:
    for name, case in CASES.items():
        expected = load_file(exported / name / "expected.safetensors")
        with torch.no_grad():
            logits = [case.base()(**case.architecture.inputs()).logits, *expected.values()]
        assert min((a - b).abs().max() for i, a in enumerate(logits) for b in logits[:i]) > 1e-3


def test_A_is_the_mean_plus_std_times_the_keyed_noise_and_B_is_scaled(tmp_path: Path) -> None:
    model = blob()
    paths = export_lora(model, tmp_path / "e", draws=2, seed=5)
    assert paths == [tmp_path / "e" / name for name in ("mean", "draw_0", "draw_1")]
    for path, index in zip(paths, (None, 0, 1), strict=True):
        tensors = load_file(path / "adapter_model.safetensors")
        for name, layer in gaussian_layers(model).items():
            noise = 0 if index is None else prediction_noise(5, index, name, tuple(layer.weight.shape))
            expected = layer.weight + layer.rho * layer.rho * noise
            assert torch.equal(tensors.pop(f"base_model.model.{name}.lora_A.weight"), expected)
            b = model.get_submodule(f"base_model.model.{name}.lora_B.default").weight
            assert torch.equal(tensors.pop(f"base_model.model.{name}.lora_B.weight"), 2 * b)  # alpha / r
        assert tensors == {}


def test_every_layer_has_the_largest_rank_and_its_whole_scale_in_B(exported: Path) -> None:
    """What servers read: one rank and one alpha, so that the scale is 1 in all of them."""
    for name, case in CASES.items():
        model, adapter, config = case.model(), case.adapters[-1], case.config()
        folder = exported / name / "exported" / "mean"
        values, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
        ranks = {len(tensor) for key, tensor in adapter_tensors(model, adapter).items() if ".lora_A.weight" in key}
        assert values["r"] == values["lora_alpha"] == max(ranks), name
        assert (values["rank_pattern"], values["alpha_pattern"], values["use_rslora"]) == ({}, {}, False)
        assert {len(t) for key, t in tensors.items() if ".lora_A." in key} == {max(ranks)}
        assert {t.shape[1] for key, t in tensors.items() if ".lora_B." in key} == {max(ranks)}
        if name == "mixed":
            assert ranks == {3, 5}
            key = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
            alpha = config.alpha_pattern["q_proj"]
            expected = adapter_tensors(model, adapter)[key] * (alpha / math.sqrt(5))
            torch.testing.assert_close(tensors[key], expected)


def test_the_folders_are_ordinary_lora(exported: Path) -> None:
    for name, case in CASES.items():
        root = exported / name / "exported"
        folders = ["mean"] if case.plain else NAMES
        assert sorted(entry.name for entry in root.iterdir()) == sorted([*folders, "bayestune_manifest.json"])
        for folder in folders:
            assert sorted(os.listdir(root / folder)) == ["adapter_config.json", "adapter_model.safetensors"]
            config = json.loads((root / folder / "adapter_config.json").read_text())
            assert config.keys() == LoraConfig().to_dict().keys()
            assert (config["peft_type"], config["bias"], config["inference_mode"]) == ("LORA", "none", True)
            assert isinstance(config["target_modules"], list) and config["use_dora"] is False
            keys = load_file(root / folder / "adapter_model.safetensors").keys()
            heads = {key for key in keys if not key.endswith((".lora_A.weight", ".lora_B.weight"))}
            expected = {"weight", "bias"} if config["modules_to_save"] else set()
            assert heads == {f"base_model.model.classifier.{part}" for part in expected}


def test_target_modules_are_suffixes_where_these_say_enough(exported: Path) -> None:
    def targets(name: str) -> list[str]:
        return json.loads((exported / name / "exported" / "mean" / "adapter_config.json").read_text())[
            "target_modules"
        ]

    assert targets("qwen2") == sorted(QWEN2.targets) and targets("gpt2") == sorted(GPT2.targets)
    assert targets("regex") == ["model.layers.1.self_attn.o_proj", "model.layers.1.self_attn.q_proj"]
    assert targets("some_layers") == ["model.layers.1.self_attn.q_proj"]


def test_seed_and_index_are_in_the_header_and_the_manifest(exported: Path) -> None:
    root = exported / "llama" / "exported"
    for name, expected in {"mean": {"draw": "mean"}, "draw_2": {"draw": "2", "seed": "11"}}.items():
        with safe_open(root / name / "adapter_model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt", **expected}
    manifest = json.loads((root / "bayestune_manifest.json").read_text())
    assert manifest["exported"] == {"kind": "variational", "draws": 3, "seed": 11}
    assert len(manifest["files"]) == 8 and manifest["notes"] == []


def test_the_manifest_warns_of_what_servers_refuse(exported: Path) -> None:
    (note,) = json.loads((exported / "bert" / "exported" / MANIFEST).read_text())["notes"]
    assert "['classifier']" in note and "refuse" in note


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings")  # PEFT, when the adapter is made
def test_a_tied_head_is_warned_of(tmp_path: Path) -> None:
    targets = ["q_proj", "lm_head"]
    model = scatter(get_peft_model(LLAMA.build(tie_word_embeddings=True), LLAMA.config(target_modules=targets)))
    with pytest.warns(BayestuneWarning, match="lm_head is adapted and its weight is tied.*use the adapters unmerged"):
        paths = export_lora(model, tmp_path / "tied", draws=0)
    (note,) = json.loads((tmp_path / "tied" / MANIFEST).read_text())["notes"]
    assert "lm_head" in note and "\n" not in note
    plain = PeftModel.from_pretrained(LLAMA.build(tie_word_embeddings=True), paths[0]).eval()
    torch.testing.assert_close(logits(plain, LLAMA.inputs()), logits(model.eval(), LLAMA.inputs()))
    export_lora(blob(target_modules=targets), tmp_path / "untied", draws=0)
    assert json.loads((tmp_path / "untied" / MANIFEST).read_text())["notes"] == []


def test_the_same_seed_writes_the_same_weights_and_moves_no_random_state(tmp_path: Path) -> None:
    model = blob()
    before = torch.get_rng_state()
    first, second = (export_lora(model, tmp_path / name, draws=1) for name in ("a", "b"))
    third = export_lora(model, tmp_path / "c", draws=1, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    assert (first[1] / "adapter_config.json").read_bytes() == (second[1] / "adapter_config.json").read_bytes()
    a, b, c = (load_file(paths[1] / "adapter_model.safetensors") for paths in (first, second, third))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert all(torch.equal(a[key], c[key]) != key.endswith(".lora_A.weight") for key in a)


def test_exporting_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = blob()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    settings = str(model.peft_config["default"].to_dict())
    export_lora(model, tmp_path / "e", draws=2)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    assert model.training and str(model.peft_config["default"].to_dict()) == settings


def test_an_export_is_no_posterior(exported: Path) -> None:
    with pytest.raises(PosteriorError, match="was written by export_lora"):
        load_posterior(LLAMA.build(), exported / "llama" / "exported")
    with pytest.raises(PosteriorError, match="holds no bayestune_manifest.json"):
        load_posterior(LLAMA.build(), exported / "llama" / "exported" / "mean")


def test_what_cannot_be_exported_is_refused_before_any_write(tmp_path: Path) -> None:
    plain = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj"]))
    dora = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    nan = blob()
    next(iter(gaussian_layers(nan).values())).rho.data.fill_(torch.nan)
    faults: list[tuple[Any, dict[str, int], str]] = [
        (plain, {"draws": 1}, "plain LoRA, a point without a posterior: pass draws=0"),
        (plain, {}, "plain LoRA"),
        (dora, {"draws": 0}, "use_dora: found True"),
        (blob(), {"draws": -1}, "found -1"),
        (LLAMA.build(), {}, "expected a PeftModel"),
        (nan, {}, "NaN"),
    ]
    for model, arguments, words in faults:
        with pytest.raises((ConfigError, PosteriorError), match=words):
            export_lora(model, tmp_path / "e", **arguments)
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_replaced_whole_and_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_lora(blob(), tmp_path / "e", draws=3)
    with pytest.raises(ConfigError, match="exists already"):
        export_lora(blob(), tmp_path / "e", draws=1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("bayestune.serving.lora.write_manifest", full)
        export_lora(blob(), tmp_path / "e", draws=1, overwrite=True)
    assert os.listdir(tmp_path) == ["e"] and len(os.listdir(tmp_path / "e")) == 5
    export_lora(blob(), tmp_path / "e", draws=1, overwrite=True)
    assert sorted(os.listdir(tmp_path / "e")) == ["bayestune_manifest.json", "draw_0", "mean"]


def test_a_posterior_is_not_replaced_by_its_export(tmp_path: Path) -> None:
    save_posterior(blob(), tmp_path / "posterior")
    with pytest.raises(ConfigError, match="posterior: found a folder that bayestune wrote for another purpose"):
        export_lora(blob(), tmp_path / "posterior", draws=1, overwrite=True)
    load_posterior(LLAMA.build(), tmp_path / "posterior")


def test_the_members_of_an_ensemble_are_exported_as_they_are(tmp_path: Path) -> None:
    case = Case(architecture=LLAMA, plain=True)
    models = [scatter(get_peft_model(case.base(), case.config()), seed=number).eval() for number in range(3)]
    members = [{k: t.detach().clone() for k, t in adapter_tensors(model, "default").items()} for model in models]
    posterior = EnsemblePosterior(models[0], members, temperature=2.0)
    with pytest.warns(BayestuneWarning, match=r"temperature of 2\.0, which LoRA cannot hold"):
        paths = export_lora(posterior, tmp_path / "out", draws=2)
    assert [path.name for path in paths] == ["draw_0", "draw_1"]
    inputs = LLAMA.inputs()
    for number, path in enumerate(paths):
        found = PeftModel.from_pretrained(case.base(), path).eval()
        assert torch.equal(found(**inputs).logits, models[number](**inputs).logits)
    notes = json.loads((tmp_path / "out" / "bayestune_manifest.json").read_text())["notes"]
    assert any("temperature of 2.0" in note for note in notes)
    with pytest.raises(DrawError, match="draws: found 4"):
        export_lora(posterior, tmp_path / "more", draws=4)
    with pytest.raises(DrawError, match="draws: found 0"):
        export_lora(posterior, tmp_path / "more", draws=0)
    assert not (tmp_path / "more").exists()


def test_draws_of_swag_are_exported_as_they_predict(tmp_path: Path) -> None:
    case = Case(architecture=BERT, plain=True)
    model = scatter(get_peft_model(case.base(), case.config()), seed=0).eval()
    moments = Moments(rank=3)
    for number in range(4):
        scatter(model, seed=number)
        moments.add(trained_weights(model))
    posterior = SwagPosterior.from_moments(model, moments)
    inputs = BERT.inputs()
    paths = export_lora(posterior, tmp_path / "out", draws=2, seed=5)
    assert [path.name for path in paths] == ["mean", "draw_0", "draw_1"]
    sampler = posterior.sampler(draws=2, seed=5)
    assert isinstance(sampler, SubstitutedDraws)
    wanted = [{}, *sampler.weights]
    for path, weights in zip(paths, wanted, strict=True):
        found = PeftModel.from_pretrained(case.base(), path).eval()
        expected = Substituted(posterior.model, weights)(**inputs).logits
        assert torch.equal(found(**inputs).logits, expected)


def test_draws_of_a_linearised_model_are_not_weights(tmp_path: Path) -> None:
    case = Case(architecture=LLAMA, plain=True)
    model = scatter(get_peft_model(case.base(), case.config()), seed=0).eval()
    posterior = fit_laplace(model, Letters(), rows(3))
    with pytest.raises(ConfigError, match="'laplace' posterior, whose draws are not LoRA weights"):
        export_lora(posterior, tmp_path / "out", draws=2)
    assert [path.name for path in export_lora(posterior, tmp_path / "out", draws=0)] == ["mean"]
