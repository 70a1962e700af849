"""Experiments from Python: settings, models, records, encoders, the packaged data, and the demo's files."""

import contextlib
import dataclasses
import gzip
import json
import os
import shutil
import socket
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.checkpoint import checkpoint
from transformers import AutoTokenizer

from bayestune import demo
from bayestune.errors import ConfigError
from bayestune.experiment import Experiment, backbone, load_run, run, score_table
from bayestune.experiment.record import rows_sha256
from bayestune.files import write_json
from bayestune.inference import Scores
from bayestune.methods import Updates
from bayestune.tasks import read_rows
from bayestune.training import KLSettings, initial_std, kl_only_std
from toys import pretrained_bert, pretrained_llama, questions, write_data, write_rows

PACKAGED = Path(demo.__file__).parent / "data" / "everyday"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/, llama/ and data/."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    return folder


def experiment(world: Path, **changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "model": str(world / "bert"),
        "task": "colours",
        "data": str(world / "data"),
        "steps": 4,
        "batch_size": 4,
        "draws": 3,
        "max_tokens": 200,
        "learning_rate": 0.01,
        "rho_init": 0.5,
    }
    return Experiment.from_dict(settings | changes, where="test")


# Settings.


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", None),
        ("seed", 2**32),
        ("weight_decay", float("nan")),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("method", "vi"),
        ("lora_dropout", 0.0),
        ("laplace_layers", "first"),
        ("task", " "),
        ("model", 3),
        ("target_modules", []),
    ],
)
def test_a_setting_out_of_range_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"file: {name}: found "):
        Experiment.from_dict({"model": "m", "task": "t"} | {name: value}, where="file")


def test_an_unknown_setting_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'batchsize'; did you mean 'batch_size'"):
        Experiment.from_dict({"model": "m", "task": "t", "batchsize": 4}, where="file")


def test_settings_survive_json() -> None:
    before = Experiment(model="m", task="t", target_modules=("q_proj", "v_proj"), learning_rate=1e-4)
    text = json.dumps(before.as_dict())
    assert Experiment.from_dict(json.loads(text), where="file") == before


def test_defaults_are_the_papers_for_each_kind_of_model() -> None:
    given = Experiment(model="m", task="t", recipe="paper", learning_rate=0.5)
    causal, encoder = given.resolved("causal"), given.resolved("encoder")
    names = ("batch_size", "lora_alpha", "kl_learning_rate", "max_tokens")
    assert [causal.as_dict()[name] for name in names] == [4, 16, 0.01, 300]
    assert [encoder.as_dict()[name] for name in names] == [32, 8, 0.002, 256]
    assert causal.learning_rate == encoder.learning_rate == 0.5
    assert Experiment(model="m", task="t").resolved("causal").learning_rate == 1e-4
    assert Experiment(model="m", task="t").resolved("encoder").learning_rate == 5e-4


def test_a_rate_or_a_width_of_the_kl_stays_as_it_is_given() -> None:
    for given in ({"kl_learning_rate": 0.003}, {"posterior_std": 0.1}):
        for family in ("causal", "encoder"):
            found = Experiment(model="m", task="t", **given).resolved(family)
            assert {"kl_learning_rate": None, "posterior_std": None, **given}.items() <= found.as_dict().items()


def kl_of(given: Experiment, *, rows: int) -> KLSettings | None:
    """The KL of a run on so many rows."""
    assert given.batch_size is not None
    updates = Updates(steps=given.steps, rows=rows, batch_size=given.batch_size, processes=1, warmup=0.06)
    return given.method.kl(updates)


def test_the_kl_rate_of_a_width_follows_from_the_run() -> None:
    given = Experiment(model="m", task="t", steps=300, posterior_std=0.06).resolved("encoder")
    kl = kl_of(given, rows=1000)
    assert kl is not None and kl.cycle == 47
    settings = {"updates": 300, "cycle": 47, "start": initial_std(0.05), "prior_std": 0.2, "schedule": kl.schedule}
    found = kl_only_std(kl.learning_rate, **settings)
    assert found == pytest.approx(0.06, rel=1e-9)


def test_a_width_outside_the_start_and_the_prior_is_refused() -> None:
    for given in ({"posterior_std": 0.3}, {"posterior_std": 0.0018}, {"posterior_std": 0.06, "prior_std": 0.05}):
        with pytest.raises(ConfigError, match=r"posterior_std: found .* expected more than the start, 0.001839"):
            Experiment(model="m", task="t", **given)
        Experiment(model="m", task="t", method="mle", **given)  # of no effect there


