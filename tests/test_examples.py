"""The examples run as they are, on tiny models."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from toys import pretrained_bert, pretrained_llama

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("script", "model", "says"),
    [
        ("plain_trainer.py", pretrained_llama, "next token: "),
        ("own_rows.py", pretrained_bert, "'epistemic': "),
        ("held_draw.py", pretrained_llama, "draw 2: "),
    ],
)
def test_an_example_runs(script: str, model, says: str, tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / script), str(model(tmp_path / "model"))]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
