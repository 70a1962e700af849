"""Ensembles: the average of K adapters, saved as K adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from bayestune.errors import DrawError, PosteriorError
from bayestune.inference import predict
from bayestune.methods import EnsemblePosterior, Point, Variational, load, load_posterior, save_posterior
from bayestune.sampling.base import SubstitutedDraws
from bayestune.storage.state import adapter_tensors
from inference.cases import Letters, rows
from models import BERT, LLAMA, blob, scatter
from serving.served import ROWS, posterior, task
from storage.cases import Case

PLAIN = Case(architecture=LLAMA, plain=True)
MEMBERS = 3


def member(number: int) -> PeftModel:
    return scatter(get_peft_model(PLAIN.base(), PLAIN.config()), seed=number).eval()


def tensors(number: int) -> dict[str, Tensor]:
    return {key: tensor.detach().clone() for key, tensor in adapter_tensors(member(number), "default").items()}


def ensemble() -> EnsemblePosterior:
    return EnsemblePosterior(member(0), [tensors(number) for number in range(MEMBERS)])


def test_a_prediction_averages_the_probabilities_of_the_members() -> None:
    found = predict(ensemble(), Letters(), rows(5), draws=MEMBERS)
    alone = [predict(member(number), Letters(), rows(5), draws=0).probs for number in range(MEMBERS)]
    torch.testing.assert_close(found.draw_log_probs.exp(), torch.stack(alone), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(found.probs, torch.stack(alone).mean(0), rtol=1e-6, atol=1e-7)
    assert found.epistemic.min() > 0


def test_a_member_is_the_same_whatever_the_seed_and_the_batch() -> None:
    one = predict(ensemble(), Letters(), rows(5), draws=2, seed=0, batch_size=5)
    other = predict(ensemble(), Letters(), rows(5), draws=2, seed=9, batch_size=2)
    torch.testing.assert_close(one.draw_log_probs, other.draw_log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.property("P13")
def test_the_model_is_as_before_also_after_an_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    posterior = ensemble()
    before = {name: value.clone() for name, value in posterior.model.state_dict().items()}
    predict(posterior, Letters(), rows(3), draws=MEMBERS)
    head = posterior.model.get_base_model().lm_head
    with monkeypatch.context() as patch:
        patch.setattr(head, "forward", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            predict(posterior, Letters(), rows(3), draws=MEMBERS)
    after = posterior.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("draws", [0, MEMBERS + 1])
def test_draws_that_are_no_members_are_refused(draws: int) -> None:
    with pytest.raises(DrawError, match=f"draws: found {draws}; .* expected 1 to {MEMBERS}"):
        predict(ensemble(), Letters(), rows(2), draws=draws)


@pytest.mark.property("P01")
def test_the_folder_holds_each_member_as_plain_lora(tmp_path: Path) -> None:
    posterior = ensemble()
    posterior.temperature = 1.7
    save_posterior(posterior, tmp_path / "posterior")
    loaded = load(PLAIN.base(), tmp_path / "posterior")
    assert isinstance(loaded, EnsemblePosterior) and loaded.temperature == 1.7
    one, other = (predict(p, Letters(), rows(4), draws=MEMBERS) for p in (posterior, loaded))
    assert torch.equal(one.draw_log_probs, other.draw_log_probs)
    for number in range(MEMBERS):
        folder = tmp_path / "posterior" / (f"member_{number}" if number else "")
        alone = PeftModel.from_pretrained(PLAIN.base(), folder)
        found = predict(alone, Letters(), rows(4), draws=0).draw_log_probs[0]
        expected = predict(member(number), Letters(), rows(4), draws=0).draw_log_probs[0]
        assert torch.equal(found, expected)


@pytest.mark.property("P07")
def test_members_and_temperature_are_not_lost_silently(tmp_path: Path) -> None:
    save_posterior(ensemble(), tmp_path / "ensemble")
    with pytest.raises(PosteriorError, match="kind 'ensemble'.*methods.load"):
        load_posterior(PLAIN.base(), tmp_path / "ensemble")
    save_posterior(Variational(blob(LLAMA).eval(), temperature=2.0), tmp_path / "blob")
    with pytest.raises(PosteriorError, match="'temperature': 2.0.*methods.load"):
        load_posterior(LLAMA.build(), tmp_path / "blob")
    loaded = load(LLAMA.build(), tmp_path / "blob")
    assert isinstance(loaded, Variational) and loaded.temperature == 2.0


@pytest.mark.property("P08")
def test_every_file_of_a_member_is_checked(tmp_path: Path) -> None:
    folder = tmp_path / "posterior"
    save_posterior(ensemble(), folder)
    path = folder / "member_2" / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(PosteriorError, match=r"member_2.adapter_model.*sha256"):
        load(PLAIN.base(), folder)
    path.unlink()
    with pytest.raises(PosteriorError, match=r"member_2.adapter_model.*missing"):
        load(PLAIN.base(), folder)
    path.write_bytes(whole)
    (folder / "member_2" / "more.json").write_text("{}")
    with pytest.raises(PosteriorError, match=r"more.json is not in the manifest"):
        load(PLAIN.base(), folder)
    (folder / "member_2" / "more.json").unlink()
    (folder / "member_3").mkdir()
    with pytest.raises(PosteriorError, match=r"member_3 is not in the manifest"):
        load(PLAIN.base(), folder)


def test_a_head_of_its_own_belongs_to_a_member() -> None:
    case = Case(architecture=BERT, plain=True)
    config = case.config()
    models = [scatter(get_peft_model(case.base(), config), seed=number).eval() for number in range(2)]
    found = [{k: t.detach().clone() for k, t in adapter_tensors(model, "default").items()} for model in models]
    assert any("classifier" in key for key in found[0])
    posterior = EnsemblePosterior(models[0], found)
    inputs = BERT.inputs()

    class Ask(Letters):
        def outputs(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
            return model(**batch).logits

    with torch.no_grad():
        sampled = posterior.sampler(draws=2, seed=0).outputs(Ask(), inputs, range(2))
        for number, model in enumerate(models):
            assert torch.equal(sampled[number], model(**inputs).logits)


def test_a_member_of_another_shape_is_refused() -> None:
    wrong = tensors(1)
    key = next(iter(wrong))
    wrong[key] = wrong[key][:1]
    with pytest.raises(PosteriorError, match=f"ensemble member 1: tensor '{key}'"):
        EnsemblePosterior(member(0), [tensors(0), wrong])
    with pytest.raises(PosteriorError, match="found no member"):
        EnsemblePosterior(member(0), [])


def test_a_temperature_divides_the_logits_of_every_draw(tmp_path: Path) -> None:
    posterior = Point(member(0), temperature=3.0)
    cold = predict(member(0), Letters(), rows(4), draws=0).draw_log_probs
    expected = (cold / 3.0).log_softmax(-1)
    torch.testing.assert_close(predict(posterior, Letters(), rows(4), draws=0).draw_log_probs, expected)
    save_posterior(posterior, tmp_path / "p")
    assert json.loads((tmp_path / "p" / "bayestune_manifest.json").read_text())["settings"] == {"temperature": 3.0}
    assert set(load_file(tmp_path / "p" / "adapter_model.safetensors")) == set(tensors(0))


def test_members_answer_by_the_texts_of_the_choices(tmp_path: Path) -> None:
    """A packed sequence needs the type of the weights, also where a member's take the place of the model's."""
    asked, model = task(tmp_path, scoring="text"), posterior().model.eval()
    batch = asked.collate(asked.examples(ROWS, model))
    weights = {name: p.detach() + 0.1 for name, p in model.named_parameters() if "lora_A" in name}
    found = SubstitutedDraws(model, [weights]).outputs(asked, batch, range(1))
    model.load_state_dict(weights, strict=False)
    assert asked.packed
    torch.testing.assert_close(found[0], asked.outputs(model, batch))