def test_a_rate_and_a_width_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="posterior_std and kl_learning_rate: found both"):
        Experiment(model="m", task="t", kl_learning_rate=0.01, posterior_std=0.06)


@pytest.mark.property("S17")
def test_the_kl_weights_of_every_schedule_add_up() -> None:
    """To 1 over a cycle, or 1 over an epoch for the ELBO (up to the paper's own 2^-M)."""
    for name in ("paper", "uniform", "linear"):
        given = Experiment(model="m", task="t", kl_schedule=name).resolved("causal")
        kl = kl_of(given, rows=640)
        assert kl is not None and kl.cycle == 316
        total = sum(kl.schedule(step, kl.cycle) for step in range(316, 632))
        assert total == pytest.approx(1, abs=1e-12)
    kl = kl_of(Experiment(model="m", task="t", kl_schedule="elbo").resolved("causal"), rows=640)
    assert kl is not None and kl.schedule(7, kl.cycle) * 640 == pytest.approx(1, abs=1e-15)
    assert kl_of(Experiment(model="m", task="t", method="mle").resolved("causal"), rows=640) is None


# Models.


def test_the_kind_of_model_is_read_from_its_architecture(world: Path) -> None:
    assert backbone.find_backbone(str(world / "llama")).family == "causal"
    assert backbone.find_backbone(str(world / "bert")).family == "encoder"


def test_default_layers_are_query_and_value_and_an_untied_head(world: Path, tmp_path: Path) -> None:
    llama, bert = (backbone.find_backbone(str(world / name)) for name in ("llama", "bert"))
    write_rows(tmp_path / "pairs" / "train.jsonl", [{"id": f"{i}", "text": "a", "label": i} for i in range(2)])
    choices = {id(model): backbone.build_task(model, "colours", world / "data", 200) for model in (llama, bert)}
    texts = backbone.build_task(llama, "pairs", tmp_path, 200)
    assert backbone.default_targets(llama, choices[id(llama)]) == ("q_proj", "v_proj", "lm_head")
    assert backbone.default_targets(llama, texts) == ("q_proj", "v_proj")  # its head is a new one, trained whole
    llama.config.tie_word_embeddings = True
    assert backbone.default_targets(llama, choices[id(llama)]) == ("q_proj", "v_proj")
    assert backbone.default_targets(bert, choices[id(bert)]) == ("query", "value")
    bert.config.model_type = "unheard-of"
    with pytest.raises(ConfigError, match="--target-modules"):
        backbone.default_targets(bert, choices[id(bert)])


