"""Everything a PEFT user does with an adapter works on five architectures, with the numbers it should have."""

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from bayestune.adapters import (
    BayesLoraConfig,
    BayesLoraModel,
    GaussianLinear,
    TrainingNoise,
    gaussian_layers,
    training_noise,
)
from bayestune.errors import ConfigError
from bayestune.inference.draws import draw
from models import ARCHITECTURES, BERT, LLAMA, T5, Architecture, adapter_state, assert_same, blob, logits, scatter

EVERY = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
EACH_TASK = pytest.mark.parametrize("architecture", [LLAMA, BERT, T5], ids=lambda a: a.name)
AUTO = {
    "CAUSAL_LM": AutoPeftModelForCausalLM,
    "SEQ_CLS": AutoPeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": AutoPeftModelForSeq2SeqLM,
}


def plain_lora(model: PeftModel, base: nn.Module) -> PeftModel:
    """PEFT's own LoRA with the same settings, A = M and the same B: what the mean must equal."""
    settings = model.peft_config["default"].to_dict()
    for name in ("peft_type", "prior_std", "rho_init", "estimator", "distribution", "peft_version", "inference_mode"):
        settings.pop(name)
    plain = get_peft_model(base, LoraConfig(**settings))
    result = plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith(".rho")})
    assert not result.missing_keys and not result.unexpected_keys
    return plain.eval()


def clocks(model: nn.Module) -> int:
    return sum(isinstance(hook, TrainingNoise) for m in model.modules() for hook in m._forward_pre_hooks.values())


def assert_every_layer_is_gaussian(model: nn.Module, count: int, adapter: str = "default") -> None:
    wrapped = [module for module in model.modules() if isinstance(module, LoraLayer) and adapter in module.lora_A]
    assert len(wrapped) == count
    assert all(isinstance(module.lora_A[adapter], GaussianLinear) for module in wrapped)


@EVERY
def test_the_mean_is_plain_lora(architecture: Architecture) -> None:
    model = blob(architecture).eval()
    inputs = architecture.inputs()
    assert isinstance(model.base_model, BayesLoraModel)
    assert_every_layer_is_gaussian(model, architecture.layers)
    expected = logits(plain_lora(model, architecture.build()), inputs)
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    assert not torch.allclose(expected, logits(architecture.build().eval(), inputs), atol=1e-3)


@pytest.mark.property("P01")
@pytest.mark.parametrize(
    "how", [{"adapter_name": "other", "is_trainable": True}, {"low_cpu_mem_usage": True}], ids=["named", "low_memory"]
)
@EACH_TASK
def test_saved_and_loaded(architecture: Architecture, how: dict[str, Any], tmp_path: Path) -> None:
    model = blob(architecture, prior_std=0.3, estimator="flipout").eval()
    model.save_pretrained(tmp_path)

    config = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, BayesLoraConfig)
    assert (config.prior_std, config.rho_init, config.estimator) == (0.3, 0.4, "flipout")

    loaded = PeftModel.from_pretrained(architecture.build(), tmp_path, **how).eval()
    name = how.get("adapter_name", "default")
    assert_same(adapter_state(loaded, name), adapter_state(model))
    assert len(adapter_state(loaded, name)) == 3 * architecture.layers
    torch.testing.assert_close(
        logits(loaded, architecture.inputs()), logits(model, architecture.inputs()), rtol=0, atol=0
    )
    assert all(layer.prior_std == 0.3 for layer in gaussian_layers(loaded).values())
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    trainable = how.get("is_trainable", False)
    for layer in gaussian_layers(loaded).values():
        assert layer.weight.requires_grad is layer.rho.requires_grad is trainable
    with draw(model, index=2):
        expected = logits(model, architecture.inputs())
    with draw(loaded, index=2):
        torch.testing.assert_close(logits(loaded, architecture.inputs()), expected, rtol=0, atol=0)


