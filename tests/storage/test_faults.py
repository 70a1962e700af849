"""A saved posterior that is wrong in any way is refused by name, and the base model is left as it was."""

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, seed
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM, PreTrainedModel

from bayestune.adapters import BayesLoraConfig
from bayestune.errors import PosteriorError
from bayestune.methods import load_posterior, save_posterior
from bayestune.storage.manifest import read_manifest
from bayestune.storage.state import describe
from models import BERT, LLAMA, QWEN2, blob
from storage.spoil import CONFIG, MANIFEST, TENSORS, edit_config, seal

KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("original") / "posterior"
    save_posterior(blob(), path)
    return path


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(original, tmp_path / "posterior"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / TENSORS)
    edit(tensors)
    save_file(tensors, folder / TENSORS)
    seal(folder, tensors=describe(tensors))


def state(base: PreTrainedModel) -> tuple[Any, ...]:
    digest = hashlib.sha256()
    for tensor in base.state_dict().values():
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    flags = [(name, p.requires_grad) for name, p in base.named_parameters()]
    modules = [(name, type(module), module.training) for name, module in base.named_modules()]
    return digest.hexdigest(), flags, modules, list(base._forward_pre_hooks)


def refused(folder: Path, words: str, base: PreTrainedModel | None = None) -> None:
    """Loading raises a `PosteriorError` that says `words` and where; the base is bit for bit what it was."""
    base = LLAMA.build() if base is None else base
    before = state(base)
    with pytest.raises(PosteriorError, match=words) as caught:
        load_posterior(base, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert state(base) == before


def test_the_unspoiled_copy_loads(folder: Path) -> None:
    seal(folder)
    load_posterior(LLAMA.build(), folder)


# P6: made for another base


def _nudged(name: str, amount: float) -> PreTrainedModel:
    base = LLAMA.build()
    with torch.no_grad():
        base.get_parameter(name).add_(amount)
    return base


@pytest.mark.property("P06")
@pytest.mark.parametrize(
    ("build", "words"),
    [
        (
            lambda: LLAMA.build(1),
            "16 of 21 parameters have other values.*Load the base model the posterior was trained",
        ),
        (
            lambda: _nudged("model.layers.1.mlp.down_proj.weight", 1e-6),
            "1 of 21 .*'model.layers.1.mlp.down_proj.weight'",
        ),
        (lambda: LLAMA.build(vocab_size=65), "found vocab_size=65, expected 64"),
        (lambda: LLAMA.build(rms_norm_eps=1e-3), "found rms_norm_eps=0.001, expected 1e-06"),
        (lambda: LLAMA.build(attention_bias=True), "found attention_bias=True, expected False"),
        (QWEN2.build, "found a Qwen2ForCausalLM, expected a LlamaForCausalLM"),
    ],
)
def test_another_base_is_refused(folder: Path, build: Callable[[], PreTrainedModel], words: str) -> None:
    refused(folder, words, build())


@pytest.mark.property("P06")
def test_a_new_head_is_no_other_base_but_another_encoder_is(tmp_path: Path) -> None:
    """The head that the posterior brings along is new in every base; what is not saved must be the same."""
    save_posterior(blob(BERT), tmp_path / "p")
    base, other = BERT.build(), BERT.build()
    with torch.no_grad():
        base.classifier.weight.add_(1)
        other.bert.pooler.dense.weight.add_(1e-3)
    loaded = load_posterior(base, tmp_path / "p")
    inputs = BERT.inputs()
    assert torch.equal(loaded(**inputs).logits, blob(BERT).eval()(**inputs).logits)
    refused(tmp_path / "p", "'bert.pooler.dense.weight'", other)


@pytest.mark.property("P06")
def test_a_head_trained_but_not_saved_is_found(tmp_path: Path) -> None:
    """Without modules_to_save a new random head comes with every load: the answers would be lost silently."""
    save_posterior(blob(BERT, task_type=None), tmp_path / "p")
    base = BERT.build()
    with torch.no_grad():
        base.classifier.weight.normal_(generator=torch.Generator().manual_seed(1))
    refused(tmp_path / "p", "'classifier.weight'", base)


# P6: files that are wrong


def _move_to_link(folder: Path) -> None:
    (folder / TENSORS).rename(folder.parent / "elsewhere")
    (folder / TENSORS).symlink_to(folder.parent / "elsewhere")


FILE_FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (shutil.rmtree, "is not a folder"),
    "no manifest": (lambda f: (f / MANIFEST).unlink(), "holds no bayestune_manifest.json.*PeftModel.from_pretrained"),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "adapter_model.safetensors is missing"),
    "another file": (lambda f: (f / "notes.txt").write_text(""), "notes.txt is not in the manifest"),
    "another folder": (lambda f: (f / "default").mkdir(), "default is not in the manifest"),
    "a link": (_move_to_link, "symbolic link"),
    "a linked card": (
        lambda f: ((f / "README.md").unlink(), (f / "README.md").symlink_to("/etc/hostname")),
        "symbolic link",
    ),
    "a folder as file": (lambda f: ((f / TENSORS).unlink(), (f / TENSORS).mkdir()), "not a regular file"),
    "config edited": (lambda f: edit_config(f, lora_alpha=9), "adapter_config.json has .* expected"),
    "newer format": (
        lambda f: (f / MANIFEST).write_text((f / MANIFEST).read_text().replace('"format": 1', '"format": 2')),
        "has format 2, expected 1: upgrade bayestune",
    ),
    "no format": (lambda f: (f / MANIFEST).write_text("{}"), "no format number"),
    "manifest not JSON": (lambda f: (f / MANIFEST).write_text("{"), "was cut or altered"),
    "manifest huge": (lambda f: (f / MANIFEST).write_bytes(b" " * (1 << 25)), "expected at most"),
    "sealed, another kind": (lambda f: seal(f, posterior="laplace"), "posterior of kind 'laplace'"),
    "sealed, a point": (lambda f: seal(f, posterior="point"), "parameterization"),
    "sealed, G is the std": (lambda f: seal(f, std="rho"), "std = rho, expected std = rho . rho"),
    "sealed, no base": (lambda f: seal(f, base=None), "base is missing or of the wrong type"),
    "sealed, bad weights": (
        lambda f: seal(f, base={"architecture": "x", "config": {}, "weights": {"a": "1"}}),
        "base.weights.a",
    ),
    "sealed, a file outside": (lambda f: seal(f, files={"../x": {"sha256": "", "bytes": 0}}), "lists files"),
    "sealed, bad tensors": (lambda f: seal(f, tensors={KEY: [[4, 32]]}), "tensors.base_model"),
}


