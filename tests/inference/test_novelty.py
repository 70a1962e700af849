"""`features`, `novelty` and `prompt_information` against loops written out, and what a run keeps for them."""

import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import FunnelConfig, FunnelForMaskedLM, T5Config, T5ForConditionalGeneration

import bayestune as bt
from bayestune import methods
from bayestune.adapters.layers import is_disabled
from bayestune.errors import BayestuneWarning, ConfigError, DataError, DrawError, PosteriorError
from bayestune.experiment import Experiment, Run, detection, load_run, novelty_of, other_task, run
from bayestune.inference import features, prompt_information
from bayestune.inference.novelty import distances
from bayestune.sampling import Variational
from bayestune.tasks import Row
from bayestune.tasks.causal import CausalChoice
from models import scatter
from toys import byte_tokenizer, pretrained_bert, pretrained_llama, write_data, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/, llama/ and data/, and a run of each model."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    for model in ("bert", "llama"):
        settings = {"task": "colours", "data": str(folder / "data"), "steps": 2, "batch_size": 4, "max_tokens": 250}
        more = {"model": str(folder / model), "method": "blob", "posterior_scale": 1, "temperature_split": "dev"}
        more["eval_split"] = "train"  # it is not scored
        asked = Experiment.from_dict({**settings, **more, "eval": False}, where="test")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # two updates leave a temperature at its bound
            run(asked, folder / f"{model}-run", command=[])
    return folder


def trained(world: Path, model: str) -> Run:
    return load_run(world / f"{model}-run", data=world / "data")


def some_rows(task: CausalChoice) -> list[Row]:
    return [row for row in task.rows("dev") if isinstance(row, Row)]


