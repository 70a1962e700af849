"""The command line, end to end on a tiny Llama with a byte-level tokenizer, and what it refuses."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import typer.main
from peft import PeftModel
from transformers import AutoModelForCausalLM

from bayestune.adapters import gaussian_layers
from bayestune.errors import BayestuneWarning
from bayestune.experiment import load_run, other_task
from bayestune.experiment.settings import all_fields
from bayestune.inference import diagnostics, evaluate, predict
from bayestune.methods import DEFAULT, Variational
from bayestune_cli.app import app, invoke
from bayestune_cli.streams import quietly
from toys import pretrained_llama, questions, write_data, write_rows

STEPS, DRAWS = 6, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama/ (model and tokenizer), data/ and run/, a BLoB run trained by the command line."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    assert invoke([*train_arguments(folder), "--output", str(folder / "run")]) == 0
    return folder


def train_arguments(world: Path, **changes: Any) -> list[str]:
    """`bayestune train ...` without --output; a change to None leaves a flag out."""
    flags: dict[str, Any] = {
        "model": world / "llama",
        "task": "colours",
        "data": world / "data",
        "steps": STEPS,
        "batch-size": 4,
        "learning-rate": 0.01,
        "rho-init": 0.5,
        "draws": DRAWS,
        "max-tokens": 200,
    } | {name.replace("_", "-"): value for name, value in changes.items()}
    if flags.get("method", "blob") not in ("blob", "bbb"):
        del flags["rho-init"]
    return [
        "train",
        *(part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))),
    ]


def answers(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


# The whole way: train, evaluate, predict, export.


def test_a_flag_of_another_method_is_refused(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method, flag, value in (("mle", "posterior-std", 0.06), (None, "members", 3), ("swag", "map-prior-std", 1.0)):
        flags = train_arguments(world, **({} if method is None else {"method": method}))
        assert invoke([*flags, f"--{flag}", str(value), "--output", str(tmp_path / "run")]) == 2
        found = f"error: --{flag}: found it with method {method or DEFAULT.name!r}, expected method"
        assert found in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


def test_the_record_says_how_wide_the_posterior_became(world: Path, tmp_path: Path) -> None:
    """And with which rate of the KL; nothing of it for a method without."""
    flags = train_arguments(world, rho_init=0.2, posterior_std=0.1)
    assert invoke([*flags, "--output", str(tmp_path / "run")]) == 0
    kl = json.loads((tmp_path / "run" / "result.json").read_text())["kl"]
    assert kl["cycle"] >= 1 and 0 < kl["learning_rate"] <= 0.2**2
    layers = gaussian_layers(load_run(tmp_path / "run").model).values()
    widths = torch.cat([layer.rho.detach().square().flatten() for layer in layers])
    assert kl["std"] == pytest.approx(widths.mean().item(), rel=1e-6)
    assert invoke([*train_arguments(world, method="mle"), "--output", str(tmp_path / "mle")]) == 0
    assert json.loads((tmp_path / "mle" / "result.json").read_text())["kl"] is None


def test_a_run_too_short_for_its_width_says_so(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = train_arguments(world, rho_init=0.05, posterior_std=0.1, kl_schedule="paper")
    assert invoke([*flags, "--output", str(tmp_path / "run")]) == 0
    assert f"posterior_std: {STEPS} updates are too few for 0.1" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["kl"]["std"] < 0.1


def test_train_leaves_a_run_folder(world: Path) -> None:
    assert {path.name for path in (world / "run").iterdir()} == {"posterior", "experiment.json", "result.json"}
    result = json.loads((world / "run" / "result.json").read_text())
    assert result["methods"].keys() == {"blob_n0", f"blob_n{DRAWS}"}
    for scores in result["methods"].values():
        assert {"accuracy", "nll", "ece", "brier", "rows", "draws", "intervals"} <= scores.keys()
        assert scores["rows"] == 10
    assert result["sha256"]["adapter"] == snapshot(world / "run")["posterior/adapter_model.safetensors"]
    assert result["rows"] == {"train": 16, "eval": 10} and result["steps"] == STEPS
    assert result["experiment"]["target_modules"] == ["q_proj", "v_proj", "lm_head"]
    assert {"torch", "transformers", "peft", "bayestune", "python"} <= result["versions"].keys()


def test_evaluate_json_is_one_object_with_the_scores_of_training(
    world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert invoke(["evaluate", str(world / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"accuracy", "nll", "ece", "brier", "rows", "draws", "task", "split", "seed"} <= found.keys()
    assert (found["task"], found["split"], found["draws"]) == ("colours", "dev", DRAWS)
    trained = json.loads((world / "run" / "result.json").read_text())["methods"][f"blob_n{DRAWS}"]
    assert {name: found[name] for name in trained} == trained
    run = load_run(world / "run")
    answer = predict(run.posterior, run.task, run.task.rows("dev"), draws=DRAWS)
    assert found["diagnostics"] == asdict(diagnostics(run.posterior, answer))


@pytest.mark.parametrize("way", ["antithetic", "linearised"])
def test_evaluate_averages_as_asked(world: Path, capsys: pytest.CaptureFixture[str], way: str) -> None:
    assert invoke(["evaluate", str(world / "run"), "--predictive", way, "--draws", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    run = load_run(world / "run")
    expected = evaluate(predict(Variational(run.model, predictive=way), run.task, run.task.rows("dev"), draws=4))
    assert {name: found[name] for name in ("nll", "draws", "predictive")} == {
        "nll": expected.nll, "draws": 4, "predictive": way
    }  # fmt: skip


def test_a_way_of_averaging_that_does_not_fit_is_refused(world: Path, tmp_path: Path, capsys: Any) -> None:
    assert invoke(["evaluate", str(world / "run"), "--predictive", "sobol"]) == 2
    assert "expected one of mc, antithetic, linearised" in capsys.readouterr().err
    assert invoke([*train_arguments(world, method="mle"), "--output", str(tmp_path / "mle")]) == 0
    assert invoke(["evaluate", str(tmp_path / "mle"), "--predictive", "mc"]) == 2
    assert (
        "--predictive: found 'mc', expected a posterior with Gaussian or dropout adapters. The run's method is 'mle'."
        in capsys.readouterr().err
    )


def test_evaluate_takes_split_draws_and_other_data(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--split", "train+dev", "--draws", "0", "--ood", "others,colours:train", "--json"]
    assert invoke(["evaluate", str(world / "run"), *flags]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["draws"], found["split"]) == (26, 0, "train+dev")
    assert found["ood"].keys() == {"others", "colours:train"}
    assert (found["ood"]["others"]["rows"], found["ood"]["colours:train"]["rows"]) == (6, 16)
    assert 0 <= found["ood"]["others"]["auroc_total"] <= 1


def test_the_row_that_is_ood_is_positive_in_each_auroc(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each AUROC is the share of pairs in which the row of the other data set has the higher score."""
    assert invoke(["evaluate", str(world / "run"), "--draws", "3", "--ood", "others", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["ood"]["others"]
    trained = load_run(world / "run")
    tasks = (trained.task, other_task(trained, "others"))
    sides = [task.rows(task.spec.evaluation) for task in tasks]
    known, new = (trained.predict(rows, draws=3, task=task) for rows, task in zip(sides, tasks, strict=True))
    lengths = [torch.tensor([float(len(row.texts[0][1])) for row in rows]) for rows in sides]
    for name, (low, high) in {
        "total": (known.total, new.total),
        "epistemic": (known.epistemic, new.epistemic),
        "largest_probability": (1 - known.probs.amax(-1), 1 - new.probs.amax(-1)),
        "length": (lengths[0], lengths[1]),
    }.items():
        above = (high[:, None] > low).double() + 0.5 * (high[:, None] == low)
        assert found[f"auroc_{name}"] == pytest.approx(above.mean().item(), abs=1e-12) and above.mean() != 0.5


def test_evaluate_prints_a_table(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["evaluate", str(world / "run"), "--ood", "others"]) == 0
    out = capsys.readouterr().out
    assert "NLL" in out and f"blob N={DRAWS}" in out and "others: accuracy" in out
    assert re.search(r"^draws: logit variance \S+ \(of the mean logits \S+\), epistemic \S+ nats", out, re.MULTILINE)
    assert re.search(r"^adapter: mean std \S+, of a new adapter 0\.1839, of the prior 0\.2$", out, re.MULTILINE)
    assert invoke(["evaluate", str(world / "run"), "--draws", "1"]) == 0
    assert "draws: " not in capsys.readouterr().out


def test_evaluate_names_no_start_and_no_prior_of_a_method_without_them(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, start in (("mle", None), ("tfb", tmp_path / "mle")):
        flags = train_arguments(world, method=method, adapter=start)
        assert invoke([*flags, "--output", str(tmp_path / method)]) == 0
    capsys.readouterr()
    assert invoke(["evaluate", str(tmp_path / "tfb"), "--draws", "2"]) == 0
    assert re.search(r"^adapter: mean std \S+$", capsys.readouterr().out, re.MULTILINE)


def test_predict_writes_one_object_a_row(world: Path, tmp_path: Path) -> None:
    rows = questions(50, 7)
    for row in rows:
        del row["answer"]
    source, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "answers.jsonl"
    assert invoke(["predict", str(world / "run"), "--input", str(source), "--output", str(output)]) == 0
    found = answers(output)
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    for row, answer in zip(rows, found, strict=True):
        assert list(answer) == ["id", "probs", "answer", "label", "total", "aleatoric", "epistemic"]
        assert len(answer["probs"]) == len(row["choices"])
        assert sum(answer["probs"]) == pytest.approx(1, abs=1e-12)
        assert answer["answer"] == max(range(len(answer["probs"])), key=answer["probs"].__getitem__)
        assert answer["total"] == pytest.approx(answer["aleatoric"] + answer["epistemic"], abs=1e-12)
    assert max(answer["epistemic"] for answer in found) > 0


def test_predict_replaces_its_output_only_when_told(world: Path, tmp_path: Path, capsys: Any) -> None:
    source, output = write_rows(tmp_path / "rows.jsonl", questions(50, 2)), tmp_path / "answers.jsonl"
    output.write_text("mine")
    command = ["predict", str(world / "run"), "--input", str(source), "--output", str(output)]
    assert invoke(command) == 2
    assert output.read_text() == "mine" and "--overwrite" in capsys.readouterr().err
    assert invoke([*command, "--overwrite"]) == 0
    assert len(answers(output)) == 2


def test_export_writes_adapters_that_plain_peft_answers_alike_with(world: Path, tmp_path: Path) -> None:
    command = ["export", str(world / "run"), "--output", str(tmp_path / "served"), "--draws", "2", "--seed", "5"]
    assert invoke(command) == 0
    trained = load_run(world / "run")
    rows = trained.task.rows("dev")
    expected = trained.predict(rows, draws=2, seed=5).draw_log_probs
    for index in range(2):
        base = AutoModelForCausalLM.from_pretrained(world / "llama")
        plain = PeftModel.from_pretrained(base, tmp_path / "served" / f"draw_{index}").eval()
        with torch.no_grad():
            batch = trained.task.collate([trained.task.example(row) for row in rows])
            logits = trained.task.outputs(plain, batch).double().log_softmax(-1)
        assert (logits.exp() - expected[index].exp()).abs().max() < 1e-6


def test_export_writes_a_gguf_file_for_each_adapter(world: Path, tmp_path: Path, capsys: Any) -> None:
    command = ["export", str(world / "run"), "--output", str(tmp_path / "served"), "--draws", "2", "--format", "gguf"]
    assert invoke(command) == 0
    files = [tmp_path / "served" / f"{name}.gguf" for name in ("mean", "draw_0", "draw_1")]
    assert capsys.readouterr().out.split() == list(map(str, files))
    assert [file.read_bytes()[:4] for file in files] == [b"GGUF"] * 3


def test_the_posterior_folder_is_what_peft_loads(world: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(world / "llama")
    model = PeftModel.from_pretrained(base, world / "run" / "posterior")
    assert model.peft_config["default"].peft_type.value == "BAYES_LORA"


def test_mle_trains_plain_lora(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert invoke([*train_arguments(world, method="mle"), "--output", str(run)]) == 0
    assert json.loads((run / "result.json").read_text())["methods"].keys() == {"mle"}
    assert json.loads((run / "posterior" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert invoke(["evaluate", str(run)]) == 0
    capsys.readouterr()
    assert invoke(["evaluate", str(run), "--draws", "2"]) == 2
    assert "plain LoRA is a point" in capsys.readouterr().err


def test_a_config_file_says_the_same_as_flags_and_flags_win(world: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    settings = [f"model: {world / 'llama'}", "task: colours", f"data: {world / 'data'}", "batch_size: 4", "draws: 3"]
    settings += ["learning_rate: 1e-2", "rho_init: 0.5", "max_tokens: 200", "steps: 999", "posterior_std: 0.19"]
    config.write_text("\n".join(settings))
    command = ["train", "--config", str(config), "--steps", str(STEPS), "--output", str(tmp_path / "run")]
    command += ["--kl-learning-rate", "0.01"]  # takes the place of the width
    assert invoke(command) == 0
    there, here = (json.loads((folder / "run" / "result.json").read_text()) for folder in (world, tmp_path))
    assert here["experiment"] == there["experiment"]
    assert here["methods"] == there["methods"]
    assert here["sha256"] == there["sha256"]


def test_resume_ends_where_the_uninterrupted_run_ended(world: Path, tmp_path: Path, capsys: Any) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = train_arguments(world, checkpoint_steps=2)
    assert invoke([*command, "--output", str(whole)]) == 0
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    (cut / "checkpoints" / f"checkpoint-{STEPS}" / "training.json").unlink()  # it died while writing this one
    assert invoke([*train_arguments(world, checkpoint_steps=2, seed=1), "--output", str(cut), "--resume"]) == 2
    assert "seed" in capsys.readouterr().err
    assert invoke(["train", "--output", str(cut), "--resume"]) == 0  # with the settings that it has
    bar = capsys.readouterr().err
    assert f" 4/{STEPS} " in bar and f" 1/{STEPS} " not in bar  # it went on, and did not start anew
    name = "posterior/adapter_model.safetensors"
    assert snapshot(cut)[name] == snapshot(whole)[name]
    assert invoke([*command, "--output", str(cut), "--resume"]) == 2
    assert "finished" in capsys.readouterr().err


def test_a_run_without_a_whole_checkpoint_is_not_begun_anew(world: Path, tmp_path: Path, capsys: Any) -> None:
    run = tmp_path / "run"
    assert invoke([*train_arguments(world, checkpoint_steps=3), "--output", str(run)]) == 0
    (run / "result.json").unlink()
    for checkpoint in (run / "checkpoints").iterdir():
        (checkpoint / "optimizer.safetensors").write_bytes(b"")
    before = snapshot(run)
    assert invoke(["train", "--output", str(run), "--resume"]) == 2
    err = capsys.readouterr().err
    assert "optimizer.safetensors was cut or altered" in err and "no older checkpoint is whole" in err
    assert err.splitlines()[-1].startswith(f"error: {run / 'checkpoints'}: found no complete checkpoint")
    assert snapshot(run) == before


def test_a_posterior_of_another_run_is_not_taken_in_silence(world: Path, tmp_path: Path, capsys: Any) -> None:
    other, mixed = tmp_path / "other", shutil.copytree(world / "run", tmp_path / "mixed")
    assert invoke([*train_arguments(world, seed=5), "--output", str(other)]) == 0
    shutil.rmtree(mixed / "posterior")
    shutil.copytree(other / "posterior", mixed / "posterior")
    capsys.readouterr()
    assert invoke(["evaluate", str(mixed)]) == 0
    assert "the posterior is not the one that result.json was made with" in capsys.readouterr().err
    assert invoke(["evaluate", str(other)]) == 0
    assert "warning" not in capsys.readouterr().err


def test_an_unfinished_run_says_how_to_go_on(world: Path, tmp_path: Path, capsys: Any) -> None:
    run = shutil.copytree(world / "run", tmp_path / "run")
    (run / "result.json").unlink()
    shutil.rmtree(run / "posterior")
    for command in ([*train_arguments(world), "--output", str(run)], ["evaluate", str(run)]):
        assert invoke(command) == 2
        assert "--resume" in capsys.readouterr().err


def test_overwrite_replaces_the_whole_run(world: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert invoke([*train_arguments(world, checkpoint_steps=3), "--output", str(run)]) == 0
    assert (run / "checkpoints").is_dir()
    assert invoke([*train_arguments(world, method="mle"), "--output", str(run), "--overwrite"]) == 0
    assert {path.name for path in run.iterdir()} == {"posterior", "experiment.json", "result.json"}
    assert json.loads((run / "result.json").read_text())["method"] == "mle"


# What is refused: exit 2, one line, nothing trained or written.

REFUSED: list[tuple[dict[str, Any], list[str]]] = [
    ({"model": "./nowhere"}, ["nowhere", "no such folder"]),
    ({"task": "colors"}, ["colors", "openbookqa"]),
    ({"data": "/no/such/folder"}, ["/no/such/folder: no such folder", "--data"]),
    ({"eval_split": "tset"}, ["tset"]),
    ({"steps": 0}, ["steps", "0"]),
    ({"steps": "ten"}, ["--steps"]),
    ({"learning_rate": -1}, ["learning_rate", "-1"]),
    ({"method": "bolb"}, ["method", "bolb", "blob"]),
    ({"estimator": "none"}, ["estimator", "none"]),
    ({"max_tokens": 300}, ["max_tokens", "300", "256"]),
    ({"target_modules": "query"}, ["target_modules", "query"]),
    ({"stepz": 5}, ["--stepz", "--steps"]),
    ({"resume": ""}, ["experiment.json"]),
]


def test_a_wrong_setting_is_refused(world: Path, tmp_path: Path, capsys: Any) -> None:
    for changes, words in REFUSED:
        arguments = [*train_arguments(world, **changes), "--output", str(tmp_path / "run")]
        refused(tmp_path, [argument for argument in arguments if argument], words, capsys)


CONFIGS = {
    "learning_rat: 0.1": ["learning_rat", "did you mean 'learning_rate'"],
    "- model": ["list"],
    "": ["nothing"],
    "task: colours": ["model"],
    "steps: 1.5": ["steps", "1.5"],
}


def test_a_wrong_config_file_is_refused(tmp_path: Path, capsys: Any) -> None:
    config = tmp_path / "run.yaml"
    for text, words in CONFIGS.items():
        config.write_text(text if not text.startswith(("learning", "steps")) else f"model: m\ntask: t\n{text}")
        command = ["train", "--config", str(config), "--output", str(tmp_path / "run")]
        refused(tmp_path, command, [str(config), *words], capsys)


def test_an_output_that_is_not_empty_is_left_alone(world: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    command = [*train_arguments(world), "--output", str(tmp_path / "run")]
    refused(tmp_path, command, ["not empty", "--overwrite"], capsys)
    refused(tmp_path, [*command, "--overwrite"], ["no experiment.json"], capsys)


def test_a_wrong_use_of_a_run_is_refused(world: Path, tmp_path: Path, capsys: Any) -> None:
    write_rows(tmp_path / "bad.jsonl", [*questions(0, 1), {"id": "r9", "question": "Q", "choices": "ab"}])
    run, bad, output = str(world / "run"), str(tmp_path / "bad.jsonl"), ["--output", str(tmp_path / "a")]
    before = snapshot(world)
    for arguments, words in (
        (["evaluate", str(tmp_path)], ["result.json", "finished run"]),
        (["evaluate", run, "--split", "tset"], ["tset"]),
        (["evaluate", run, "--ood", "colors"], ["colors"]),
        (["evaluate", run, "--draws", "-1"], ["draws", "-1"]),
        (["predict", run, "--input", str(tmp_path / "none.jsonl"), *output], ["none.jsonl"]),
        (["predict", run, "--input", bad, *output], ["bad.jsonl:2", "r9", "choices"]),
        (["predict", run, "--input", bad, "--output", str(tmp_path / "no" / "a")], [str(tmp_path / "no")]),
        (["export", run, "--output", bad], ["bad.jsonl"]),
        (["export", run, *output, "--format", "onnx"], ["--format", "onnx", "gguf"]),
        (["demo", "--output", str(tmp_path)], ["bad.jsonl"]),
        (["demo", "--output", bad], ["a file"]),
        (["demo", *output, "--seed", "-1"], ["--seed"]),
        (["trian"], ["trian", "train"]),
        (["export", run], ["--output"]),
    ):
        refused(tmp_path, arguments, words, capsys)
    assert snapshot(world) == before


def refused(folder: Path, arguments: Sequence[str], words: Sequence[str], capsys: Any) -> None:
    """The command exits with 2, says why in one line on stderr, and changes nothing in `folder`."""
    before = snapshot(folder)
    capsys.readouterr()
    assert invoke(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for word in words:
        assert word in err, (word, err)
    assert snapshot(folder) == before


@pytest.mark.property("X01")
def test_code_in_a_model_folder_is_not_run(world: Path, tmp_path: Path, capsys: Any) -> None:
    shutil.copytree(world / "llama", tmp_path / "model")
    canary = tmp_path / "canary"
    (tmp_path / "model" / "code_canary.py").write_text(
        "import pathlib\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
        f"pathlib.Path({str(canary)!r}).touch()\n"
        "class CanaryConfig(LlamaConfig):\n    model_type = 'zzcanary'\nclass Canary(LlamaForCausalLM):\n    pass\n"
    )
    file = tmp_path / "model" / "config.json"
    config = json.loads(file.read_text())
    for model_type in ("zzcanary", "llama"):
        code = {"AutoConfig": "code_canary.CanaryConfig", "AutoModelForCausalLM": "code_canary.Canary"}
        extra = {"auto_map": code, "trust_remote_code": True, "model_type": model_type}
        file.write_text(json.dumps(config | extra))
        command = [*train_arguments(world, model=tmp_path / "model", steps=1), "--output", str(tmp_path / model_type)]
        assert invoke(command) == (2 if model_type == "zzcanary" else 0)
        assert not canary.exists()
        assert "needs code of its own" in capsys.readouterr().err or model_type == "llama"


# Errors and signals.


def test_training_that_diverges_stops_with_3(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert invoke([*train_arguments(world, learning_rate=1e30), "--output", str(run)]) == 3
    last = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert "training stopped: step" in last
    assert not (run / "posterior").exists() and not (run / "result.json").exists()


# The surface.


def test_the_flags_are_these() -> None:
    commands = typer.main.get_command(app).commands  # pyright: ignore[reportAttributeAccessIssue]
    flags = {name: {option.name for option in command.params} for name, command in commands.items()}
    run_flags = {"output", "config", "resume", "overwrite"}
    assert flags == {
        "train": all_fields().keys() | run_flags,
        "evaluate": {"run", "data", "split", "draws", "predictive", "seed", "ood", "as_json"},
        "predict": {
            "run",
            "served",
            "api_key",
            "input",
            "output",
            "data",
            "draws",
            "predictive",
            "seed",
            "on_bad_row",
            "resume",
            "overwrite",
        },
        "lm-eval": {
            *("run", "tasks", "output", "draws", "seed", "num_fewshot", "limit", "batch_size"),
            *("include_path", "apply_chat_template", "data", "overwrite"),
        },
        "acquire": {
            *("run", "pool", "top", "output", "score", "data"),
            *("draws", "predictive", "seed", "on_bad_row", "overwrite"),
        },
        "generate": {
            *("run", "input", "output", "draws", "seed", "mode", "max_new_tokens", "temperature", "top_p", "stop"),
            *("chat", "batch_size", "data", "resume", "overwrite"),
        },
        "distil": {"run", "output", "rows", "steps", "draws", "data", "overwrite"},
        "export": {"run", "output", "data", "draws", "seed", "overwrite", "format"},
        "serve": {
            *("run", "output", "base", "draws", "seed", "backend", "host", "port", "proxy"),
            *("api_key", "context", "data", "overwrite"),
        },
        "demo": {"output", "model", "seed", "overwrite"},
        "table": {
            *("table", "data", "model", "seeds", "methods", "steps"),
            *("tasks", "config", "runs", "results", "output", "dry_run", "rebuild", "ray", "gpus_per_cell"),
        },
        "report": {"results", "output", "overwrite"},
    }


def test_help_names_the_commands_and_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--help"]) == 0
    out = capsys.readouterr().out
    assert invoke([]) == 0 and capsys.readouterr() == (out, "")
    for word in (
        "train",
        "evaluate",
        "predict",
        "lm-eval",
        "generate",
        "acquire",
        "export",
        "demo",
        "table",
        "report",
        "Exit codes",
        "130",
        "143",
    ):
        assert word in out


def test_the_program_starts_and_exits_as_a_process() -> None:
    code = "from bayestune_cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "evaluate", "/nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: /nowhere")
    assert "Traceback" not in done.stderr


def test_our_own_warnings_are_shown_and_those_of_libraries_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def warned(*args: Any, **kwargs: Any) -> int:
        warnings.warn("old", DeprecationWarning, stacklevel=1)
        for _ in range(2):
            warnings.warn("look at this", BayestuneWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("bayestune_cli.app.app", quietly(warned))
    assert invoke(["demo"]) == 0
    assert capsys.readouterr().err == "warning: look at this\n" * 2