@pytest.mark.property("P06")
@pytest.mark.parametrize("fault", FILE_FAULTS)
def test_a_wrong_file_is_refused(folder: Path, fault: str) -> None:
    spoil, words = FILE_FAULTS[fault]
    spoil(folder)
    refused(folder, words)


CONFIG_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"r": 2}, r"found shape \[4, 32\], expected \[2, 32\]"),
    ({"target_modules": ["q_proj"]}, "is not one that the base and the configuration ask for"),
    ({"target_modules": [*LLAMA.targets, "k_proj"]}, "k_proj.lora_A.rho' is missing"),
    ({"target_modules": ["no_such"]}, "does not fit the base model"),
    ({"target_modules": r"(unclosed"}, "does not fit the base model"),
    ({"modules_to_save": ["norm"]}, "norm.weight' is missing"),
    ({"task_type": "NO_SUCH"}, "Invalid task type"),
    ({"prior_std": -1.0}, "prior_std"),
    ({"peft_type": "LORA"}, "peft_type: found 'LORA', expected 'BAYES_LORA'"),
    ({"r": True}, "rank: found True"),
    ({"rank_pattern": {"q_proj": 10**400}}, "rank: found 1000"),
    ({"bias": "all"}, "bias: found 'all', expected 'none'"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights: found 'pissa'"),
    ({"later_setting": 1}, "later_setting: not a setting of BayesLoraConfig"),
]


@pytest.mark.property("P06")
@pytest.mark.parametrize(("changes", "words"), CONFIG_FAULTS, ids=lambda value: str(value)[:40])
def test_wrong_settings_under_a_right_hash_are_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    edit_config(folder, **changes)
    seal(folder)
    refused(folder, words)


