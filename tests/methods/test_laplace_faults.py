"""What a Laplace fit refuses, the memory it asks for, and the round trip of its settings and tensors."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from bayestune.errors import ConfigError, DataError, PosteriorError
from bayestune.inference import predict
from bayestune.methods import LaplacePosterior, fit_laplace
from bayestune.methods.laplace import linears as linears_module
from bayestune.tasks import Row
from inference.cases import Letters, rows
from methods.laplace_cases import Labels, bert_with_head, covered, plain
from models import LLAMA, blob, llama, scatter


def disabled() -> PeftModel:
    model = plain()
    model.base_model.disable_adapter_layers()
    return model


def lora(**settings: Any) -> PeftModel:
    config = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **settings}
    return scatter(get_peft_model(llama(), LoraConfig(**config))).eval()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: blob(LLAMA), "is a posterior already"),
        (disabled, "is disabled"),
        (lambda: lora(use_dora=True), "an adapter variant (such as DoRA)"),
        (lambda: lora(target_modules=["embed_tokens"]), "found lora_A of a Embedding"),
    ],
    ids=["blob", "disabled", "dora", "embedding"],
)
def test_an_adapter_that_cannot_be_covered_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        fit_laplace(make(), Letters(), rows(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": "first"}, "layers: found 'first'"),
        ({"precision": "evidence"}, "precision: found 'evidence'"),
        ({"precision": float("inf")}, "precision: found inf"),
        ({"predictive": "bridge"}, "predictive: found 'bridge'"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"precision": "validation"}, "validation_rows: found none with precision='validation'"),
    ],
)
def test_a_setting_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        fit_laplace(plain(r=2), Letters(), rows(3), **settings)


def test_missing_rows_and_labels_are_refused() -> None:
    unlabelled = [Row(id="u", question="why", choices=("a", "b"), answer=None)]
    for arguments in ({"rows": []}, {"rows": rows(2), "precision": "validation", "validation_rows": []}):
        with pytest.raises(DataError, match="found no rows"):
            fit_laplace(plain(r=2), Letters(), **arguments)
    with pytest.raises(DataError, match="'u' has no label"):
        fit_laplace(plain(r=2), Letters(), rows(2), precision="validation", validation_rows=unlabelled)


def test_an_adapter_without_finite_logits_is_refused_by_the_name_of_a_row() -> None:
    model = plain(r=2)
    with torch.no_grad():
        list(covered(model).values())[-1].weight.fill_(torch.nan)
    with pytest.raises(PosteriorError, match="the logits of row 'r0' are not finite"):
        fit_laplace(model, Letters(), rows(1))


def test_an_adapter_that_rows_say_nothing_about_is_refused() -> None:
    model = plain(r=2)
    with torch.no_grad():
        for name, linear in covered(model).items():
            linear.weight.mul_(0.0 if name.endswith("_A") else 1.0)
            if name.endswith("_B"):
                linear.weight.zero_()
    with pytest.raises(ConfigError, match="no curvature or no weights"):
        fit_laplace(model, Letters(), rows(2))


def test_factors_that_do_not_fit_are_refused_before_anything_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """q and v of two Llama layers, 32 inputs, 32 and 16 outputs, rank 2, float64; four more of the largest."""
    model, task = plain(r=2).train(), Letters()
    pairs = 2 * (32**2 + 2**2 + 2**2 + 32**2) + 2 * (32**2 + 2**2 + 2**2 + 16**2)
    needed = 8 * (pairs + 4 * 32**2)
    monkeypatch.setattr(linears_module, "free_bytes", lambda device: needed - 1)
    message = f"need {needed:,} bytes on cpu, found {needed - 1:,} bytes free"
    with pytest.raises(ConfigError, match=re.escape(message)):
        fit_laplace(model, task, rows(3))
    fit_laplace(plain(r=2, dtype=torch.bfloat16), task, rows(3))  # factors in float32 take half as much
    with pytest.raises(ConfigError, match=f"{8 * (32**2 + 3**2 + 4 * 32**2):,} bytes on cpu, found 9 "):
        monkeypatch.setattr(linears_module, "free_bytes", lambda device: 9)
        fit_laplace(bert_with_head(), task, rows(3), layers="last")
    assert model.training


def test_the_advice_is_what_makes_the_factors_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapted lm_head has as many outputs as the vocabulary has tokens, and is the last layer too."""
    head = plain(r=2, target_modules=["v_proj", "lm_head"])
    monkeypatch.setattr(linears_module, "free_bytes", lambda device: 8 * (5 * 32**2 + 16**2 + 8))
    for layers in ("all", "last"):
        with pytest.raises(
            ConfigError, match="largest is of 'lm_head', 64 wide: leave it out of target_modules"
        ) as caught:
            fit_laplace(head, Letters(), rows(3), layers=layers)
        assert "use layers=" not in str(caught.value)
    with pytest.raises(ConfigError, match="q_proj', 32 wide: use layers='last', or leave it out of target_modules"):
        fit_laplace(plain(r=2), Letters(), rows(3))
    fit_laplace(plain(r=2), Letters(), rows(3), layers="last")
    monkeypatch.setattr(linears_module, "free_bytes", lambda device: 9)
    with pytest.raises(ConfigError, match="'classifier', 32 wide: leave it out of modules_to_save"):
        fit_laplace(bert_with_head(), Labels(), rows(3), layers="last")


def test_free_memory_is_a_number_of_bytes() -> None:
    assert 2**20 < linears_module.free_bytes(torch.device("cpu")) < 2**50


def test_settings_and_tensors_give_the_posterior_back() -> None:
    posterior = fit_laplace(plain(r=2, dtype=torch.float32), Letters(), rows(5), layers="last", predictive="probit")
    settings = json.loads(json.dumps(posterior.settings()))
    tensors = safetensors.torch.load(safetensors.torch.save(posterior.tensors()))
    loaded = LaplacePosterior.from_saved(plain(r=2, dtype=torch.float32), settings, tensors, ())
    assert loaded.settings() == posterior.settings() == settings
    assert settings["rows"] == 5
    expected, found = (predict(p, Letters(), rows(5), draws=4).draw_log_probs for p in (posterior, loaded))
    assert torch.equal(found, expected)


def saved() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    posterior = fit_laplace(plain(r=2), Letters(), rows(3), layers="last", precision=1.0)
    return posterior.settings(), posterior.tensors()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": "all"}, "found the layers"),
        ({"precision": -1.0}, "precision: found -1.0, expected a number above 0"),
        ({"rows": True}, "rows: found True"),
        ({"names": ["x"]}, "found the layers ['x']"),
        ({"extra": 1}, "unknown setting 'extra'"),
    ],
)
def test_altered_settings_are_refused(change: dict[str, Any], message: str) -> None:
    settings, tensors = saved()
    with pytest.raises(PosteriorError, match=re.escape(message)):
        LaplacePosterior.from_saved(plain(r=2), {**settings, **change}, tensors, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: None, "is missing"),
        (lambda t: t[:1], "found shape [1]"),
        (lambda t: -1 - t, "negative eigenvalues"),
    ],
    ids=["missing", "shape", "negative"],
)
def test_altered_tensors_are_refused(change: Callable[[torch.Tensor], Any], message: str) -> None:
    settings, tensors = saved()
    key = "model.layers.1.self_attn.v_proj.lora_A.output_values"
    altered = change(tensors.pop(key))
    if altered is not None:
        tensors[key] = altered
    with pytest.raises(PosteriorError, match=re.escape(message)):
        LaplacePosterior.from_saved(plain(r=2), settings, tensors, ())
