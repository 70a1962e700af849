"""`bayestune lm-eval`: lm-eval's own `hf` model, with exported adapters, is the oracle."""

import dataclasses
import json
import math
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from bayestune import BlobConfig, export_lora, tasks
from bayestune.errors import BayestuneWarning, ConfigError, DataError, DrawError, TaskError
from bayestune.experiment import load_run
from bayestune.methods import EnsemblePosterior, Posterior, Variational
from bayestune.storage.state import adapter_tensors
from bayestune_cli.app import invoke
from cli.commands import training
from models import scatter
from toys import pretrained_llama, questions, write_data, write_rows

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # what lm-eval and its kin warn of on import is theirs
    try:
        from lm_eval.api.instance import Instance
        from lm_eval.api.model import CachingLM
        from lm_eval.models.huggingface import HFLM

        from bayestune.experiment import lm_eval
    except ModuleNotFoundError:
        lm_eval: Any = None
needs_lm_eval = pytest.mark.skipif(lm_eval is None, reason="needs lm-eval: pip install '.[eval]'")

DRAWS, SEED = 3, 4
PAIRS = [
    ("The cup is red?", " red"),
    ("The cup is red?", " blue"),
    ("The pen is blue? ", "r"),  # the space moves to the continuation
    ("The pen is blue?", "b"),  # one token each after the same context
    ("The pen is blue?", "g"),
    ("", "The hat"),
]
DOCUMENTS = ["The door is green.", "", "The leaf is black. " * 40]  # the last has four windows
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{cache_dir: {cache}, data_files: {{test: {rows}}}}}
test_split: test
output_type: {kind}
doc_to_text: "{{{{question}}}}?"
doc_to_target: answer
doc_to_choice: "{{{{choices}}}}"
metric_list: [{{metric: {metric}, aggregation: {metric}, higher_is_better: false}}]
generation_kwargs: {{until: ["."]}}
metadata: {{version: 1.0}}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with llama/, whose tokenizer has an end token, data/, run/, and own/, two tasks in lm-eval's format."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    tokenizer = AutoTokenizer.from_pretrained(folder / "llama")
    tokenizer.eos_token = tokenizer.pad_token
    tokenizer.save_pretrained(folder / "llama")
    assert invoke(training(folder, folder / "run")) == 0
    rows = write_rows(folder / "rows.jsonl", three_choices())
    (folder / "own").mkdir()
    for name, kind, metric in (
        ("colours_choice", "multiple_choice", "brier_score"),
        ("colours_written", "generate_until", "bleu"),
    ):
        text = TASK.format(name=name, kind=kind, metric=metric, rows=rows, cache=folder / "cache")
        (folder / "own" / f"{name}.yaml").write_text(text)
    return folder


def three_choices() -> list[dict[str, Any]]:
    return [row for row in questions(40, 18) if len(row["choices"]) == 3]


def posterior(world: Path, kind: str = "blob") -> Posterior:
    """A posterior on the Llama of `world` whose draws are far apart."""
    base = AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32)
    lora: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    if kind == "blob":
        return Variational(scatter(get_peft_model(base, BlobConfig(**lora))).eval())
    model = get_peft_model(base, LoraConfig(**lora)).eval()
    members = [
        {key: tensor.clone() for key, tensor in adapter_tensors(scatter(model, seed=number), "default").items()}
        for number in (2, 1, 0)
    ]
    return EnsemblePosterior(scatter(model, seed=2), members)


def asked(world: Path, given: Posterior, draws: int) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(world / "llama")
    return lm_eval.PosteriorLM(given, tokenizer, draws=draws, seed=SEED, batch_size=4)


def hf(world: Path, adapter: Path) -> Any:
    """lm-eval's own model with a plain LoRA adapter."""
    settings = {"device": "cpu", "dtype": "float32", "batch_size": 4}
    return HFLM(pretrained=str(world / "llama"), peft=str(adapter), **settings)


def requests(kind: str, given: list[tuple[str, ...]]) -> list[Any]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(given)]


def answers(lm: Any) -> tuple[list[float], list[bool], list[float]]:
    """Log-probabilities of `PAIRS`, whether they are greedy, and log-probabilities of `DOCUMENTS`."""
    pairs = lm.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,) for text in DOCUMENTS]))
    return [pair[0] for pair in pairs], [pair[1] for pair in pairs], rolling


