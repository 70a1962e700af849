"""Preferences on the command line: trained, scored and predicted, with an encoder and a causal model."""

import json
from pathlib import Path
from typing import Any

import pytest

from bayestune.errors import DataError
from bayestune.experiment import load_run
from bayestune.inference import predict
from bayestune.tasks import read_rows
from bayestune_cli.app import invoke
from bayestune_cli.errors import FlagError
from bayestune_cli.rows import check_rows
from toys import pretrained_bert, pretrained_llama, questions, write_rows


def pairs(start: int, count: int) -> list[dict[str, Any]]:
    """The right choice of a question, and the first wrong one."""
    return [
        {
            "id": row["id"],
            "prompt": f"{row['question']}. It is ",
            "chosen": row["choices"][row["answer"]],
            "rejected": row["choices"][0 if row["answer"] else 1],
        }
        for row in questions(start, count)
    ]


@pytest.mark.parametrize(("name", "method"), [("bert", "blob"), ("llama", "blob"), ("bert", "laplace")])
def test_pairs_are_trained_scored_and_predicted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, method: str
) -> None:
    (pretrained_bert if name == "bert" else pretrained_llama)(tmp_path / name)
    write_rows(tmp_path / "pairs" / "train.jsonl", pairs(0, 16))
    write_rows(tmp_path / "pairs" / "dev.jsonl", pairs(16, 10))
    asked, run = write_rows(tmp_path / "asked.jsonl", pairs(40, 4)), str(tmp_path / "run")
    train = ["train", "--model", str(tmp_path / name), "--task", "pairs", "--data", str(tmp_path), "--output", run]
    train += ["--method", method, "--steps", "6", "--batch-size", "4", "--learning-rate", "0.01", "--max-tokens", "60"]
    assert invoke([*train, "--draws", "3"]) == 0, capsys.readouterr().err
    capsys.readouterr()

    assert invoke(["evaluate", run, "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert (scores["task"], scores["split"], scores["rows"], scores["draws"]) == ("pairs", "dev", 10, 3)
    found = load_run(run)
    expected = predict(found.posterior, found.task, found.task.rows("dev"), draws=3)
    assert scores["accuracy"] == (expected.probs[:, 0] > 0.5).double().mean()
    assert scores["nll"] == pytest.approx(-expected.probs[:, 0].log().mean().item(), abs=1e-12)

    assert invoke(["predict", run, "--input", str(asked), "--output", str(tmp_path / "answers.jsonl")]) == 0
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == [row["id"] for row in pairs(40, 4)]
    probs = predict(found.posterior, found.task, read_rows(asked), draws=3).probs
    for answer, row in zip(answers, probs.tolist(), strict=True):
        assert answer["probs"] == pytest.approx(row, abs=1e-6)
        assert answer["label"] == ("chosen" if row[0] > row[1] else "rejected")
        assert answer["epistemic"] >= 0 and answer["total"] == pytest.approx(
            answer["aleatoric"] + answer["epistemic"], abs=1e-9
        )


@pytest.mark.property("D08")
@pytest.mark.parametrize(
    "changes",
    [{"rejected": None}, {"chosen": 3}, {"id": 7}, {"question": "both"}, {"text": "both"}],
    ids=["rejected", "chosen", "id", "question", "text"],
)
def test_the_check_before_torch_is_imported_says_what_the_reader_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [pairs(0, 1)[0], {**pairs(1, 1)[0], **changes}])
    with pytest.raises(FlagError, match=r"rows.jsonl:2 \(id") as quick:
        check_rows(path)
    with pytest.raises(DataError) as full:
        read_rows(path)
    assert str(quick.value) == str(full.value)
