"""The examples run as they are, on tiny models."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from toys import pretrained_bert, pretrained_llama

EXAMPLES = Path(__file__).parent.parent / "examples"
NEEDS_TRL = pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")


def llama_with_end(folder: Path) -> Path:
    """A tiny Llama whose tokenizer has an end-of-text token, which TRL appends."""
    pretrained_llama(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("script", "model", "says"),
    [
        ("plain_trainer.py", pretrained_llama, "next token: "),
        ("own_rows.py", pretrained_bert, "'epistemic': "),
        ("held_draw.py", pretrained_llama, "draw 2: "),
        pytest.param("sft_trainer.py", llama_with_end, "draw 2: ", marks=NEEDS_TRL),
    ],
)
def test_an_example_runs(script: str, model, says: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / script), str(model(tmp_path / "model"))]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