@pytest.mark.property("P01")
@EACH_TASK
def test_the_file_holds_the_posterior_and_nothing_else(architecture: Architecture, tmp_path: Path) -> None:
    model = blob(architecture)
    model.save_pretrained(tmp_path)
    expected = {
        f"base_model.model.{name}.{part}"
        for name in gaussian_layers(model)
        for part in ("lora_A.weight", "lora_A.rho", "lora_B.weight")
    }
    if architecture is BERT:  # PEFT trains and keeps a fresh classification head by itself
        expected |= {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert set(file.keys()) == expected
        assert {file.get_tensor(key).dtype for key in expected} == {torch.float32}


@EACH_TASK
def test_auto_classes(architecture: Architecture, tmp_path: Path) -> None:
    architecture.build().save_pretrained(tmp_path / "base")
    base = architecture.build().from_pretrained(tmp_path / "base")
    model = get_peft_model(base, architecture.config())
    scatter(model)
    model.eval().save_pretrained(tmp_path / "posterior")
    loaded = AUTO[architecture.task_type].from_pretrained(tmp_path / "posterior")
    assert_same(adapter_state(loaded), adapter_state(model))
    torch.testing.assert_close(
        logits(loaded, architecture.inputs()), logits(model, architecture.inputs()), rtol=0, atol=0
    )


@EACH_TASK
def test_the_adapter_methods_of_transformers(architecture: Architecture, tmp_path: Path) -> None:
    inputs = architecture.inputs()
    model = blob(architecture).eval()
    model.save_pretrained(tmp_path)
    expected = logits(model, inputs)

    loaded = architecture.build().eval()
    base = logits(loaded, inputs)
    loaded.load_adapter(tmp_path)
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        loaded.load_adapter(tmp_path, adapter_name="second")
    assert clocks(loaded) == 1
    assert_every_layer_is_gaussian(loaded, architecture.layers)
    for name in ("default", "second"):
        loaded.set_adapter(name)
        assert_same(adapter_state(loaded, name), adapter_state(model))
        torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    loaded.set_adapter("default")
    loaded.delete_adapter("second")
    assert set(loaded.peft_config) == {"default"}
    assert not any(".second." in name for name in loaded.state_dict())
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    loaded.disable_adapters()
    torch.testing.assert_close(logits(loaded, inputs), base, rtol=0, atol=0)


@EACH_TASK
def test_adding_setting_disabling_and_deleting(architecture: Architecture, tmp_path: Path) -> None:
    inputs = architecture.inputs()
    base = logits(architecture.build().eval(), inputs)
    model = blob(architecture).eval()
    first = logits(model, inputs)
    model.add_adapter("second", architecture.config(r=2))
    scatter(model, seed=1, adapter="second")
    assert_every_layer_is_gaussian(model, architecture.layers, "second")
    torch.testing.assert_close(logits(model, inputs), first, rtol=0, atol=0)

    model.set_adapter("second")
    second = logits(model, inputs)
    model.save_pretrained(tmp_path, selected_adapters=["second"])
    alone = PeftModel.from_pretrained(architecture.build(), tmp_path / "second")
    torch.testing.assert_close(logits(alone, inputs), second, rtol=0, atol=0)
    assert not torch.allclose(first, second, atol=1e-3)
    for active, layers in ((False, gaussian_layers(model, ["default"])), (True, gaussian_layers(model, ["second"]))):
        assert len(layers) == architecture.layers
        assert all(p.requires_grad is active for layer in layers.values() for p in (layer.weight, layer.rho))

    with model.disable_adapter():
        torch.testing.assert_close(logits(model, inputs), base, rtol=0, atol=0)
        with draw(model):
            torch.testing.assert_close(logits(model, inputs), base, rtol=0, atol=0)
    torch.testing.assert_close(logits(model, inputs), second, rtol=0, atol=0)

    model.set_adapter("default")
    model.delete_adapter("second")
    assert not any(".second." in name for name in model.state_dict())
    torch.testing.assert_close(logits(model, inputs), first, rtol=0, atol=0)
    assert clocks(model) == 1


@EACH_TASK
def test_several_adapters_active_at_once(architecture: Architecture) -> None:
    inputs = architecture.inputs()
    model = blob(architecture, task_type=None)  # a task would add a trained head, of which only one can be active
    model.add_adapter("second", architecture.config(task_type=None, r=2))
    scatter(model, seed=1, adapter="second")
    model.base_model.set_adapter(["default", "second"])
    layers = gaussian_layers(model)
    assert len(layers) == 2 * architecture.layers
    names = [name for name in layers if name.endswith("#1")]
    assert [name.removesuffix("#1") for name in names] == [name for name in layers if "#" not in name]

    model(**inputs).logits.square().sum().backward()
    assert all(layer.rho.grad is not None and layer.rho.grad.abs().max() > 0 for layer in layers.values())
    model.eval()
    mean = logits(model, inputs)
    with draw(model):
        assert not torch.allclose(logits(model, inputs), mean, atol=1e-3)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, inputs), mean, rtol=1e-4, atol=1e-5)


