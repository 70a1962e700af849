"""A tiny Llama with a posterior, its GGUF file, and tasks for it: what the tests of serving share."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
from peft import get_peft_model

from bayestune import tasks
from bayestune.adapters import BayesLoraConfig
from bayestune.sampling import Posterior
from bayestune.serving import serve
from bayestune.serving.record import Served
from bayestune.storage.saving import as_posterior
from bayestune.tasks.causal import CausalChoice
from gguf_files import byte_tokenizer, llama, write_gguf
from models import scatter

ROWS = [
    tasks.Row(id="two", question="What is this?", choices=("ab", "an abacus"), answer=0),
    tasks.Row(id="four", question='Which of "these", \\ or é?', choices=("über", "a b", "ab\tc", "é"), answer=3),
    tasks.Row(id="three", question="Why", choices=("no", "not", "nothing at all"), answer=None),
]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def posterior(*, tied: bool = True, temperature: float = 1.0) -> Posterior:
    """Draws that are far apart, of several ranks, alphas and rsLoRA."""
    config = BayesLoraConfig(
        r=3,
        lora_alpha=8,
        use_rslora=True,
        rank_pattern={"q_proj": 5},
        alpha_pattern={"v_proj": 3},
        rho_init=0.4,
        target_modules=LINEAR if tied else [*LINEAR, "lm_head"],
        task_type="CAUSAL_LM",
    )
    found = as_posterior(scatter(get_peft_model(llama(tied=tied), config)))
    found.temperature = temperature
    return found


def base(folder: Path, *, tied: bool = True) -> Path:
    return write_gguf(folder / "base.gguf", llama(tied=tied), gguf.GGMLQuantizationType.F32)


def task(folder: Path, **prompt: Any) -> CausalChoice:
    """The task of `ROWS`, scored and put as `prompt` says."""
    fields = [{"id": r.id, "question": r.question, "choices": r.choices, "answer": 0} for r in ROWS]
    (folder / "mine").mkdir(exist_ok=True)
    (folder / "mine" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in fields))
    asked = tasks.Prompt(**prompt)
    make = tasks.multiple_choice if asked.scoring == "letters" else tasks.text_choice
    return make("mine", byte_tokenizer(), data=folder, max_tokens=250, prompt=asked)


@contextmanager
def serving(folder: Path, posterior: Posterior, task: CausalChoice, **options: Any) -> Iterator[Served]:
    """Serve from `folder`/served with llama.cpp, on any free port."""
    settings = {"base": folder / "base.gguf", "draws": 3, "seed": 4, "port": 0} | options
    with serve(posterior, task, folder / "served", **settings) as served:
        yield served
