"""Generation: the average of all draws at every token, each draw alone, and what all draws say of a text."""

import copy
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy.stats import chi2
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import bayestune as bt
from bayestune.adapters import gaussian_layers
from bayestune.errors import ConfigError, DataError, DrawError, PosteriorError, TaskError
from bayestune.inference import clusters
from bayestune.inference.score import pieces
from bayestune.methods.ensemble import EnsemblePosterior
from bayestune.storage.state import adapter_tensors
from models import BERT, GPT2, LLAMA, T5, scatter
from toys import byte_tokenizer

PROMPTS = ["What is it?", "A", "the sea is"]
DRAWS, NEW = 3, 6


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


def base(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """A Llama whose answers differ from text to text, in float64."""
    settings = {"vocab_size": len(tokenizer), "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None}
    return LLAMA.build(pad_token_id=tokenizer.pad_token_id, **settings).double()


@pytest.fixture
def model(tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    return scatter(get_peft_model(base(tokenizer), LLAMA.config())).double().eval()


def next_log_probs(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)


def mixture(models: list[Any], ids: list[int]) -> Tensor:
    return torch.stack([next_log_probs(each, ids) for each in models]).logsumexp(0) - math.log(len(models))


def test_averaged_decoding_is_a_loop_over_exported_adapters(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, figure: Callable[..., None]
) -> None:
    paths = bt.export_lora(model, tmp_path / "served", draws=DRAWS, seed=5)
    adapters = [PeftModel.from_pretrained(base(tokenizer), str(path)).double().eval() for path in paths[1:]]
    found = bt.generate(model, tokenizer, PROMPTS, draws=DRAWS, seed=5, max_new_tokens=NEW)
    worst = 0.0
    for prompt, sequence, log_probs in zip(PROMPTS, found.sequences, found.log_probs, strict=True):
        ids, expected = tokenizer(prompt)["input_ids"], []
        for _ in range(NEW):
            averaged = mixture(adapters, ids)
            expected.append(averaged.max())
            ids = [*ids, int(averaged.argmax())]
        assert sequence.tolist() == ids[-NEW:]
        worst = max(worst, float((log_probs - torch.stack(expected)).abs().max()))
    figure("log-probabilities of averaged tokens, exported adapters are float32", worst, at_most=1e-5)
    assert found.finished == (False,) * 3


def test_each_draw_alone_is_that_draw_held(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = bt.generate(model, tokenizer, PROMPTS, draws=DRAWS, seed=5, mode="per_draw", max_new_tokens=NEW)
    assert found.draw_texts is not None and found.agreement is not None and found.information is None
    for i, prompt in enumerate(PROMPTS):
        texts = []
        for k in range(DRAWS):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]])
            with bt.draw(model, index=k, seed=5):
                out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW)
            texts.append(tokenizer.decode(out[0, ids.shape[1] :]))
        assert found.draw_texts[i] == tuple(texts)
        groups = clusters(texts)
        assert (found.texts[i], found.agreement[i]) == (texts[groups[0][0]], len(groups[0]) / DRAWS)


def test_the_mean_writes_what_transformers_writes(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    ids = torch.tensor([tokenizer(PROMPTS[0])["input_ids"]])
    expected = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW)
    found = bt.generate(model, tokenizer, PROMPTS[:1], draws=0, max_new_tokens=NEW)
    assert found.sequences[0].tolist() == expected[0, ids.shape[1] :].tolist()
    assert float(found.epistemic[0].abs().max()) <= 1e-12


@pytest.mark.parametrize(("settings", "kept"), [({"top_k": 0}, 256), ({"top_k": 3}, 3), ({"temperature": 0.5}, 50)])
def test_sampled_tokens_follow_the_average(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, settings: dict[str, Any], kept: int
) -> None:
    """Of 400 copies of one prompt; transformers keeps 50 tokens unless told otherwise."""
    count = 400
    found = bt.generate(
        model, tokenizer, ["A"] * count, draws=2, max_new_tokens=1, do_sample=True, batch_size=400,
        generation_config=GenerationConfig(top_k=50), **settings
    )  # fmt: skip
    held = [next_log_probs(each, tokenizer("A")["input_ids"]) for each in held_draws(model, 2)]
    scaled = (torch.stack(held).logsumexp(0) - math.log(2)) / settings.get("temperature", 1.0)
    probs = scaled.exp() * (scaled >= scaled.topk(min(kept, len(scaled))).values[-1])
    expected = count * probs / probs.sum()
    seen = torch.zeros_like(expected)
    for token, times in Counter(int(each) for each in found.sequences).items():
        seen[token] = times
    assert not seen[expected == 0].any()
    common = expected >= 5
    cells = [(seen[common], expected[common])]
    if (~common & (expected > 0)).any():
        cells.append((seen[~common].sum()[None], expected[~common].sum()[None]))
    statistic = sum(float(((a - b) ** 2 / b).sum()) for a, b in cells)
    assert statistic <= chi2.isf(1e-9, sum(len(a) for a, _ in cells) - 1)