def test_adapters_with_a_part_of_the_layers_each() -> None:
    model = blob(LLAMA)
    model.add_adapter("second", LLAMA.config(target_modules=["v_proj", "o_proj"]))
    scatter(model, seed=1, adapter="second")
    model.base_model.set_adapter(["default", "second"])
    part = {name.rsplit(".", 1)[1] for name in gaussian_layers(model)}
    assert part == {"q_proj", "v_proj", "v_proj#1", "o_proj#1"}
    model(**LLAMA.inputs()).logits.sum().backward()


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer:UserWarning")
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"rank_pattern": {}, "alpha_pattern": {}},
        {"lora_dropout": 0.5},
        {"lora_bias": True},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options_of_lora(settings: dict[str, Any], tmp_path: Path) -> None:
    if "rank_pattern" in settings:
        first, last = LLAMA.targets[0], LLAMA.targets[-1]
        settings = {"rank_pattern": {first: 2}, "alpha_pattern": {last: 3}}
    inputs = LLAMA.inputs()
    model = blob(LLAMA, **settings)
    model(**inputs).logits.sum().backward()
    model.eval()
    expected = logits(model, inputs)
    torch.testing.assert_close(expected, logits(plain_lora(model, LLAMA.build()), inputs), rtol=0, atol=0)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), expected, rtol=0, atol=0)
    assert_same(adapter_state(loaded), adapter_state(model))


def test_rank_and_scale_of_each_layer() -> None:
    model = blob(LLAMA, use_rslora=True, rank_pattern={"v_proj": 9}, alpha_pattern={"q_proj": 3})
    for name, layer in gaussian_layers(model).items():
        rank, alpha = (4, 3) if name.endswith("q_proj") else (9, 8)
        assert layer.weight.shape == layer.rho.shape == (rank, 32)
        assert model.get_submodule(f"base_model.model.{name}").scaling["default"] == alpha / rank**0.5


def test_layers_to_transform(tmp_path: Path) -> None:
    model = blob(LLAMA, layers_to_transform=[1]).eval()
    assert {name.split(".")[2] for name in gaussian_layers(model)} == {"1"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    assert_same(adapter_state(loaded), adapter_state(model))


def test_modules_to_save(tmp_path: Path) -> None:
    model = blob(LLAMA, modules_to_save=["lm_head"]).eval()
    inputs = LLAMA.inputs()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 3 * LLAMA.layers + 1
        head = file.get_tensor("base_model.model.lm_head.weight")
    assert not torch.equal(head, LLAMA.build().lm_head.weight)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs), rtol=0, atol=0)