def by_hand(found: Run, text: str) -> Tensor:
    """The mean of the last hidden states of the base alone, one row without padding."""
    base: Any = found.model.get_base_model()
    inputs = found.task.tokenizer(text, return_tensors="pt")
    with torch.no_grad(), found.model.disable_adapter():
        hidden = base.base_model(**inputs).last_hidden_state
    return hidden[0].mean(0)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_features_are_the_frozen_base_s_whatever_the_adapter_and_the_other_rows(model: str, world: Path) -> None:
    found = trained(world, model)
    rows = found.task.rows("train")
    first = features(found.posterior, found.task, rows, batch_size=3)
    scatter(found.model)
    found.model.train()
    trainable = [name for name, parameter in found.model.named_parameters() if parameter.requires_grad]
    again = features(found.model, found.task, rows, batch_size=7)
    assert found.model.training
    assert trainable == [name for name, parameter in found.model.named_parameters() if parameter.requires_grad]
    assert not is_disabled(found.model)
    # Sums of at most 32 products per layer in float32; padding changes the order of some.
    assert (first - again).abs().max() <= 1e-5 * first.abs().max()
    found.model.eval()
    expected = torch.stack([by_hand(found, row.texts[0][1]) for row in rows])
    assert (first - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_distances_are_means_over_the_nearest() -> None:
    known = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    vectors = torch.tensor([[5.0, 0.0], [1.0, 1.0]])
    half = 1 - math.sqrt(0.5)
    expected = {1: [0.0, half], 2: [0.5, half], 3: [1.0, (2 * half + 1 + math.sqrt(0.5)) / 3]}
    for neighbors, values in expected.items():
        assert distances(vectors, known, neighbors=neighbors).tolist() == pytest.approx(values, abs=1e-15)
    assert distances(vectors, known, neighbors=9).tolist() == pytest.approx(expected[3], abs=1e-15)


@pytest.mark.parametrize("model", ["bert", "llama"])
def test_a_run_keeps_the_features_of_its_training_rows(model: str, world: Path, tmp_path: Path) -> None:
    found = trained(world, model)
    known = found.posterior.known
    rows = found.task.rows("train")
    assert known is not None
    assert found.posterior.temperature != 1  # the posterior was saved again when the temperature was fitted
    assert (known - features(found.posterior, found.task, rows)).abs().max() <= 1e-5 * known.abs().max()
    far = bt.novelty(found.posterior, found.task, rows, neighbors=1)
    assert far.abs().max() <= 1e-5
    assert found.posterior.with_predictive("antithetic").known is known
    bt.save_posterior(found.posterior, tmp_path / "copy")
    again = methods.load(found.model.unload(), tmp_path / "copy")
    assert again.known is not None and torch.equal(again.known, known)


def test_novelty_without_known_rows_is_refused(world: Path) -> None:
    found = trained(world, "llama")
    rows = found.task.rows("dev")
    with pytest.raises(ConfigError, match="novelty: found no features of training rows, .* pass known="):
        bt.novelty(found.model, found.task, rows)
    with pytest.raises(ConfigError, match="novelty: found neighbors=0, expected at least 1"):
        bt.novelty(found.posterior, found.task, rows, neighbors=0)
    with pytest.raises(DataError, match="features: found no rows, expected at least one"):
        features(found.model, found.task, [])


def test_the_information_of_a_prompt_is_that_of_a_loop_over_draws(world: Path) -> None:
    found = trained(world, "llama")
    model, task = scatter(found.model).double(), found.task
    assert isinstance(task, CausalChoice)
    rows = some_rows(task)[:2]
    expected = []
    for row in rows:
        inputs = task.tokenizer(task.prompt_text(row), return_tensors="pt")
        log_probs = []
        for index in range(3):
            with bt.draw(model, index=index, seed=4), torch.no_grad():
                log_probs.append(model(**inputs).logits[0].log_softmax(-1))
        stacked = torch.stack(log_probs)
        entropy = -(stacked.exp() * stacked).sum(-1).mean(0)
        mean = stacked.exp().mean(0)
        expected.append((-(mean * mean.log()).sum(-1) - entropy).mean())
    answer = prompt_information(model, task, rows, draws=3, seed=4)
    assert (answer - torch.stack(expected)).abs().max() <= 1e-13 * math.log(model.config.vocab_size)
    assert (answer > 1e-6).all()


def test_logits_that_are_not_finite_are_refused(world: Path) -> None:
    found = trained(world, "llama")
    assert isinstance(found.task, CausalChoice)
    with torch.no_grad():
        next(p for name, p in found.model.named_parameters() if "lora_B" in name).fill_(math.nan)
    with pytest.raises(PosteriorError, match="prompt_information: the logits of row .* are not finite"):
        prompt_information(found.model, found.task, some_rows(found.task)[:1], draws=2)


def test_draws_that_say_nothing_about_prompts_are_refused(world: Path) -> None:
    found = trained(world, "llama")
    task = found.task
    assert isinstance(task, CausalChoice)
    with pytest.raises(ConfigError, match="found 1 draws, whose disagreement is 0, expected at least 2"):
        prompt_information(found.model, task, some_rows(task), draws=1)
    with pytest.raises(DrawError, match="found draws of the answers alone, expected draws of the weights"):
        prompt_information(Variational(found.model, predictive="linearised"), task, some_rows(task))


def below_head(found: Run) -> Any:
    base: Any = found.model.get_base_model()
    return base.base_model


def test_an_error_leaves_a_frozen_adapter_frozen(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(world, "llama")

    def fail(**inputs: Any) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr(below_head(found), "forward", fail)
    with pytest.raises(RuntimeError, match="no more"):
        features(found.posterior, found.task, found.task.rows("dev"))
    assert not any(parameter.requires_grad for parameter in found.model.parameters())
    assert not is_disabled(found.model)


def test_where_memory_runs_out_rows_go_in_smaller_batches_without_a_cache(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = trained(world, "llama")
    rows = found.task.rows("train")
    expected = features(found.posterior, found.task, rows)
    base = below_head(found)
    whole, most, caches = base.forward, 3, []

    def limited(input_ids: Tensor, attention_mask: Tensor, use_cache: bool = True) -> Any:
        if len(input_ids) > most:
            raise torch.OutOfMemoryError("full")
        caches.append(use_cache)
        return whole(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    monkeypatch.setattr(base, "forward", limited)
    again = features(found.posterior, found.task, rows)
    assert (again - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert set(caches) == {False}
    most = 0
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        features(found.posterior, found.task, rows)


def test_a_merged_adapter_and_no_batch_are_refused(world: Path) -> None:
    found = trained(world, "llama")
    rows = found.task.rows("dev")
    for size in (0, -1):
        with pytest.raises(ConfigError, match=f"features: found batch_size={size}, expected at least 1"):
            features(found.posterior, found.task, rows, batch_size=size)
    found.model.merge_adapter()
    with pytest.raises(ConfigError, match=r"features: the adapter is merged .* call unmerge_adapter\(\)"):
        features(found.posterior, found.task, rows)


def test_known_features_that_give_no_distance_are_refused(world: Path) -> None:
    found = trained(world, "llama")
    rows = found.task.rows("dev")
    for known in (torch.zeros(0, 32), torch.zeros(32), torch.full((2, 32), math.nan)):
        with pytest.raises(ConfigError, match=r"novelty: found known of shape .*, expected \[rows, width\]"):
            bt.novelty(found.posterior, found.task, rows, known=known)
    with pytest.raises(ConfigError, match="novelty: found known of width 31, expected 32"):
        bt.novelty(found.posterior, found.task, rows, known=torch.ones(2, 31))


def short_run(world: Path, model: str, output: Path, **settings: Any) -> Run:
    asked = {"task": "colours", "data": str(world / "data"), "steps": 1, "batch_size": 4, "max_tokens": 250}
    asked |= {"model": str(world / model), "method": "mle", "eval": False, **settings}
    run(Experiment.from_dict(asked, where="test"), output, command=[])
    return load_run(output, data=world / "data")


def test_many_training_rows_are_sampled(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["bayestune.experiment.run"], "KNOWN_ROWS", 5)
    found = short_run(world, "llama", tmp_path / "run")
    assert found.posterior.known is not None and found.posterior.known.shape == (5, 32)
    own = features(found.posterior, found.task, found.task.rows("train"))
    assert (torch.cdist(found.posterior.known, own).amin(1) <= 1e-4 * own.norm(dim=1).max()).all()


def test_an_encoder_decoder_gives_the_state_of_its_encoder(world: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    backend: Any = tokenizer.backend_tokenizer
    special = [("</s>", end)]
    backend.post_processor = TemplateProcessing(single="$A </s>", pair="$A </s> $B </s>", special_tokens=special)
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": len(tokenizer)}
    config = T5Config(**sizes, pad_token_id=pad, eos_token_id=end, decoder_start_token_id=pad)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    rows = [{"id": f"s{i}", "text": f"The {'very ' * i}red hat", "label": i % 2} for i in range(5)]
    for split in ("train", "dev"):
        write_rows(tmp_path / "data" / "sentences" / f"{split}.jsonl", rows)
    found = short_run(tmp_path, "t5", tmp_path / "run", task="sentences", eval_split="dev", target_modules=["q", "v"])
    base: Any = found.model.get_base_model()
    for row, known in zip(found.task.rows("train"), found.posterior.known, strict=True):
        with torch.no_grad(), found.model.disable_adapter():
            hidden = base.get_encoder()(**found.task.tokenizer(row.texts[0][1], return_tensors="pt"))[0]
        assert (known - hidden[0].mean(0)).abs().max() <= 1e-5 * known.abs().max()


def test_a_model_that_pools_its_tokens_trains_without_features(world: Path, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 32}
    config = FunnelConfig(**sizes, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    FunnelForMaskedLM(config).save_pretrained(world / "funnel")
    tokenizer.save_pretrained(world / "funnel")
    with pytest.warns(BayestuneWarning, match=r"hidden states for \d+ tokens.* keeps no features for novelty"):
        found = short_run(world, "funnel", tmp_path / "run", target_modules=["q_head", "v_head"])
    assert found.posterior.known is None


def test_detection_compares_in_the_run_s_precision(world: Path, tmp_path: Path) -> None:
    """Its AUROC is the share of pairs in which the row of the other data set is farther from the training rows."""
    found = short_run(world, "bert", tmp_path / "run", precision="bf16", eval_split="train")
    own, task = found.task.rows("train"), other_task(found, "others")
    prediction, seen = found.predict(own, draws=0), []
    hook = below_head(found).register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    far = novelty_of(found, found.task, own)
    answer = detection(found, prediction, own, task, task.rows("dev"), known_novelty=far)
    hook.remove()
    assert seen and all(seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = bt.novelty(found.posterior, found.task, own)
        high = bt.novelty(found.posterior, task, task.rows("dev"))
    above = (high[:, None] > low).double() + 0.5 * (high[:, None] == low)
    assert answer["auroc_novelty"] == pytest.approx(above.mean().item(), abs=1e-12) and above.mean() != 0.5


def test_a_token_that_the_tokenizer_appends_is_no_part_of_the_prompt(world: Path) -> None:
    found = trained(world, "llama")
    task = found.task
    assert isinstance(task, CausalChoice)
    rows, model = some_rows(task)[:1], scatter(found.model)
    expected = prompt_information(model, task, rows, draws=2)
    backend: Any = task.tokenizer.backend_tokenizer
    special = [("<pad>", task.tokenizer.pad_token_id)]
    backend.post_processor = TemplateProcessing(single="$A <pad>", pair="$A $B <pad>", special_tokens=special)
    assert torch.equal(prompt_information(model, task, rows, draws=2), expected)
    with pytest.raises(DataError, match="prompt_information: found no rows, expected at least one"):
        prompt_information(model, task, [])