def close(expected: list[float]) -> Any:
    """`hf` adds float32 log-probabilities up in float32."""
    return pytest.approx(expected, abs=1e-5, rel=1e-6)


@needs_lm_eval
def test_the_mean_answers_as_hf_does_with_the_exported_mean(world: Path, tmp_path: Path) -> None:
    own = posterior(world)
    export_lora(own, tmp_path / "served", draws=0)
    ours, theirs = asked(world, own, 0), hf(world, tmp_path / "served" / "mean")
    (found, greedy, rolling), (expected, theirs_greedy, theirs_rolling) = answers(ours), answers(theirs)
    assert found == close(expected) and greedy == theirs_greedy and rolling == close(theirs_rolling)
    with torch.no_grad():
        decoded = own.model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    tokens = [(("", ""), [5, 6, 7], decoded), (("", ""), [5, 6, 7], [*decoded[:3], (decoded[3] + 1) % 256])]
    found, expected = ours._loglikelihood_tokens(tokens), theirs._loglikelihood_tokens(tokens)
    assert [pair[0] for pair in found] == close([pair[0] for pair in expected])
    assert [pair[1] for pair in found] == [pair[1] for pair in expected] == [True, False]


@needs_lm_eval
@pytest.mark.parametrize("kind", ["blob", "ensemble"])
def test_draws_average_the_probabilities_of_whole_texts_and_documents(world: Path, tmp_path: Path, kind: str) -> None:
    own = posterior(world, kind)
    export_lora(own, tmp_path / "served", draws=DRAWS, seed=SEED)
    each = [answers(hf(world, tmp_path / "served" / f"draw_{k}")) for k in range(DRAWS)]
    found, _, rolling = answers(asked(world, own, DRAWS))
    pairs = torch.tensor([draw[0] for draw in each], dtype=torch.float64)
    documents = torch.tensor([draw[2] for draw in each], dtype=torch.float64)
    assert found == close(pairs.exp().mean(0).log().tolist())
    assert rolling == close((documents.logsumexp(0) - math.log(DRAWS)).tolist())
    assert (pairs.std(0) > 0.01).all()


@needs_lm_eval
def test_a_context_that_does_not_fit_is_cut_where_hf_cuts_it_and_a_continuation_is_refused(
    world: Path, tmp_path: Path
) -> None:
    own = posterior(world)
    export_lora(own, tmp_path / "served", draws=0)
    ours, long = asked(world, own, 0), requests("loglikelihood", [("The lamp is red. " * 30, " red")])
    ((expected, _),) = hf(world, tmp_path / "served" / "mean").loglikelihood(long)
    with pytest.warns(BayestuneWarning, match="1 of 1 texts are longer than the 256 positions of the model"):
        ((found, _),) = ours.loglikelihood(long)
    assert found == close(expected)
    with pytest.raises(DataError, match="found a continuation of 300 tokens, expected at most 256"):
        ours.loglikelihood(requests("loglikelihood", [("The", "x" * 300)]))


@needs_lm_eval
def test_the_command_prints_the_table_and_writes_what_it_depends_on(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_eval, "Tasks", partial(lm_eval.Tasks, include_defaults=False))  # thousands of files
    output = tmp_path / "results.json"
    given = ["--tasks", "*_choice", "--include-path", str(world / "own"), "--limit", "5", "--output", str(output)]
    assert invoke(["lm-eval", str(world / "run"), *given, "--seed", str(SEED)]) == 0
    shown = capsys.readouterr().out
    assert "|colours_choice|" in shown
    assert shown.endswith(f"\n{output}: colours_choice with 3 draws of seed {SEED}\n")
    found, run = json.loads(output.read_text(encoding="utf-8")), load_run(world / "run")
    lm = lm_eval.PosteriorLM(run.posterior, run.task.tokenizer, draws=3, seed=SEED)
    brier = 0.0
    for row in three_choices()[:5]:
        pairs = [(f"{row['question']}?", f" {choice}") for choice in row["choices"]]
        scores = [score for score, _ in lm.loglikelihood(requests("loglikelihood", pairs))]
        wanted = torch.eye(3, dtype=torch.float64)[row["answer"]]
        brier += (torch.tensor(scores, dtype=torch.float64).softmax(0) - wanted).square().sum().item() / 5
    # Other batches may change the last bits of a float32 forward.
    assert found["lm_eval"]["results"]["colours_choice"]["brier_score,none"] == pytest.approx(brier, abs=1e-5)
    assert (found["draws"], found["seed"], found["limit"], found["tasks"]) == (3, SEED, 5, ["colours_choice"])
    result = json.loads((world / "run" / "result.json").read_text(encoding="utf-8"))
    assert found["sha256"]["adapter"] == result["sha256"]["adapter"]
    assert found["versions"].keys() >= {"bayestune", "torch", "lm_eval"}


