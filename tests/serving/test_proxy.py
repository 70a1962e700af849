"""The proxy speaks OpenAI's protocol to OpenAI's client, and answers with the average of all draws."""

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch
import uvicorn
from numpy.typing import NDArray

from bayestune.errors import ConfigError
from bayestune.inference import draw
from bayestune.sampling import Posterior
from bayestune.serving import Client
from bayestune.serving.averaged import Sampling, decode, next_token
from bayestune.serving.engines import check_port
from bayestune.serving.proxy import Proxy
from gguf_files import byte_tokenizer
from serving.served import base, posterior, serving, task

PROMPT = [1, 40, 77, 200, 13]


@contextmanager
def answering(client: Client, **options: Any) -> Iterator[openai.OpenAI]:
    """OpenAI's client of a proxy that runs in a thread."""
    port = check_port("127.0.0.1", 0)
    app = Proxy(client, **options).app()
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="secret", max_retries=0) as made:
        yield made
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("proxy")
    base(made)
    return made


@pytest.fixture(scope="module")
def asking(folder: Path) -> Iterator[openai.OpenAI]:
    with serving(folder, posterior(), task(folder)), Client(folder / "served") as client, answering(client) as made:
        yield made


def expected(here: Posterior, context: Sequence[int]) -> NDArray[np.float64]:
    """The log-probabilities [draws, tokens] after a context, by PyTorch."""
    found = []
    for index in range(3):
        with draw(here.model, index=index, seed=4), torch.no_grad():
            logits = here.model.eval()(torch.tensor([list(context)])).logits[0, -1]
        found.append(logits.double().log_softmax(-1).numpy())
    return np.stack(found)


def by_hand(log_probs: NDArray[np.float64]) -> tuple[NDArray[np.float64], dict[str, float]]:
    """The mixture's probabilities, and its uncertainty."""
    probs = np.exp(log_probs)
    mixture = probs.mean(0)
    total, aleatoric = -(mixture * np.log(mixture)).sum(), -(probs * log_probs).sum(-1).mean()
    return mixture, {"total": total, "aleatoric": aleatoric, "epistemic": total - aleatoric}


def test_one_token_has_the_averaged_log_probabilities_and_their_uncertainty(asking: openai.OpenAI) -> None:
    found: Any = asking.completions.create(model="posterior", prompt=PROMPT, max_tokens=1, temperature=0, logprobs=20)
    mixture, uncertainty = by_hand(expected(posterior(), PROMPT))
    choice = found.choices[0]
    best = np.sort(mixture)[::-1][:20]
    assert choice.logprobs.token_logprobs == pytest.approx([np.log(best[0])], abs=1e-5)
    told = choice.logprobs.top_logprobs[0]
    assert max(told.values()) == pytest.approx(np.log(best[0]), abs=1e-5)
    for name, value in told.items():
        if name.startswith("token_id:"):
            assert value == pytest.approx(np.log(mixture[int(name[9:])]), abs=1e-5)
    assert any(name.startswith("token_id:") for name in told), "parts of characters have no text"
    assert choice.uncertainty == [pytest.approx(uncertainty, abs=1e-5)]
    assert uncertainty["epistemic"] > 1e-3 and choice.finish_reason == "length"
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.model) == (5, 1, "posterior")


def test_a_longer_answer_is_decoded_from_the_average_token_by_token(asking: openai.OpenAI) -> None:
    here, ids, sure = posterior(), list(PROMPT), []
    for _ in range(8):
        mixture, uncertainty = by_hand(expected(here, ids))
        ids.append(int(mixture.argmax()))
        sure.append(uncertainty["epistemic"])
    assert 2 not in ids, "no end of the text within the answer"
    found: Any = asking.completions.create(model="posterior", prompt=PROMPT, max_tokens=8, temperature=0)
    assert found.choices[0].text == byte_tokenizer().decode(ids[5:], skip_special_tokens=True)
    assert [each["epistemic"] for each in found.choices[0].uncertainty] == pytest.approx(sure, abs=1e-5)


