"""What cannot be right is refused, by name, in one line, and leaves the model as it was."""

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.config import ArrowConfig, BdLoraConfig, KasaConfig, MontecloraConfig, VeloraConfig
from torch import Tensor, nn

from bayestune.adapters import BayesLoraConfig, GaussianLinear, gaussian_layers
from bayestune.adapters.config import _REFUSED
from bayestune.errors import ConfigError
from models import LLAMA, adapter_state, assert_same, blob, logits

REFUSED = {
    "use_dora": True,
    "target_parameters": ["experts.gate_up_proj"],
    "ensure_weight_tying": True,
    "velora_config": VeloraConfig(),
    "alora_invocation_tokens": [1, 2],
    "use_qalora": True,
    "monteclora_config": MontecloraConfig(),
    "use_bdlora": BdLoraConfig(nblocks=2),
    "arrow_config": ArrowConfig(),
    "kasa_config": KasaConfig(),
    "megatron_config": {"a": 1},
}
INITS = ("eva", "pissa", "loftq", "orthogonal_", 2)


@pytest.fixture(autouse=True)
def as_users_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Users have no run-time check of annotations: the refusal must be the library's own."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def refused(make: Callable[[], object], *words: str) -> None:
    """`make` raises ConfigError with one line that has all the words."""
    with pytest.raises(ConfigError) as caught:
        make()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 300
    for word in words:
        assert word in message


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported:UserWarning")
def test_an_option_that_cannot_be_right() -> None:
    for option, reason in _REFUSED.items():
        refused(lambda: BayesLoraConfig(**{option: REFUSED[option]}), option, "Leave it out", reason)  # noqa: B023
        LoraConfig(**{option: REFUSED[option], "task_type": "CAUSAL_LM"})  # PEFT itself accepts it


@pytest.mark.filterwarnings("ignore:.init_lora_weights. is:UserWarning")
@pytest.mark.parametrize("init", INITS)
def test_an_initialisation_that_changes_the_base_or_the_mean(init: Any) -> None:
    settings = {"loftq_config": {"loftq_bits": 4}} if init == "loftq" else {}
    refused(lambda: BayesLoraConfig(init_lora_weights=init, **settings), "init_lora_weights", repr(init))


@pytest.mark.filterwarnings("ignore:.eva_config. specified:UserWarning")
@pytest.mark.parametrize("init", [False, "gaussian", "orthogonal"])
def test_an_initialisation_of_the_mean_alone_is_taken(init: Any) -> None:
    base = LLAMA.build()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LLAMA.config(init_lora_weights=init, eva_config=EvaConfig()))
    assert all(isinstance(layer, GaussianLinear) for layer in gaussian_layers(model).values())
    assert_same(before, dict(model.unload().state_dict()))


@pytest.mark.parametrize("name", ["prior_std", "rho_init"])
@pytest.mark.parametrize("value", [0, float("nan"), float("inf"), True, "0.2"], ids=repr)
def test_a_scale_that_is_no_number_above_0(name: str, value: Any) -> None:
    refused(lambda: BayesLoraConfig(**{name: value}), name, repr(value), "a number above 0")


@pytest.mark.parametrize("value", ["Flipout", None, ["flipout"]], ids=repr)
def test_an_unknown_estimator_or_distribution(value: Any) -> None:
    known = "'independent', 'flipout', 'flipout_token'"
    refused(lambda: BayesLoraConfig(estimator=value), "estimator", repr(value), known)
    refused(lambda: BayesLoraConfig(distribution=value), "distribution", repr(value), "'gaussian_ab', 'dropout'")


class Mixed(nn.Module):
    """Layers of every kind that PEFT adapts, in an order in which a linear one comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.embedding = nn.Embedding(5, 4)
        self.conv1d = nn.Conv1d(4, 4, 1)
        self.conv2d = nn.Conv2d(4, 4, 1)
        self.conv3d = nn.Conv3d(4, 4, 1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        x = self.conv1d(x.transpose(1, 2)).transpose(1, 2)
        return self.attention(x, x, x)[0]


KINDS = [
    ("embedding", "Embedding"),
    ("conv2d", "Conv2d"),
    ("attention", "MultiheadAttention"),
    ("out_proj", "NonDynamicallyQuantizableLinear"),
]


@pytest.mark.parametrize(("target", "kind"), KINDS)
def test_a_target_that_is_not_linear(target: str, kind: str) -> None:
    for targets in (["linear", target], rf"linear|(.*\.)?{target}"):
        base, config = Mixed(), BayesLoraConfig(target_modules=targets)
        refused(lambda: get_peft_model(base, config), target, kind, "target_modules")  # noqa: B023
        assert not any(isinstance(module, LoraLayer) for module in base.modules())


def adding(model: PeftModel, **settings: Any) -> Callable[[], None]:
    return lambda: model.add_adapter("second", LLAMA.config(**settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"estimator": "flipout"}, ("estimator='flipout'", "'independent'")),
        ({"target_modules": ["q_proj", "embed_tokens"]}, ("model.embed_tokens", "Embedding")),
    ],
    ids=["estimator", "embedding"],
)
def test_a_refused_adapter_leaves_the_model_as_it_was(settings: dict[str, Any], words: tuple[str, ...]) -> None:
    inputs = LLAMA.inputs()
    model = blob(LLAMA).eval()
    before, state, tree = logits(model, inputs), adapter_state(model), str(model)
    refused(adding(model, **settings), *words)
    assert set(model.peft_config) == {"default"} and str(model) == tree
    assert_same(adapter_state(model), state)
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=0)
    model.train()(**inputs).logits.sum().backward()
    model.add_adapter("second", LLAMA.config())  # the name is free, and a right one is taken
    model.set_adapter("second")
    assert len(gaussian_layers(model)) == LLAMA.layers


def test_an_estimator_is_free_again_when_the_last_adapter_is_gone() -> None:
    model = blob(LLAMA)
    model.delete_adapter("default")
    model.add_adapter("second", LLAMA.config(estimator="flipout"))
    model.set_adapter("second")
    model.train()(**LLAMA.inputs()).logits.sum().backward()
    refused(lambda: model.add_adapter("third", LLAMA.config()), "estimator")


def test_a_weighted_sum_of_adapters() -> None:
    model = blob(LLAMA)
    model.add_adapter("second", LLAMA.config())
    refused(
        lambda: model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "sum", combination_type="svd"),
        "add_weighted_adapter",
        "export_lora",
    )
    assert set(model.peft_config) == {"default", "second"}


def test_plain_and_gaussian_adapters_do_not_mix() -> None:
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        blob(LLAMA).add_adapter("plain", LoraConfig(r=2, target_modules=["q_proj"]))
    plain = get_peft_model(LLAMA.build(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        plain.add_adapter("gaussian", LLAMA.config())