@pytest.mark.property("P06")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"peft_type": "BAYES_LORA", "peft_type": "BAYES_LORA"}', "'peft_type' is given twice"),
        ("[]", "found a list, expected a JSON object"),
        ("{}", "peft_type: found None"),
    ],
    ids=["twice", "list", "empty"],
)
def test_a_file_without_settings_is_refused(folder: Path, text: str, words: str) -> None:
    (folder / CONFIG).write_text(text)
    seal(folder)
    refused(folder, words)


def _set(key: str, value: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[key] = value(tensors[key])

    return edit


def _element(value: float) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(value))


TENSOR_FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "rho missing": (lambda t: t.pop(f"{KEY}.rho"), f"tensor '{KEY}.rho' is missing"),
    "another tensor": (lambda t: t.update(extra=torch.ones(1)), "tensor 'extra' is not one that"),
    "transposed": (_set(f"{KEY}.weight", lambda t: t.T.contiguous()), r"found shape \[32, 4\], expected \[4, 32\]"),
    "bfloat16": (_set(f"{KEY}.rho", Tensor.bfloat16), "found bfloat16, expected float32"),
    "float16 everywhere": (lambda t: t.update({k: v.half() for k, v in t.items()}), "found float16, expected float32"),
    "NaN mean": (_set(f"{KEY}.weight", _element(torch.nan)), f"'{KEY}.weight' holds NaN or infinite"),
    "infinite B": (
        _set(f"{KEY.replace('lora_A', 'lora_B')}.weight", _element(-torch.inf)),
        "lora_B.weight' holds NaN or infinite",
    ),
    "zero rho": (_set(f"{KEY}.rho", _element(0.0)), f"'{KEY}.rho' holds zeros"),
}


@pytest.mark.property("P06")
@pytest.mark.parametrize("fault", TENSOR_FAULTS)
def test_wrong_tensors_under_a_right_hash_are_refused(folder: Path, fault: str) -> None:
    spoil, words = TENSOR_FAULTS[fault]
    edit_tensors(folder, spoil)
    refused(folder, words)


@pytest.mark.property("P06")
def test_tensors_unlike_the_manifest_are_refused(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors[f"{KEY}.rho"] = tensors[f"{KEY}.rho"][:2].clone()
    save_file(tensors, folder / TENSORS)
    seal(folder)
    refused(folder, r"found shape \[2, 32\], expected \[4, 32\]")


@pytest.mark.property("P06")
def test_a_key_given_twice_is_refused(folder: Path) -> None:
    data = (folder / TENSORS).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + size].decode()
    entry = json.dumps({f"{KEY}.rho": json.loads(header)[f"{KEY}.rho"]})[1:-1]
    header = header.rstrip()[:-1] + "," + entry + "}"
    header += " " * (-len(header) % 8)
    (folder / TENSORS).write_bytes(len(header).to_bytes(8, "little") + header.encode() + data[8 + size :])
    seal(folder)
    refused(folder, "is given twice")


@pytest.mark.property("P06")
@pytest.mark.parametrize("data", [b"", (1 << 40).to_bytes(8, "little") + b"{}", b"\x02" + b"\0" * 7 + b"[]"])
def test_a_file_that_is_not_safetensors_is_refused(folder: Path, data: bytes) -> None:
    (folder / TENSORS).write_bytes(data)
    seal(folder)
    refused(folder, "is not a safetensors file")


# P7: no posterior lost silently