def test_a_chat_is_put_in_the_models_template(asking: openai.OpenAI) -> None:
    text = "<s>system: Be brief.\nuser: a\nb?\nassistant:"
    ids: Any = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b?"}]
    messages: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    settings = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": 3}
    found: Any = asking.chat.completions.create(model="posterior", messages=messages, **settings)
    mixture, uncertainty = by_hand(expected(posterior(), ids))
    (told,) = found.choices[0].logprobs.content
    assert told.logprob == pytest.approx(np.log(mixture.max()), abs=1e-5)
    best = np.log(np.sort(mixture)[::-1][:3]).tolist()
    assert [each.logprob for each in told.top_logprobs] == pytest.approx(best, abs=1e-5)
    assert found.choices[0].uncertainty == [pytest.approx(uncertainty, abs=1e-5)]
    assert found.usage.prompt_tokens == len(ids)
    parts[1]["type"] = "image_url"
    with pytest.raises(openai.BadRequestError, match=r"messages\.1\.content\.1\.type: Input should be 'text'"):
        asking.chat.completions.create(model="posterior", messages=messages, **settings)


def test_a_seed_gives_the_same_answer_and_texts_end_at_a_stop(asking: openai.OpenAI) -> None:
    def text(**settings: Any) -> tuple[str, str]:
        found = asking.completions.create(model="posterior", prompt="a", max_tokens=12, **settings)
        return found.choices[0].text, str(found.choices[0].finish_reason)

    whole, reason = text(seed=3)
    assert text(seed=3) == (whole, reason) and len({text(seed=seed)[0] for seed in range(5)}) == 5
    stop = next(letter for letter in whole[1:] if letter.isprintable() and letter != "�")
    assert text(seed=3, stop=[stop, "never"]) == (whole[: whole.index(stop)], "stop")


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"model": "gpt"}, 400, "model: Input should be 'posterior'"),
    ({"stream": True}, 400, "stream: Input should be False"),
    ({"n": 2}, 400, "n: Input should be 1"),
    ({"temperature": 3}, 400, "temperature: Input should be less than or equal to 2"),
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": [1, 260]}, 400, "prompt: found token 260, expected ids below 260"),
    ({"prompt": [1, -1]}, 400, "prompt"),
    ({"logit_bias": {"5": 2}}, 400, "logit_bias is not offered; leave it out"),
    ({"stop": ""}, 400, "stop"),
    ({"max_tokens": 400}, 400, r"found 5 tokens of the prompt and up to 400 of the answer, expected .* at most 256"),
]


@pytest.mark.parametrize(("changes", "status", "words"), REFUSED)
def test_what_it_does_not_do_is_refused(
    changes: dict[str, Any], status: int, words: str, asking: openai.OpenAI
) -> None:
    settings: dict[str, Any] = {"model": "posterior", "prompt": PROMPT, "max_tokens": 1} | changes
    with pytest.raises(openai.APIStatusError, match=words) as caught:
        asking.completions.create(**settings)
    assert caught.value.status_code == status


def test_a_tiny_temperature_is_greedy_and_nulls_are_defaults(asking: openai.OpenAI) -> None:
    greedy = asking.completions.create(model="posterior", prompt=PROMPT, max_tokens=3, temperature=0).choices[0].text
    settings: Any = {"temperature": 1e-310, "extra_body": {"n": None, "top_p": None, "logprobs": None}}
    assert (
        asking.completions.create(model="posterior", prompt=PROMPT, max_tokens=3, **settings).choices[0].text == greedy
    )


def test_the_api_key_is_asked_for(folder: Path, asking: openai.OpenAI) -> None:
    with Client(folder / "served") as client:
        with answering(client, api_key="another") as made, pytest.raises(openai.AuthenticationError):
            made.completions.create(model="posterior", prompt="a", max_tokens=1)
        with answering(client, api_key="secret") as made:
            assert [model.id for model in made.models.list()] == ["posterior"]