def test_one_misspelt_layer_among_others_is_refused(world: Path, tmp_path: Path) -> None:
    given = experiment(world, target_modules=("query", "valeu"))
    with pytest.raises(ConfigError, match="no layer 'valeu'; did you mean 'value'"):
        run(given, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_without_all_weights_of_a_causal_model_is_refused(world: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for path in (world / "llama").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no weights for model.layers.1.mlp.up_proj"):
        run(experiment(world, model=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# Runs.


def test_an_encoder_trains_a_new_head_and_comes_back_from_disk(world: Path, tmp_path: Path) -> None:
    result = run(experiment(world), tmp_path / "run")
    assert result.scores.keys() == {"blob_n0", "blob_n3"}
    config = json.loads((tmp_path / "run" / "posterior" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier"]
    assert sorted(config["target_modules"]) == ["query", "value"]
    trained = load_run(tmp_path / "run")
    again = trained.predict(trained.task.rows("dev"), draws=3)
    assert torch.equal(again.draw_log_probs, result.predictions["blob_n3"].draw_log_probs)
    assert not torch.equal(again.draw_log_probs[0], again.draw_log_probs[1])
    assert not trained.model.training


def test_both_methods_start_from_the_same_head(world: Path) -> None:
    heads = []
    for method, seed in (("mle", 0), ("blob", 0), ("mle", 1)):
        settings = experiment(world, method=method, seed=seed, target_modules=["query"]).resolved("encoder")
        found = backbone.find_backbone(settings.model)
        task = backbone.build_task(found, settings.task, settings.data, 200)
        state = torch.get_rng_state()
        base, new = backbone.load_base(found, task, settings)
        backbone.add_adapter(base, settings, new=new, task_type=None)
        assert torch.equal(torch.get_rng_state(), state)
        heads.append(base.get_parameter("classifier.modules_to_save.default.weight").detach())
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_a_run_is_repeatable_and_its_seed_matters(world: Path, tmp_path: Path) -> None:
    results = [run(experiment(world, seed=seed), tmp_path / name) for name, seed in (("a", 0), ("b", 0), ("c", 1))]
    drawn = [result.predictions["blob_n3"].draw_log_probs for result in results]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    hashes = [json.loads((tmp_path / name / "result.json").read_text())["sha256"] for name in "abc"]
    assert hashes[0] == hashes[1] != hashes[2]


def test_sentences_are_classified(world: Path, tmp_path: Path) -> None:
    rows = [{"id": f"t{i}", "text": f"{row['question']}", "label": i % 3} for i, row in enumerate(questions(0, 18))]
    write_rows(tmp_path / "data" / "moods" / "train.jsonl", rows[:12])
    write_rows(tmp_path / "data" / "moods" / "dev.jsonl", rows[12:])
    for model in ("bert", "llama"):
        settings = experiment(world, model=str(world / model), task="moods", data=str(tmp_path / "data"))
        result = run(settings, tmp_path / model)
        assert result.predictions["blob_n3"].probs.shape == (6, 3)
        trained = load_run(tmp_path / model)
        again = trained.predict(trained.task.rows("dev"), draws=3)
        assert torch.equal(again.draw_log_probs, result.predictions["blob_n3"].draw_log_probs)


@pytest.mark.parametrize("settings", [{"method": "blob"}, {"method": "dropout", "lora_dropout": 0.5}])
def test_activation_checkpointing_changes_no_weight(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    """With BLoB's noise and with dropout masks, though each layer computes its activations twice."""
    used = Mock(wraps=checkpoint)
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", used)
    settings = {**settings, "model": str(world / "llama"), "prompt": "paper", "eval": False}
    weights = []
    for on in (False, True):
        run(experiment(world, **settings, activation_checkpointing=on), tmp_path / str(on))
        assert used.called == on
        weights.append(load_file(tmp_path / str(on) / "posterior" / "adapter_model.safetensors"))
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_bf16_keeps_the_posterior_in_float32(world: Path, tmp_path: Path) -> None:
    result = run(experiment(world, model=str(world / "llama"), precision="bf16"), tmp_path / "run")
    trained = load_run(tmp_path / "run")
    dtypes = {name.rpartition("lora_")[2]: p.dtype for name, p in trained.model.named_parameters() if "lora_" in name}
    assert set(dtypes.values()) == {torch.float32}
    assert trained.model.get_base_model().get_input_embeddings().weight.dtype == torch.bfloat16
    again = trained.predict(trained.task.rows("dev"), draws=3)
    assert torch.equal(again.draw_log_probs, result.predictions["blob_n3"].draw_log_probs)


def test_a_tampered_posterior_is_refused(world: Path, tmp_path: Path) -> None:
    run(experiment(world, steps=1), tmp_path / "run")
    file = tmp_path / "run" / "posterior" / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="adapter_model.safetensors"):
        load_run(tmp_path / "run")


# Records.


def test_a_json_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_json(tmp_path / "a.json", {"value": 1})

    def fail(*args: Any) -> None:
        raise OSError("disk full")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
            patch.setattr(os, step, fail)
            write_json(tmp_path / "a.json", {"value": 2})
        assert json.loads((tmp_path / "a.json").read_text()) == {"value": 1}
        assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    write_json(tmp_path / "a.json", {"value": 2})
    assert json.loads((tmp_path / "a.json").read_text()) == {"value": 2}


def test_the_hash_of_rows_is_of_their_content_and_order(tmp_path: Path) -> None:
    rows = questions(0, 5)
    plain = read_rows(write_rows(tmp_path / "a.jsonl", rows))
    packed = read_rows(write_rows(tmp_path / "b.jsonl.gz", rows))
    assert rows_sha256(plain) == rows_sha256(packed)
    assert rows_sha256(plain) != rows_sha256(plain[::-1])
    assert rows_sha256(plain) != rows_sha256([dataclasses.replace(plain[0], id="other"), *plain[1:]])


def test_the_table_shows_each_score_with_its_interval() -> None:
    intervals = {"accuracy": (0.25, 0.75), "nll": (0.5, 1.5), "ece": (0.1, 0.2), "brier": (0.25, 0.5)}
    values = {"accuracy": 0.5, "nll": 1.0, "ece": 0.0625, "ece_corrected": 0.031, "brier": 0.375}
    scores = Scores(**values, rows=8, draws=2, intervals={**intervals, "ece_corrected": (0.0, 0.125)})
    lines = score_table({"MLE": scores, "BLoB N=2": scores}).splitlines()
    assert lines[0].split() == ["accuracy", "NLL", "ECE", "ECE", "corrected", "Brier"]
    shown = ["0.500 [0.250, 0.750]", "1.000 [0.500, 1.500]", "0.062", "0.031 [0.000, 0.125]", "0.375 [0.250, 0.500]"]
    assert lines[1] == f"MLE       {'  '.join(shown)}"
    assert lines[3].startswith("8 rows")


# The packaged data, and the demo.


def test_the_packaged_questions_are_sound_and_in_one_split_each() -> None:
    questions = []
    for split, count in (("train", 150), ("test", 191), ("ood", 102)):
        path = PACKAGED / f"{split}.jsonl.gz"
        rows = read_rows(path)
        assert [row.id for row in rows] == [f"everyday-{split}-{i:03d}" for i in range(1, count + 1)]
        for row in rows:
            assert len({choice.lower() for choice in row.choices}) == 4
        places = Counter(row.target for row in rows)
        assert min(places[i] for i in range(4)) >= 0.2 * count
        assert path.read_bytes()[4:8] == bytes(4)  # no time stamp: the same rows are the same bytes
        questions += [json.loads(line)["question"].lower() for line in gzip.open(path, "rt", encoding="utf-8")]
    assert len(questions) == len(set(questions)) == 443
    text = (PACKAGED / "README.md").read_text(encoding="utf-8")
    assert "| all | 150 | 191 |" in text and "102 in all" in text


@pytest.mark.property("X03")
@pytest.mark.parametrize(("kind", "name"), [("minilm", "bert"), ("smollm2", "llama")])
def test_the_demo_writes_its_files_without_a_network(
    kind: str,
    name: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a tiny model and few rows and updates: the files, their fixed names, what is printed."""

    def offline(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the demo opened a connection")

    model = str(shutil.copytree(world / name, tmp_path / "model"))
    tiny = {"steps": 2, "max_tokens": 256}
    if kind == "smollm2":
        tokenizer = AutoTokenizer.from_pretrained(model)
        tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
        tokenizer.save_pretrained(model)
    for path in PACKAGED.glob("*.gz"):
        few = [json.loads(line) for line in gzip.open(path, "rt", encoding="utf-8")][:12]
        write_rows(tmp_path / "data" / "everyday" / path.name, few)
    monkeypatch.setattr(backbone, "PACKAGED_DATA", tmp_path / "data")
    monkeypatch.setattr(demo, "SETTINGS", {model: demo.SETTINGS[kind] | tiny})
    monkeypatch.setattr(socket.socket, "connect", offline)
    monkeypatch.setattr(socket, "getaddrinfo", offline)
    out = tmp_path / "demo"
    with contextlib.chdir(tmp_path):
        demo.run_demo(out, model=model, seed=3)
    assert {path.name for path in out.iterdir()} == demo.FILES
    found = json.loads((out / "result.json").read_text())
    assert found["seed"] == 3
    assert found["methods"].keys() == {"mle", "blob_n0", "blob_n10"}
    for scores in found["methods"].values():
        assert {"accuracy", "nll", "ece", "brier", "rows"} <= scores.keys() and scores["rows"] == 12
    assert found["ood"]["blob_n10"]["rows"] == 12 and 0 <= found["ood"]["blob_n10"]["auroc_epistemic"] <= 1
    assert (found.get("words", {}).keys() == set(demo.QUESTIONS)) is (kind == "smollm2")
    assert all(sum(answers.values()) == 10 for answers in found.get("words", {}).values())
    assert (out / "reliability.png").read_bytes()[:4] == b"\x89PNG" and (out / "reliability.svg").stat().st_size
    printed = capsys.readouterr().out
    for word in ("MLE", "BLoB N=0", "BLoB N=10", "A bee that visits a meadow", "epistemic", "AUROC", "seed 3"):
        assert word in printed
    with pytest.raises(ConfigError, match="--overwrite"):
        demo.run_demo(out, model=model)