@needs_lm_eval
def test_a_record_is_strict_json(world: Path) -> None:
    scores = {"perplexity": math.inf, "acc": np.float64(0.5), "rows": np.int64(3), "stderr": "N/A"}
    found = lm_eval.record({"results": {"made": scores}, "samples": object()}, load_run(world / "run"), world / "run")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["lm_eval"] == {"results": {"made": {**scores, "perplexity": None}}}


@needs_lm_eval
def test_what_cannot_be_asked_is_refused(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, run = posterior(world), load_run(world / "run")
    known = lm_eval.Tasks(include_path=str(world / "own"), include_defaults=False)
    for text, words in ("colours_choice,arc", "found 'arc', which lm-eval does not know"), (" ,", "found no name"):
        with pytest.raises(ConfigError, match=words):
            known.named(text)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="colours_written, which generate text"):
        patch.setattr(lm_eval.PosteriorLM, "loglikelihood", lambda *_: pytest.fail("the model is asked"))
        lm_eval.ask(run, known, ["colours_choice", "colours_written"], draws=0)
    with pytest.raises(ConfigError, match="which generate text"):
        asked(world, own, 0).generate_until(requests("generate_until", [("The", "{}")]))
    with pytest.raises(ConfigError, match="found a cache of answers"):
        CachingLM(asked(world, own, 0), str(tmp_path / "cache.db"))
    with pytest.raises(DrawError, match="found draws of the answers alone"):
        asked(world, own.with_predictive("linearised"), DRAWS)
    with pytest.raises(DrawError, match="expected 1 to 3"):
        asked(world, posterior(world, "ensemble"), 0)
    task = tasks.encoder_multiple_choice("colours", run.task.tokenizer, data=world / "data")
    with pytest.raises(TaskError, match="found task colours with a head of its own"):
        lm_eval.ask(dataclasses.replace(run, task=task), known, ["colours_choice"], draws=0)
    own.temperature = 2.0
    with pytest.warns(BayestuneWarning, match="the temperature of the posterior, 2, belongs to the choices"):
        asked(world, own, 0)


@needs_lm_eval
def test_rows_that_cannot_be_loaded_are_one_line(world: Path, tmp_path: Path) -> None:
    rows = tmp_path / "none.jsonl"
    text = TASK.format(name="gone", kind="multiple_choice", metric="brier_score", rows=rows, cache=tmp_path / "cache")
    (tmp_path / "gone.yaml").write_text(text)
    known = lm_eval.Tasks(include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(DataError, match="tasks gone: lm-eval cannot load them: Unable to find .*none.jsonl"):
        known.load(["gone"])


def test_wrong_flags_and_a_missing_package_are_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ["lm_eval", *(name for name in sys.modules if name.startswith("lm_eval."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "bayestune.experiment.lm_eval", raising=False)
    (tmp_path / "result.json").touch()
    asking = ["lm-eval", str(tmp_path), "--tasks", "arc_easy"]
    for command, words in (
        (asking, "lm-eval: found no package lm_eval, expected it installed; run: pip install '.[eval]'"),
        (["lm-eval", str(tmp_path)], "Missing option '--tasks'"),
        (["lm-eval", "nowhere", "--tasks", "arc_easy"], "nowhere: found no result.json"),
        ([*asking, "--include-path", str(tmp_path / "no")], "found no folder, expected one with YAML files"),
        ([*asking, "--output", str(tmp_path / "result.json")], "the file exists"),
        ([*asking, "--draws", "-1"], "--draws: found -1"),
        ([*asking, "--limit", "0"], "Invalid value for '--limit'"),
    ):
        assert invoke(command) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1, err