@pytest.mark.property("P07")
def test_plain_lora_is_not_taken_for_a_posterior(tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    model.save_pretrained(tmp_path / "plain")
    refused(tmp_path / "plain", "save_posterior did not write it.*A plain LoRA adapter holds no posterior")


@pytest.mark.property("P07")
def test_a_posterior_is_not_loaded_as_plain_lora(folder: Path) -> None:
    """Not even with the type changed by hand, the manifest sealed again, and the kind changed with it."""
    edit_config(folder, peft_type="LORA")
    refused(folder, "adapter_config.json has")
    seal(folder)
    refused(folder, "peft_type: found 'LORA', expected 'BAYES_LORA'")
    seal(folder, posterior="point", std=None)
    refused(folder, "(prior_std|estimator|rho_init|distribution): not a setting of LoraConfig")
    values = json.loads((folder / CONFIG).read_text())
    plain = {
        name: value
        for name, value in values.items()
        if name not in ("prior_std", "rho_init", "estimator", "distribution")
    }
    (folder / CONFIG).write_text(json.dumps(plain))
    seal(folder)
    refused(folder, "lora_A.rho' is not one that the base and the configuration ask for")


# P8: tampering


@pytest.fixture
def tensors_read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows whenever a tensor file is parsed."""
    calls: list[int] = []
    load = safetensors.torch.load
    monkeypatch.setattr(safetensors.torch, "load", lambda data: (calls.append(len(data)), load(data))[1])
    return calls


@pytest.mark.property("P08")
def test_every_bit_flip_cut_and_addition_is_refused_before_a_tensor_is_read(
    folder: Path, tensors_read: list[int]
) -> None:
    base, chance = LLAMA.build(), random.Random(0)
    before = state(base)
    for name in (CONFIG, TENSORS, MANIFEST):
        data = (folder / name).read_bytes()
        lengths = (0, 1, 7, 8, len(data) - 1, *chance.sample(range(len(data)), 60))
        spoiled = [*(data[:length] for length in lengths), data + b"\0", data + b"\n", b" " + data, data + data]
        for bit in chance.sample(range(8 * len(data)), 200):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            spoiled.append(bytes(flipped))
        for content in spoiled:
            (folder / name).write_bytes(content)
            with pytest.raises(PosteriorError):
                load_posterior(base, folder)
        (folder / name).write_bytes(data)
    assert tensors_read == [] and state(base) == before
    load_posterior(base, folder)
    assert len(tensors_read) == 1


@pytest.mark.property("P08")
@pytest.mark.nightly
def test_three_thousand_bit_flips_and_all_cuts_of_the_small_files(
    folder: Path, tensors_read: list[int], nightly_seed: int, figure: Callable[..., None]
) -> None:
    base, chance, taken = LLAMA.build(), random.Random(nightly_seed), 0
    contents = {name: (folder / name).read_bytes() for name in (CONFIG, TENSORS, MANIFEST)}
    bits = [(name, bit) for name, data in contents.items() for bit in range(8 * len(data))]
    spoiled = []
    for name, bit in chance.sample(bits, 3000):
        flipped = bytearray(contents[name])
        flipped[bit // 8] ^= 1 << bit % 8
        spoiled.append((name, bytes(flipped)))
    spoiled += [
        (name, contents[name][:length]) for name in (CONFIG, MANIFEST) for length in range(len(contents[name]))
    ]
    lengths = chance.sample(range(len(contents[TENSORS])), 2000)
    spoiled += [(TENSORS, contents[TENSORS][:length]) for length in lengths]
    for name, data in spoiled:
        (folder / name).write_bytes(data)
        try:
            load_posterior(base, folder)
            taken += 1
        except PosteriorError:
            pass
        (folder / name).write_bytes(contents[name])
    assert tensors_read == []
    figure(f"bit flips and cuts of a posterior taken, of {len(spoiled)}", taken, at_most=0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.property("P08")
@pytest.mark.nightly
@pytest.mark.parametrize("file", [CONFIG, TENSORS, MANIFEST, "tensors' header"])
def test_whatever_a_file_holds_under_right_sums_no_other_error_comes(
    original: Path, tmp_path: Path, nightly_seed: int, file: str
) -> None:
    manifest, settings = read_manifest(original), json.loads((original / CONFIG).read_text())
    header = (original / TENSORS).read_bytes()
    names = {CONFIG: sorted(settings), MANIFEST: sorted(set(manifest) - {"format", "files"})}.get(file, [""])

    @seed(nightly_seed)
    @hypothesis_settings(max_examples=100, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(name=st.sampled_from(names), value=JSON, data=st.binary())
    def fuzz(name: str, value: Any, data: bytes) -> None:
        folder = Path(shutil.copytree(original, tmp_path / "p", dirs_exist_ok=True))
        if file == CONFIG:
            edit_config(folder, **{name: value})
        elif file == TENSORS:
            (folder / TENSORS).write_bytes(data)
        elif file != MANIFEST:
            text = json.dumps(value).encode()
            (folder / TENSORS).write_bytes(len(text).to_bytes(8, "little") + text + header[-64:])
        seal(folder, **({name: value} if file == MANIFEST else {}))
        base = LLAMA.build()
        before = state(base)
        try:
            load_posterior(base, folder)
        except PosteriorError:
            assert state(base) == before

    fuzz()


# P9: no pickle

AUDITED: list[tuple[str, str]] = []


class Listener:
    """An audit hook, which Python cannot remove again: it is added once, and listens when it is told to."""

    added = False
    listening = False

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.listening and (event == "open" or event.startswith("pickle.")):
            AUDITED.append((event, str(args[0])))


LISTENER = Listener()


@pytest.fixture
def audited() -> Any:
    """Files opened and classes unpickled inside the test."""
    if not LISTENER.added:
        sys.addaudithook(LISTENER)
        LISTENER.added = True
    AUDITED.clear()
    LISTENER.listening = True
    yield AUDITED
    LISTENER.listening = False


class Canary:
    """A pickle that leaves a file where it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.property("P09")
@pytest.mark.parametrize("alone", [True, False], ids=["no safetensors", "beside safetensors"])
def test_a_pickle_in_the_folder_is_never_opened(folder: Path, audited: list[tuple[str, str]], alone: bool) -> None:
    canary = folder.parent / "canary"
    for name in ("adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
        torch.save(Canary(canary), folder / name)
        if alone:
            (folder / TENSORS).unlink(missing_ok=True)
        audited.clear()
        refused(folder, f"{name} is not in the manifest")
        assert [event for event in audited if event[1].startswith(str(folder))] == [("open", str(folder / MANIFEST))]
        assert not any(event.startswith("pickle") for event, _ in audited)
        (folder / name).unlink()
    assert not canary.exists()


@pytest.mark.property("P09")
def test_loading_opens_the_three_files_and_unpickles_nothing(folder: Path, audited: list[tuple[str, str]]) -> None:
    load_posterior(LLAMA.build(), folder)
    opened = [Path(path).name for event, path in audited if event == "open" and path.startswith(str(folder))]
    assert sorted(opened) == [CONFIG, TENSORS, MANIFEST]
    assert not any(event.startswith("pickle") for event, _ in audited)
    torch.save(Canary(folder.parent / "canary"), folder.parent / "seen.bin")
    torch.load(folder.parent / "seen.bin", weights_only=False)  # the listener is awake
    assert (folder.parent / "canary").exists() and any(event.startswith("pickle") for event, _ in audited)


@pytest.mark.property("P09")
def test_a_saved_posterior_holds_json_and_safetensors_only(original: Path) -> None:
    assert sorted(entry.name for entry in original.iterdir()) == ["README.md", CONFIG, TENSORS, MANIFEST]
    json.loads((original / CONFIG).read_text()), json.loads((original / MANIFEST).read_text())
    load_file(original / TENSORS)


@pytest.mark.property("P06")
def test_same_weights_in_another_function_are_refused(tmp_path: Path) -> None:
    """A logit scale is no weight, and yet another model."""
    scaled = [GraniteConfig(**_GRANITE, logits_scaling=scale) for scale in (1.0, 16.0)]
    bases = []
    for config in scaled:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            bases.append(GraniteForCausalLM(config))
    save_posterior(get_peft_model(bases[0], BayesLoraConfig(target_modules=["q_proj"])), tmp_path / "posterior")
    with pytest.raises(PosteriorError, match="logits_scaling=16.0, expected 1.0"):
        load_posterior(bases[1], tmp_path / "posterior")


_GRANITE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


@pytest.mark.property("P07")
def test_the_folder_of_a_run_leads_to_its_posterior(tmp_path: Path) -> None:
    (tmp_path / "posterior").mkdir()
    (tmp_path / "posterior" / "bayestune_manifest.json").write_text("{}")
    with pytest.raises(PosteriorError, match="folder of a run, expected that of its posterior"):
        read_manifest(tmp_path)
