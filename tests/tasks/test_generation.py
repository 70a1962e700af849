"""Answers in words: their likelihood is transformers' own, draws are averaged, and what is no prompt is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

import bayestune as bt
from bayestune.errors import DataError, TaskError
from bayestune.tasks import PromptRow, read_rows
from bayestune_cli.app import invoke
from models import LLAMA, scatter
from toys import byte_tokenizer, pretrained_llama, write_rows

REFUSED = {
    ("--temperature-split", "dev", "--eval-split", "train"): "whose answers have no temperature",
    ("--method", "laplace"): "whose likelihood has no curvature here",
    ("--method", "tfb"): "without classes",
}
ROWS = [
    {"id": "a", "prompt": "Name a colour.", "answer": " Red"},
    {"id": "b", "prompt": "Sky?", "answer": " It is blue, I think."},
    {"id": "c", "prompt": "Grass", "answer": " green"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    found = byte_tokenizer()
    found.eos_token = found.pad_token
    return found


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "data" / "colours").mkdir(parents=True)
    write_rows(tmp_path / "data" / "colours" / "train.jsonl", ROWS * 1)
    write_rows(tmp_path / "data" / "colours" / "dev.jsonl", [{**row, "id": f"d{row['id']}"} for row in ROWS])
    return tmp_path / "data"


def model(tokenizer: PreTrainedTokenizerBase) -> Any:
    base = LLAMA.build(vocab_size=len(tokenizer), initializer_range=0.2, pad_token_id=tokenizer.pad_token_id)
    return scatter(get_peft_model(base, LLAMA.config())).double().eval()


def own_loss(model: Any, tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> float:
    """The cross entropy of the answer's tokens and the end, of this row alone, without padding."""
    context = tokenizer(row["prompt"])["input_ids"]
    answer = [*tokenizer(row["answer"])["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([context + answer])).logits[0, len(context) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()


def test_the_loss_is_that_of_the_answer(
    tokenizer: PreTrainedTokenizerBase, data: Path, figure: Callable[..., None]
) -> None:
    task, llama = bt.tasks.generation("colours", tokenizer, data=data), model(tokenizer)
    rows = task.rows("train")
    with torch.no_grad():
        found = task.loss(llama, task.collate(task.examples(rows, llama)))
    expected = torch.tensor([own_loss(llama, tokenizer, row) for row in ROWS], dtype=torch.float64)
    figure("loss of a batch less that of each row", float((found - expected).abs().max()), at_most=1e-10)


def test_whole_answers_are_averaged_over_draws(tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    task, llama = bt.tasks.generation("colours", tokenizer, data=data), model(tokenizer)
    found = bt.predict(llama, task, task.rows("train"), draws=3, seed=2)
    held = []
    for k in range(3):
        with bt.draw(llama, index=k, seed=2):
            held.append([-own_loss(llama, tokenizer, row) for row in ROWS])
    expected = torch.tensor(held, dtype=torch.float64).logsumexp(0) - math.log(3)
    assert torch.allclose(found.log_likelihood, expected, rtol=0, atol=1e-9)
    scores, tokens = bt.evaluate(found), [len(row["answer"]) + 1 for row in ROWS]
    assert scores.nll == pytest.approx(-expected.mean().item(), abs=1e-9)
    assert scores.nll_per_token == pytest.approx(-expected.sum().item() / sum(tokens), abs=1e-9)
    assert [record["tokens"] for record in found.records(task.rows("train"))] == tokens


def test_a_chat_is_put_by_the_template_once(tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    chat = {"id": "m", "messages": [{"role": "user", "content": "Sky?"}], "answer": "blue"}
    write_rows(data / "colours" / "dev.jsonl", [chat])
    task = bt.tasks.generation("colours", tokenizer, data=data)
    with pytest.raises(DataError, match=r"\(id m\): field 'messages'.*no chat template"):
        task.check(task.rows("dev"))
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    (row,) = task.rows("dev")
    assert tokenizer.decode(task.example(row)["context"]) == "[Sky?]>"
    assert tokenizer.decode(task.example(row)["answer"][:-1]) == "blue"


@pytest.mark.parametrize("bos", ["", "{{ bos_token }}"])
def test_a_chat_has_the_tokens_that_generate_reads(bos: str, tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    backend: Any = tokenizer
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.convert_tokens_to_ids("<s>"))]
    )
    tokenizer.chat_template = bos + "{% for m in messages %}[{{ m['content'] }}]{% endfor %}>"
    chat = [{"role": "user", "content": "Sky?"}]
    write_rows(data / "colours" / "dev.jsonl", [{"id": "m", "messages": chat, "answer": "blue"}])
    task = bt.tasks.generation("colours", tokenizer, data=data)
    expected: Any = tokenizer.apply_chat_template(chat, return_dict=True)
    assert task.example(task.rows("dev")[0])["context"] == expected["input_ids"]
    assert task.example(task.rows("train")[0])["context"][0] == tokenizer.bos_token_id


def test_a_chat_that_the_template_refuses_is_an_error_of_its_row(
    tokenizer: PreTrainedTokenizerBase, data: Path
) -> None:
    tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    )
    asked = {"role": "user", "content": "Sky?"}
    chats = [[asked], [{"role": "system", "content": "Be short."}, asked]]
    write_rows(
        data / "colours" / "dev.jsonl",
        [{"id": f"m{i}", "messages": chat, "answer": "blue"} for i, chat in enumerate(chats)],
    )
    task = bt.tasks.generation("colours", tokenizer, data=data)
    rows = task.rows("dev")
    first, second = task.faults(rows)
    assert first is None and "(id m1): field 'messages': found messages that the chat template refuses" in str(second)
    assert rows[1].texts[0] == ("messages", "Sky?")  # the question, of which `novelty` is


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "a", "answer": ""}, "field 'answer': found empty text"),
        ({"prompt": " ", "answer": "b"}, "field 'prompt': found only blanks"),
        ({"prompt": "a"}, "field 'answer': found nothing, expected a string"),
        ({"prompt": "a", "answer": 3}, "field 'answer': found 3, expected a string"),
        ({"prompt": "a", "text": "b", "answer": "c"}, "'text'"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"id": "x", **fields}])
    with pytest.raises(DataError, match=message):
        read_rows(tmp_path / "rows.jsonl")