def test_the_head_as_a_target(tmp_path: Path) -> None:
    model = blob(LLAMA, target_modules=["q_proj", "lm_head"]).eval()
    assert "lm_head" in gaussian_layers(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(LLAMA.build(), tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert len(file.keys()) == 3 * 3
    assert_same(adapter_state(loaded), adapter_state(model))
    torch.testing.assert_close(logits(loaded, LLAMA.inputs()), logits(model, LLAMA.inputs()), rtol=0, atol=0)


def test_a_tied_head_alone_as_a_target() -> None:
    base = LLAMA.build(tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tie_word_embeddings"):
        model = scatter(get_peft_model(base, LLAMA.config(target_modules=["lm_head"])))
    model.train()(**LLAMA.inputs()).logits.sum().backward()
    assert gaussian_layers(model)["lm_head"].rho.grad.abs().max() > 0
    with model.eval().disable_adapter():
        expected = logits(LLAMA.build(tie_word_embeddings=True).eval(), LLAMA.inputs())
        torch.testing.assert_close(logits(model, LLAMA.inputs()), expected, rtol=0, atol=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):  # either would move the embeddings too
        with pytest.raises(ConfigError, match="lm_head is adapted and its weight is tied .* would change both"):
            merge()
    assert_same(dict(model.state_dict()), before)


@pytest.mark.property("P13")
@EVERY
def test_merging_is_the_mean_and_unmerging_restores(architecture: Architecture) -> None:
    inputs = architecture.inputs()
    model = blob(architecture).eval()
    mean = logits(model, inputs)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".base_layer.weight" in name}
    assert len(before) == architecture.layers

    model.merge_adapter()
    torch.testing.assert_close(logits(model, inputs), mean, rtol=1e-4, atol=1e-5)
    merged = {name: p.detach().clone() for name, p in model.named_parameters() if name in before}
    model.unmerge_adapter()
    for name, parameter in model.named_parameters():
        if name in before:  # adding and subtracting the same number rounds twice, each time at the larger magnitude
            ulp = torch.finfo(torch.float32).eps * torch.maximum(before[name].abs(), merged[name].abs())
            assert ((parameter - before[name]).abs() <= ulp).all()
            assert not torch.equal(merged[name], before[name])
    torch.testing.assert_close(logits(model, inputs), mean, rtol=1e-4, atol=1e-5)

    alone = model.merge_and_unload()
    assert not any(isinstance(module, LoraLayer) for module in alone.modules())
    torch.testing.assert_close(logits(alone, inputs), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.property("P13")
@EVERY
def test_unloading_gives_the_base_back(architecture: Architecture) -> None:
    model = blob(architecture)
    model(**architecture.inputs()).logits.sum().backward()
    base = model.unload()
    fresh = architecture.build()
    if architecture is BERT:  # PEFT trained this head, and hands it over
        base.classifier = fresh.classifier
    assert_same(dict(base.state_dict()), dict(fresh.state_dict()))
    inputs = architecture.inputs()
    torch.testing.assert_close(logits(base.train(), inputs), logits(fresh.train(), inputs), rtol=0, atol=0)


def test_a_base_can_be_adapted_again_with_another_estimator() -> None:
    base = blob(LLAMA, estimator="flipout").unload()
    model = get_peft_model(base, LLAMA.config(estimator="independent"))
    assert training_noise(model).estimator == "independent"
    assert clocks(model) == 1


def test_the_mode_of_new_layers_is_that_of_the_model() -> None:
    inputs = LLAMA.inputs()
    base = LLAMA.build().eval()
    expected = logits(base, inputs)
    model = get_peft_model(base, LLAMA.config())
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    model.add_adapter("second", LLAMA.config())
    model.set_adapter("second")
    torch.testing.assert_close(logits(model, inputs), expected, rtol=0, atol=0)
    model.train().add_adapter("third", LLAMA.config())
    model.set_adapter("third")
    assert all(layer.training for layer in gaussian_layers(model).values())
    logits(model, inputs)


def test_a_forward_without_adapters_takes_no_noise() -> None:
    model = blob(LLAMA)
    logits(model, LLAMA.inputs())
    before = {name: layer.noise for name, layer in gaussian_layers(model).items()}
    with model.disable_adapter():
        logits(model, LLAMA.inputs())
    assert training_noise(model).micro == 1
    assert all(layer.noise is before[name] for name, layer in gaussian_layers(model).items())


@pytest.mark.property("K04")
def test_the_start_of_the_mean_is_that_of_plain_lora() -> None:
    torch.manual_seed(5)
    plain = get_peft_model(LLAMA.build(), LoraConfig(r=4, target_modules=["q_proj"]))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    model = get_peft_model(LLAMA.build(), BayesLoraConfig(r=4, target_modules=["q_proj"]))
    assert torch.equal(torch.get_rng_state(), after)
    assert_same({k: v for k, v in model.state_dict().items() if not k.endswith("rho")}, dict(plain.state_dict()))


@pytest.mark.property("K06")
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_whole_and_apart(clone: Any) -> None:
    inputs = LLAMA.inputs()
    model = blob(LLAMA)
    training_noise(model).seed = 3
    logits(model, inputs)
    twin = clone(model)
    assert_same(adapter_state(twin), adapter_state(model))
    assert clocks(twin) == 1 and training_noise(twin) is not training_noise(model)
    assert (training_noise(twin).seed, training_noise(twin).micro) == (3, 1)
    torch.testing.assert_close(logits(twin, inputs), logits(model, inputs), rtol=0, atol=0)
    model.eval(), twin.eval()
    with draw(model), draw(twin):
        before = logits(model, inputs)
        torch.testing.assert_close(logits(twin, inputs), before, rtol=0, atol=0)
    scatter(twin, seed=9)
    with draw(model), draw(twin):
        torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=0)
        assert not torch.allclose(logits(twin, inputs), before, atol=1e-3)


def test_the_model_card_says_what_to_import(tmp_path: Path) -> None:
    model = blob(LLAMA)
    model.add_adapter("second", LLAMA.config())
    for _ in range(2):
        model.save_pretrained(tmp_path)
        for card in (tmp_path / "README.md", tmp_path / "second" / "README.md"):
            text = card.read_text(encoding="utf-8")
            assert text.count("import bayestune") == 1
            assert text.count("KeyError: 'BAYES_LORA'") == 1
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---") and "## Model Details" in card  # beside what PEFT writes