def test_a_dead_server_is_a_503_and_one_that_is_back_answers_again(tmp_path: Path) -> None:
    base(tmp_path)
    here, asked, port = posterior(), task(tmp_path), check_port("127.0.0.1", 0)
    question: dict[str, Any] = {"model": "posterior", "prompt": PROMPT, "max_tokens": 2, "temperature": 0}
    with serving(tmp_path, here, asked, port=port):
        client = Client(tmp_path / "served", retries=0)
        with answering(client) as made:
            before = made.completions.create(**question).choices[0].text
    with client, answering(client) as made:
        for _ in range(2):
            with pytest.raises(openai.InternalServerError, match="found no connection") as caught:
                made.completions.create(**question)
            assert caught.value.status_code == 503
        with serving(tmp_path, here, asked, port=port, overwrite=True):
            assert made.completions.create(**question).choices[0].text == before
        with pytest.raises(openai.InternalServerError):
            made.completions.create(**question)
        with serving(tmp_path, here, asked, port=port, overwrite=True, seed=9):
            with pytest.raises(openai.InternalServerError, match="another sha256 than the record has for draw_0"):
                made.completions.create(**question)


def load(asking: openai.OpenAI, seconds: float) -> None:
    """Fifty clients ask different questions at once; every answer must be the one that its question has alone."""

    def ask(number: int) -> str:
        prompt = [1, 40 + number % 7, 70 + number % 11]
        return asking.completions.create(model="posterior", prompt=prompt, max_tokens=2, seed=number).choices[0].text

    alone = [ask(number) for number in range(77)]
    assert len(set(alone)) > 40
    with ThreadPoolExecutor(50) as pool:
        end = time.monotonic() + seconds
        while True:
            assert list(pool.map(ask, range(77))) == alone
            if time.monotonic() >= end:
                return


def test_fifty_clients_get_their_own_answers(asking: openai.OpenAI) -> None:
    load(asking, seconds=0)


@pytest.mark.nightly
def test_fifty_clients_for_a_minute(asking: openai.OpenAI) -> None:
    load(asking, seconds=60)


def test_a_client_of_a_url_alone_has_no_tokenizer(asking: openai.OpenAI, folder: Path) -> None:
    with Client(folder / "served") as client, Client(client.record.url) as bare:  # type: ignore[union-attr]
        with pytest.raises(ConfigError, match="found a client of a URL alone"):
            Proxy(bare)


def test_a_nucleus_is_the_smallest_set_with_its_mass() -> None:
    log_probs = np.log(np.array([[0.5, 0.3, 0.15, 0.05]]))
    generator = np.random.default_rng(0)
    for top_p, kept in ((0.3, {0}), (0.5, {0}), (0.79, {0, 1}), (0.81, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        sampling = Sampling(top_p=top_p)
        assert {next_token(log_probs, sampling, generator).id for _ in range(400)} == kept


def test_draws_that_disagree_are_epistemic_and_draws_that_do_not_know_are_aleatoric() -> None:
    generator = np.random.default_rng(0)
    with np.errstate(divide="ignore"):
        disagree, unsure = np.log(np.eye(2)), np.log(np.full((2, 2), 0.5))
    for log_probs, epistemic in ((disagree, np.log(2)), (unsure, 0.0)):
        token = next_token(log_probs, Sampling(temperature=0.0), generator)
        assert (token.total, token.epistemic) == pytest.approx((np.log(2), epistemic))
        assert token.log_prob == pytest.approx(np.log(0.5))


def test_decoding_ends_at_the_limit_or_where_it_is_told() -> None:
    log_probs = np.log(np.array([[0.1, 0.9]]))
    settings: dict[str, Any] = {"max_tokens": 5, "sampling": Sampling(temperature=0.0)}
    assert [t.id for t in decode(lambda _: log_probs, [0], stops=lambda ids: False, **settings)] == [1] * 5
    assert len(decode(lambda _: log_probs, [0], stops=lambda ids: len(ids) == 2, **settings)) == 2