def test_what_does_not_fit_is_refused(tokenizer: PreTrainedTokenizerBase, data: Path) -> None:
    task = bt.tasks.generation("colours", tokenizer, data=data, max_tokens=12)
    with pytest.raises(DataError, match=r"\(id a\): field 'prompt': found 19 tokens with its prompt and answer"):
        task.check(task.rows("train"))
    with pytest.raises(TaskError, match="expected rows with 'prompt'"):
        bt.tasks.generation("openbookqa", tokenizer)
    with pytest.raises(TaskError, match="no eos_token"):
        bt.tasks.generation("colours", byte_tokenizer(), data=data)
    with pytest.raises(DataError, match="some rows have no answer"):
        bt.evaluate(bt.predict(model(tokenizer), task, [PromptRow(id="u", prompt="Sky?")], draws=0))


def test_the_command_line_trains_and_scores_answers(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrained_llama(tmp_path / "llama")
    config = tmp_path / "llama" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token": "<pad>"}))
    write_rows(data / "colours" / "train.jsonl", [{**row, "id": f"{row['id']}{i}"} for i in range(12) for row in ROWS])
    run, more = str(tmp_path / "run"), ["--max-tokens", "64", "--batch-size", "4", "--draws", "2"]
    train = ["train", "--model", str(tmp_path / "llama"), "--task", "colours", "--data", str(data), "--steps", "8"]
    assert invoke([*train, "--learning-rate", "0.01", *more, "--output", run]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    scores = result["methods"]["blob_n2"]
    assert 0 < scores["nll_per_token"] < scores["nll"]
    capsys.readouterr()
    assert invoke(["evaluate", run, "--draws", "2", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["nll"] == pytest.approx(scores["nll"], abs=1e-6)
    rows, output = str(data / "colours" / "dev.jsonl"), tmp_path / "out.jsonl"
    assert invoke(["predict", run, "--input", rows, "--output", str(output), "--draws", "2"]) == 0
    assert set(json.loads(output.read_text().splitlines()[0])) == {"id", "log_likelihood", "tokens"}
    texts = ["generate", run, "--input", rows, "--output", str(tmp_path / "texts.jsonl"), "--max-new-tokens", "3"]
    assert invoke(texts) == 0
    whole = output.read_bytes()
    output.write_bytes(whole.splitlines(keepends=True)[0])
    again = ["predict", run, "--input", rows, "--output", str(output), "--draws", "2", "--resume"]
    assert invoke(again) == 0 and len(output.read_bytes().splitlines()) == len(ROWS)
    assert invoke([*again[:-2], "1", "--resume"]) == 2
    for flags, message in REFUSED.items():
        assert invoke([*train, *more, *flags, "--output", f"{run}2"]) == 2
        assert message in capsys.readouterr().err
        assert not Path(f"{run}2").exists()
    assert invoke(["evaluate", run, "--ood", "colours"]) == 2
    assert "without an uncertainty of a row" in capsys.readouterr().err
