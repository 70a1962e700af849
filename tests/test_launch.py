"""The paper's recipes as files for `accelerate launch -m bayestune train`, run on tiny models by the same path."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import RobertaConfig, RobertaModel

import bayestune
from bayestune.experiment import Experiment, load_run
from bayestune_cli.app import invoke
from models import seeded
from toys import byte_tokenizer, pretrained_llama, write_data, write_rows

EXAMPLES = Path(__file__).parent.parent / "examples"


def settings(name: str) -> Experiment:
    content = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text(encoding="utf-8"))
    return Experiment.from_dict(content, where=name)


def pretrained_roberta(folder: Path) -> Path:
    """A RoBERTa of two layers without a head, saved to `folder`."""
    tokenizer = byte_tokenizer()
    config = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=300,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    seeded(lambda: RobertaModel(config), 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pairs(start: int, count: int) -> list[dict[str, object]]:
    return [
        {"id": f"p{i}", "text": f"the cup is {i % 7}", "text_pair": f"it is {i % 5}", "label": i % 2}
        for i in range(start, start + count)
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_llama_recipe_runs_on_an_int8_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("bitsandbytes", reason="int8 bases need bitsandbytes")
    model, data = pretrained_llama(tmp_path / "model"), write_data(tmp_path / "data")
    arguments = ["--config", str(EXAMPLES / "llama2_7b.yaml"), "--model", str(model), "--data", str(data)]
    arguments += [
        "--task",
        "colours",
        "--steps",
        "3",
        "--draws",
        "2",
        "--max-tokens",
        "256",
        "--output",
        str(tmp_path / "run"),
    ]
    assert invoke(["train", *arguments]) == 0, capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["experiment"]["quantization"] == "int8"
    loaded = load_run(tmp_path / "run")
    assert loaded.predict(loaded.task.rows("dev"), draws=2).probs.isfinite().all()


LAUNCHERS = {
    "accelerate": ["accelerate.commands.launch", "--num_processes", "1", "--cpu", "--num_machines", "1"]
    + ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"],
    # What accelerate itself starts for several GPUs; on a CPU its launcher starts one process only.
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


def launched(launcher: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`bayestune train` with the RoBERTa recipe on a tiny model and 80 rows, into folder/run."""
    model, data = pretrained_roberta(folder / "model"), folder / "data"
    write_rows(data / "rte" / "train.jsonl", pairs(0, 80))
    write_rows(data / "rte" / "dev.jsonl", pairs(80, 12))
    launch = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "bayestune"]
    train = ["train", "--config", str(EXAMPLES / "roberta.yaml"), "--model", str(model), "--data", str(data)]
    train += ["--steps", "3", "--draws", "2", "--output", str(folder / "run"), *arguments]
    source = str(Path(bayestune.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*launch, *train], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_roberta_recipe_runs_under_a_launcher(launcher: str, tmp_path: Path) -> None:
    done = launched(launcher, tmp_path)
    assert done.stdout.count("rows; 95 % bootstrap") == 1
    record = json.loads((tmp_path / "run" / "result.json").read_text())
    assert record["methods"]["blob_n2"]["rows"] == 12
    assert record["processes"] == (2 if launcher == "torchrun" else 1)
    loaded = load_run(tmp_path / "run")
    assert loaded.predict(loaded.task.rows("dev"), draws=2).probs.isfinite().all()


def test_two_processes_train_what_one_trains_on_batches_twice_as_large(tmp_path: Path) -> None:
    found = {}
    for launcher, rows in {"accelerate": 8, "torchrun": 4}.items():
        launched(launcher, tmp_path / launcher, "--method", "mle", "--batch-size", str(rows))
        found[launcher] = load_file(tmp_path / launcher / "run" / "posterior" / "adapter_model.safetensors")
    for key, one in found["accelerate"].items():
        assert "lora_B" not in key or one.abs().max() > 1e-4  # it began at 0
        # Three updates of at most the rate, 5e-4; gradients summed in another order differ by float32 rounding.
        torch.testing.assert_close(found["torchrun"][key], one, rtol=0, atol=1e-3 * 3 * 5e-4)