def held_draws(model: PeftModel, count: int) -> list[Any]:
    """Callables that answer as draw k."""

    def held(k: int) -> Callable[..., Any]:
        def call(**inputs: Any) -> Any:
            with bt.draw(model, index=k):
                return model(**inputs)

        return call

    return [held(k) for k in range(count)]


def test_a_sampled_text_depends_on_nothing_but_its_prompt_and_place(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    asked: dict[str, Any] = {"draws": DRAWS, "max_new_tokens": NEW, "do_sample": True}
    state = torch.get_rng_state()
    together = bt.generate(model, tokenizer, PROMPTS, **asked)
    assert torch.equal(torch.get_rng_state(), state)
    assert bt.generate(model, tokenizer, PROMPTS, batch_size=1, **asked).texts == together.texts
    assert bt.generate(model, tokenizer, PROMPTS[:1], **asked).texts == together.texts[:1]
    assert bt.generate(model, tokenizer, PROMPTS, seed=1, **asked).texts != together.texts


def test_information_of_one_token_is_its_epistemic_uncertainty(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, figure: Callable[..., None]
) -> None:
    """Mean over 300 copies of a prompt, each with two sampled tokens; the bound is five standard errors."""
    asked: dict[str, Any] = {"draws": 2, "max_new_tokens": 1, "do_sample": True, "top_k": 0, "batch_size": 400}
    found = bt.generate(model, tokenizer, ["A"] * 300, mode="per_draw", **asked)
    assert found.information is not None
    values = torch.tensor(found.information, dtype=torch.float64)
    error = values.std() / math.sqrt(len(values))
    figure(
        "information less epistemic, in errors",
        float((values.mean() - found.epistemic[0][0]).abs() / error),
        at_most=5,
    )


def test_a_text_is_scored_as_the_draws_score_it(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = bt.score(model, tokenizer, ["A"], [" bee"], draws=2)
    ids, totals = tokenizer("A")["input_ids"], []
    steps = []
    for token in tokenizer(" bee")["input_ids"]:
        each = torch.stack([next_log_probs(held, ids) for held in held_draws(model, 2)])
        steps.append(each[:, token])
        average = each.exp().mean(0)
        totals.append((-(average * average.log()).sum(), -(each.exp() * each).sum(-1).mean()))
        ids = [*ids, token]
    chosen = torch.stack(steps, dim=1)
    total, aleatoric = (torch.stack(list(values)) for values in zip(*totals, strict=True))
    assert torch.allclose(found.log_probs[0], chosen.exp().mean(0).log(), rtol=0, atol=1e-10)
    assert torch.allclose(found.log_likelihood[0], chosen.sum(1).exp().mean().log(), rtol=0, atol=1e-10)
    assert torch.allclose(found.total[0], total, rtol=0, atol=1e-10)
    assert torch.allclose(found.aleatoric[0], aleatoric, rtol=0, atol=1e-10)
    assert "".join(found.pieces[0]) == " bee"


def test_texts_end_where_they_end(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    free = bt.generate(model, tokenizer, PROMPTS, draws=DRAWS, max_new_tokens=NEW)
    end = int(free.sequences[0][2])
    first = free.sequences[0].tolist().index(end) + 1
    ended = bt.generate(model, tokenizer, PROMPTS, draws=DRAWS, max_new_tokens=NEW, eos_token_id=end, pad_token_id=end)
    assert ended.sequences[0].tolist() == free.sequences[0][:first].tolist()
    assert ended.finished[0]
    stop = tokenizer.decode(free.sequences[0][:2])
    stopped = bt.generate(model, tokenizer, PROMPTS[:1], draws=DRAWS, max_new_tokens=NEW, stop_strings=[stop])
    assert (stopped.texts, stopped.finished) == ((stop,), (True,))
    never = bt.generate(model, tokenizer, PROMPTS[:1], draws=DRAWS, max_new_tokens=NEW, stop_strings=["<never>"])
    assert (never.texts, never.finished) == (free.texts[:1], (False,))


def test_chats_are_put_by_the_template(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    chat = [{"role": "user", "content": "A"}]
    with pytest.raises(TaskError, match="prompt 0: found messages, expected a string"):
        bt.generate(model, tokenizer, [chat], draws=1)
    able = copy.deepcopy(tokenizer)
    able.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    asked: dict[str, Any] = {"draws": 2, "max_new_tokens": 3}
    assert bt.generate(model, able, [chat], **asked).texts == bt.generate(model, able, ["[A]>"], **asked).texts


@pytest.mark.parametrize(
    ("prompts", "settings", "error"),
    [
        ([], {}, (DataError, r"found \[\], expected a list of prompts")),
        ("A", {}, (DataError, "found 'A', expected a list of prompts")),
        (["A", ""], {}, (DataError, "prompt 1: found no token in ''")),
        (["A" * 60], {"max_new_tokens": 5}, (DataError, "prompt 0: found 65 tokens .* at most 64")),
        (["A"], {"draws": -1}, (ConfigError, "draws: found -1")),
        (["A"], {"mode": "mean"}, (ConfigError, "mode: found 'mean'")),
        (["A"], {"mode": "per_draw", "draws": 0}, (ConfigError, "'per_draw' with draws=0")),
        (["A"], {"num_beams": 2}, (ConfigError, "found settings of beam_search, expected greedy")),
        (["A"], {"penalty_alpha": 0.6, "top_k": 4}, (ConfigError, "found settings of contrastive_search")),
        (["A"], {"num_return_sequences": 2}, (ConfigError, "num_return_sequences")),
        (["A"], {"max_length": 30}, (ConfigError, "max_length: found 30, expected none; use max_new_tokens")),
        (["A"], {"max_new_token": 3}, (ConfigError, "max_new_token: found such a setting")),
        (["A"], {"do_sample": True, "temperature": 0.0}, (ConfigError, "transformers refuses these settings")),
        (["A"], {"stop_strings": [""]}, (ConfigError, "expected texts that are not empty")),
        (["A"], {"generation_config": {"top_k": 3}}, (ConfigError, "found a dict, expected a GenerationConfig")),
        (["A"], {"seed": -1}, (ConfigError, "seed: found -1")),
        (["A"], {"keys": ["a", "b"]}, (ConfigError, "found 2 keys for 1 prompts")),
        ([{"role": "user", "content": "A"}], {}, (TaskError, "no chat template")),
        (["\ud83d"], {}, (DataError, "prompt 0: found a lone surrogate")),
        (["A"], {"same": "nearly"}, (ConfigError, "same: found 'nearly', expected one of exact, normalized")),
        (["A"], {"batch_size": 0}, (ConfigError, "batch_size: found 0")),
    ],
)
def test_what_cannot_be_generated_is_refused(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Any,
    settings: dict[str, Any],
    error: tuple[type[Exception], str],
) -> None:
    with pytest.raises(error[0], match=error[1]):
        bt.generate(model, tokenizer, prompts, **{"draws": 2, "max_new_tokens": 2, **settings})


def test_models_that_cannot_write_are_refused(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    gpt2 = get_peft_model(GPT2.build(vocab_size=len(tokenizer)), GPT2.config())
    with pytest.raises(DataError, match="found 70 tokens .* at most 64"):
        bt.generate(gpt2, tokenizer, ["A" * 60], draws=1, max_new_tokens=10)
    for architecture in (BERT, T5):
        other = get_peft_model(architecture.build(), architecture.config())
        with pytest.raises(TaskError, match="expected a causal language model"):
            bt.generate(other, tokenizer, ["A"], draws=1)
    with pytest.raises(DrawError, match="plain LoRA"):
        bt.generate(get_peft_model(base(tokenizer), LoraConfig(target_modules=["q_proj"])), tokenizer, ["A"], draws=1)
    next(iter(gaussian_layers(model).values())).weight.data.fill_(math.nan)
    with pytest.raises(PosteriorError, match="prompt 0: found answers that are not finite"):
        bt.generate(model, tokenizer, PROMPTS[:1], draws=1, max_new_tokens=2)


def test_an_ensemble_scores_but_does_not_write(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = get_peft_model(base(tokenizer), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    members = [
        {key: t.clone() for key, t in adapter_tensors(scatter(plain, seed=s), "default").items()} for s in (1, 2)
    ]
    ensemble = EnsemblePosterior(plain, members)
    found = bt.score(ensemble, tokenizer, ["A"], [" bee"], draws=2)
    assert found.draw_log_probs[0].shape == (2, 4)
    assert float(found.epistemic[0][1:].min()) > 0  # one token alone asks nothing of q_proj
    with pytest.raises(DrawError, match="kind 'ensemble', whose draws cannot write in one batch"):
        bt.generate(ensemble, tokenizer, ["A"], draws=2)


def test_information_is_of_plain_sampling_alone(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    asked: dict[str, Any] = {"draws": 2, "mode": "per_draw", "max_new_tokens": 2, "do_sample": True}
    for settings in ({}, {"top_k": 0, "min_p": 0.1}, {"top_k": 0, "repetition_penalty": 1.2}):
        assert bt.generate(model, tokenizer, ["A"], **asked, **settings).information is None
    assert bt.generate(model, tokenizer, ["A"], **asked, top_k=0).information is not None


def test_the_limit_and_the_model_s_own_settings_hold(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    found = bt.generate(model, tokenizer, ["A"], draws=1, generation_config=GenerationConfig(max_new_tokens=3))
    assert len(found.sequences[0]) == 3
    model.get_base_model().generation_config.stop_strings = [found.texts[0][:1]]
    with pytest.raises(ConfigError, match="in the model's own generation_config"):
        bt.generate(model, tokenizer, ["A"], draws=1)


def test_clusters() -> None:
    apart = ["C", "C++", "1.5", "15", "-3", "3", "a < b", "a > b", "\U0001f44d", "\U0001f44e"]
    assert clusters(apart) == [[i] for i in range(len(apart))]
    assert clusters(["caf\u00e9", "Cafe\u0301.", "the \u201cCaf\u00e9\u201d"]) == [[0, 1, 2]]
    texts = ["Paris.", "the Paris", "Rome", " paris ", "rome!"]
    assert clusters(texts) == [[0, 1, 3], [2, 4]]
    assert clusters(["", "a", ""]) == [[0, 1, 2]]  # the article does not count
    assert clusters(texts, "exact") == [[0], [1], [2], [3], [4]]
    assert clusters(texts, lambda a, b: len(a) == len(b)) == [[0], [1], [2], [3], [4]]
    assert clusters(["ab", "b", "cd", "e", "fg"], lambda a, b: len(a) == len(b)) == [[0, 2, 4], [1, 3]]


@pytest.mark.parametrize("text", ["plain", "caf\u00e9 \u2603, \U0001f44d!", "\u2603"])
def test_pieces_join_to_the_text_and_characters_stay_whole(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = torch.tensor(tokenizer(text)["input_ids"])
    found = pieces(tokenizer, ids)
    assert "".join(found) == text and len(found) == len(ids) == len(text.encode())
    assert [piece for piece in found if piece] == list(text)
    cut = pieces(tokenizer, ids[:-1])
    assert "".join(cut) == tokenizer.decode(ids[:-1])


def test_a_piece_keeps_the_blank_that_a_first_token_loses() -> None:
    tokens = Tokenizer(WordLevel({"\u2581red": 0, "\u2581hat": 1, "s": 2}, unk_token="s"))
    tokens.decoder = Metaspace()
    assert pieces(PreTrainedTokenizerFast(tokenizer_object=tokens), torch.tensor([0, 1, 2])) == ("red", " hat", "s")


def test_texts_and_prompts_must_match(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ConfigError, match="found 2 prompts and the text 'xy', expected a list"):
        bt.score(model, tokenizer, ["A", "B"], "xy", draws=2)
    with pytest.raises(ConfigError, match="found 1 prompts and 2 texts"):
        bt.score(model, tokenizer, ["A"], ["b", "c"], draws=1)
    with pytest.raises(DataError, match="text 0: found no token in ''"):
        bt.score(model, tokenizer, ["A"], [""], draws=1)
    with pytest.raises(DataError, match="prompt 0: found 81 tokens"):
        bt.score(model, tokenizer, ["A"], ["b" * 80], draws=1)
