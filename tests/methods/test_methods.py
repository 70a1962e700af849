"""Every method of an experiment: from its settings to a run folder, and back."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertForMultipleChoice

from bayestune.errors import BayestuneError, BayestuneWarning, ConfigError, PosteriorError
from bayestune.experiment import Experiment, Result, load_run, run
from bayestune.experiment import backbone as backbones
from bayestune.files import file_sha256
from bayestune.methods import EnsemblePosterior, LaplacePosterior, SwagPosterior, Variational, save_posterior
from models import scatter
from toys import pretrained_bert, pretrained_llama, write_data

pytestmark = pytest.mark.filterwarnings("ignore:tfb. sigma_q:bayestune.errors.BayestuneWarning")

DRAWS = 3
KEYS = {
    "mle": {"mle": 0},
    "map": {"map": 0},
    "dropout": {"dropout_n0": 0, "dropout_n3": 3},
    "ensemble": {"ensemble": 2},
    "bbb": {"bbb_n0": 0, "bbb_n3": 3},
    "blob": {"blob_n0": 0, "blob_n3": 3},
    "ivon": {"ivon_n0": 0, "ivon_n3": 3},
    "laplace": {"laplace_n0": 0, "laplace_n3": 3},
    "tfb": {"tfb_n0": 0, "tfb_n3": 3},
    "swag": {"swag_n0": 0, "swag_n3": 3},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/, llama/ and data/."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    pretrained_llama(folder / "llama")
    write_data(folder / "data")
    return folder


@pytest.fixture(scope="module")
def mle(world: Path) -> Result:
    """A trained plain LoRA run to start from."""
    return run(experiment(world, method="mle"), world / "mle")


def experiment(world: Path, **changes: Any) -> Experiment:
    settings: dict[str, Any] = {
        "model": str(world / "bert"),
        "task": "colours",
        "data": str(world / "data"),
        "steps": 4,
        "batch_size": 4,
        "draws": DRAWS,
        "max_tokens": 200,
        "learning_rate": 0.01,
        "rho_init": 0.5,
        "members": 2,
        "swag_steps": 4,
        "swag_learning_rate": 0.01,
        "tolerance": 0.5,
        "anchor_rows": 8,
    }
    return Experiment.from_dict(settings | changes, where="test")


def tensors(model: PeftModel) -> dict[str, Tensor]:
    return {name: value for name, value in model.state_dict().items() if "lora_" in name or "modules_to_save" in name}


@pytest.mark.parametrize(
    ("method", "model"), [*((method, "bert") for method in KEYS), ("ensemble", "llama"), ("swag", "llama")]
)
def test_a_run_of_every_method_is_saved_and_loaded_whole(world: Path, tmp_path: Path, method: str, model: str) -> None:
    output = tmp_path / "run"
    result = run(experiment(world, method=method, model=str(world / model)), output)
    assert {key: scores.draws for key, scores in result.scores.items()} == KEYS[method]
    assert json.loads((output / "result.json").read_text())["methods"].keys() == KEYS[method].keys()
    loaded = load_run(output)
    assert loaded.default_draws == max(KEYS[method].values())
    for key, draws in KEYS[method].items():
        again = loaded.predict(loaded.task.rows("dev"), draws=draws)
        before = result.predictions[key].draw_log_probs
        torch.testing.assert_close(again.draw_log_probs, before, rtol=1e-5, atol=1e-5)
    if len(KEYS[method]) > 1:
        mean, drawn = (result.predictions[key].log_probs for key in KEYS[method])
        assert not torch.equal(mean, drawn)
    assert not (output / "checkpoints").exists()


@pytest.mark.parametrize("method", ["laplace", "tfb", "swag"])
def test_a_method_starts_from_a_finished_run(world: Path, mle: Result, tmp_path: Path, method: str) -> None:
    """From the run's folder, and from its adapter alone, which gives the same as training the adapter first."""
    found = []
    for adapter in (str(mle.output), str(mle.output / "posterior"), None):
        output = tmp_path / str(len(found))
        found.append(run(experiment(world, method=method, adapter=adapter), output))
    for other in found[1:]:
        for key, prediction in found[0].predictions.items():
            assert torch.equal(prediction.draw_log_probs, other.predictions[key].draw_log_probs)
    kind = {"laplace": LaplacePosterior, "tfb": Variational, "swag": SwagPosterior}[method]
    assert isinstance(load_run(tmp_path / "0").posterior, kind)


def test_a_method_starts_from_an_adapter_of_another_program(world: Path, tmp_path: Path) -> None:
    """A plain PEFT folder, without a manifest; its mean answers as the adapter does."""
    source = backbones.find_backbone(str(world / "llama"))
    given = experiment(world, method="tfb", model=str(world / "llama")).resolved("causal")
    task = backbones.build_task(source, given.task, given.data, 200)
    base, _ = backbones.load_base(source, task, given)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    scatter(model, seed=3).eval().save_pretrained(str(tmp_path / "lora"))
    result = run(
        experiment(world, method="tfb", model=str(world / "llama"), adapter=str(tmp_path / "lora")), tmp_path / "run"
    )
    expected = load_run(tmp_path / "run").predict(task.rows("dev"), draws=0)
    from bayestune.inference import predict

    found = predict(model, task, task.rows("dev"), draws=0)
    torch.testing.assert_close(expected.draw_log_probs, found.draw_log_probs, rtol=1e-4, atol=1e-5)
    assert result.scores["tfb_n0"].rows == 10


def test_the_first_member_of_an_ensemble_is_the_mle_and_the_others_are_not(
    world: Path, mle: Result, tmp_path: Path
) -> None:
    result = run(experiment(world, method="ensemble", members=3), tmp_path / "run")
    log_probs = result.predictions["ensemble"].draw_log_probs
    assert torch.equal(log_probs[0], mle.predictions["mle"].draw_log_probs[0])
    posterior = load_run(tmp_path / "run").posterior
    assert isinstance(posterior, EnsemblePosterior) and len(posterior.members) == 3
    for key, tensor in posterior.members[0].items():
        assert not torch.equal(tensor, posterior.members[1][key]), key
        assert not torch.equal(posterior.members[1][key], posterior.members[2][key]), key


@pytest.mark.parametrize("changes", [{"weight_decay": 0.0}, {"weight_decay": 0.5}, {"map_prior_std": 0.05}])
def test_the_map_is_the_mle_only_without_decay(
    world: Path, mle: Result, tmp_path: Path, changes: dict[str, Any]
) -> None:
    result = run(experiment(world, method="map", **changes), tmp_path / "run")
    same = torch.equal(result.predictions["map"].log_probs, mle.predictions["mle"].log_probs)
    assert same is (changes == {"weight_decay": 0.0})


def test_the_papers_decay_is_lost_in_float32_at_a_small_learning_rate(world: Path, tmp_path: Path) -> None:
    """1 - 0.002 * 1e-5 is closer to 1 than half a rounding of float32: AdamW's decay multiplies by 1."""
    plain, decayed = (
        run(experiment(world, method=method, learning_rate=0.002), tmp_path / method) for method in ("mle", "map")
    )
    assert decayed.experiment.as_dict()["weight_decay"] == 1e-5 and 0.002 * 1e-5 < torch.finfo(torch.float32).eps / 4
    assert torch.equal(decayed.predictions["map"].log_probs, plain.predictions["mle"].log_probs)


@pytest.mark.filterwarnings("ignore:fit_temperature. stopped at the bound:bayestune.errors.BayestuneWarning")
@pytest.mark.parametrize("method", ["ensemble", "laplace"])
def test_a_temperature_goes_on_top_of_any_method(world: Path, tmp_path: Path, method: str) -> None:
    result = run(experiment(world, method=method, temperature_split="train"), tmp_path / "run")
    plain = run(experiment(world, method=method), tmp_path / "plain")
    loaded = load_run(tmp_path / "run")
    temperature = json.loads((tmp_path / "run" / "result.json").read_text())["temperature"]
    assert temperature == loaded.posterior.temperature != 1.0
    for key, prediction in plain.predictions.items():
        expected = (prediction.draw_log_probs / temperature).log_softmax(-1)
        torch.testing.assert_close(result.predictions[key].draw_log_probs, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "blob", "adapter": "MLE"}, "adapter: found one for method 'blob'"),
        ({"method": "tfb", "adapter": "nowhere"}, "adapter nowhere: found no adapter_config.json"),
        ({"method": "tfb", "adapter": "BLOB"}, "found a posterior, expected plain LoRA"),
        ({"method": "swag", "adapter": "MLE", "model": "LLAMA"}, "belongs to another base"),
        ({"method": "laplace", "fit_split": "never"}, "never"),
        (
            {"method": "mle", "temperature_split": "train+dev"},
            "temperature_split: found 'dev', which the run is scored",
        ),
        ({"method": "laplace", "fit_split": "dev"}, "fit_split: found 'dev', which the run is scored on"),
        ({"method": "tfb", "adapter": "OUTPUT"}, "found the adapter to start from in it"),
        ({"method": "tfb", "adapter": "WARM"}, "found one with a temperature, expected plain LoRA without"),
    ],
)
def test_what_cannot_be_is_refused_and_nothing_is_overwritten(
    world: Path, mle: Result, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    places = {"MLE": str(mle.output), "LLAMA": str(world / "llama"), "BLOB": str(tmp_path / "blob")}
    places["WARM"] = str(tmp_path / "warm")
    if "WARM" in changes.values():
        posterior = load_run(mle.output).posterior
        posterior.temperature = 2.0
        save_posterior(posterior, tmp_path / "warm" / "posterior")
    places["OUTPUT"] = str(tmp_path / "run" / "posterior")
    if "BLOB" in changes.values():
        run(experiment(world, method="blob"), tmp_path / "blob")
    output = tmp_path / "run"
    run(experiment(world, method="mle", steps=1), output)
    before = {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
    with pytest.raises(BayestuneError, match=named):
        settings = {key: places.get(value, value) for key, value in changes.items()}
        run(experiment(world, **settings), output, overwrite=True)
    assert before == {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}


def test_the_probit_answer_is_not_that_of_the_mode(world: Path, mle: Result, tmp_path: Path) -> None:
    given = experiment(world, method="laplace", adapter=str(mle.output), laplace_predictive="probit")
    result = run(given, tmp_path / "run")
    assert {key: scores.draws for key, scores in result.scores.items()} == {"laplace": 1}
    mode, probit = mle.predictions["mle"].probs, result.predictions["laplace"].probs
    assert not torch.equal(mode, probit)  # little: so small a model is sure of next to nothing


def folder_of_another_program(world: Path, folder: Path, **settings: Any) -> Path:
    """A plain PEFT adapter on the encoder, without a manifest."""
    base = BertForMultipleChoice.from_pretrained(world / "bert")
    config = LoraConfig(**{"r": 2, "target_modules": ["query"], "modules_to_save": ["classifier"], **settings})
    scatter(get_peft_model(base, config), seed=3).save_pretrained(str(folder))
    return folder


@pytest.mark.filterwarnings("ignore:Some weights")
@pytest.mark.parametrize("damage", ["json", "regex", "shape", "nan", "head"])
def test_a_damaged_adapter_of_another_program_is_one_error(world: Path, tmp_path: Path, damage: str) -> None:
    settings = {"modules_to_save": None} if damage == "head" else {}
    folder = folder_of_another_program(world, tmp_path / "lora", **settings)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    content = json.loads(config.read_text())
    tensors = load_file(weights)
    key = next(iter(tensors))
    if damage == "json":
        config.write_text("{")
    elif damage == "regex":
        config.write_text(json.dumps(content | {"target_modules": "(("}))
    elif damage == "shape":
        save_file(tensors | {key: tensors[key][:1].contiguous()}, weights)
    elif damage == "nan":
        save_file(tensors | {key: tensors[key] * torch.nan}, weights)
    with pytest.raises(ConfigError, match=r"adapter .*lora"):
        run(experiment(world, method="tfb", adapter=str(folder)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_in_half_precision_is_taken(world: Path, tmp_path: Path) -> None:
    folder = folder_of_another_program(world, tmp_path / "lora")
    weights = folder / "adapter_model.safetensors"
    save_file({key: tensor.bfloat16() for key, tensor in load_file(weights).items()}, weights)
    result = run(experiment(world, method="tfb", adapter=str(folder)), tmp_path / "run")
    assert result.scores["tfb_n3"].rows == 10


def test_a_laplace_fit_that_does_not_fit_in_memory_overwrites_nothing(
    world: Path, mle: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bayestune.methods.laplace.linears.free_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match="bytes"):
        run(experiment(world, method="laplace", adapter=str(mle.output)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_ensemble_that_was_stopped_goes_on_with_its_finished_members(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bayestune.experiment.train import Training

    given = experiment(world, method="ensemble", members=3, checkpoint_steps=2)
    whole = run(given, tmp_path / "whole")
    train, trained = Training.train, []

    def stopping(self: Training, model: PeftModel, *, label: str, **rest: Any) -> None:
        trained.append(label)
        if len(trained) == 3:
            raise KeyboardInterrupt
        train(self, model, label=label, **rest)

    monkeypatch.setattr(Training, "train", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(given, tmp_path / "stopped")
    resumed = run(given, tmp_path / "stopped", resume=True)
    assert trained == [f"member {i} of 3" for i in (1, 2, 3, 3)]
    one, other = (result.predictions["ensemble"].draw_log_probs for result in (whole, resumed))
    assert torch.equal(one, other)


def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fit that refuses, as `tfb` does where no width is within the tolerance."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise PosteriorError("no width")

    monkeypatch.setattr("bayestune.methods.tfb.fit_tfb", refuse)


def test_the_search_of_tfb_shows_its_passes(
    world: Path, mle: Result, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tfb = experiment(world, method="tfb", adapter=str(mle.output))
    run(tfb, tmp_path / "quiet")
    assert "tfb:" not in capsys.readouterr().err
    run(tfb, tmp_path / "shown", progress=True)
    shown = capsys.readouterr().err
    assert "tfb:" in shown and "3/11" in shown  # at 0 and at both ends of the range


def test_a_refused_fit_leaves_the_run_that_was_to_be_replaced(
    world: Path, mle: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "run"
    run(experiment(world, method="mle", steps=1), output)
    before = {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
    given = experiment(world, method="tfb", adapter=str(mle.output))
    with monkeypatch.context() as patch:
        narrow(patch)
        with pytest.raises(PosteriorError, match="^no width$"):
            run(given, output, overwrite=True)
    assert before == {path: path.read_bytes() for path in sorted(output.rglob("*")) if path.is_file()}
    run(given, output, overwrite=True)
    assert load_run(output).experiment.method.name == "tfb"
    assert {path.name for path in output.iterdir()} == {"posterior", "experiment.json", "result.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_adapter_that_was_trained_for_a_refused_fit_can_be_used(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(experiment(world, method="tfb"), tmp_path / "whole")
    with monkeypatch.context() as patch:
        narrow(patch)
        with pytest.raises(PosteriorError, match=r"fit again with --adapter") as caught:
            run(experiment(world, method="tfb"), tmp_path / "refused")
    kept = tmp_path / "refused" / "adapter"
    assert str(kept) in str(caught.value)
    result = run(experiment(world, method="tfb", adapter=str(kept)), tmp_path / "again")
    expected = whole.predictions["tfb_n3"].draw_log_probs
    assert torch.equal(result.predictions["tfb_n3"].draw_log_probs, expected)


def test_a_foreign_experiment_json_is_not_overwritten(world: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs" / "posterior").mkdir(parents=True)
    (tmp_path / "theirs" / "experiment.json").write_text('{"sample": "blood"}')
    with pytest.raises(ConfigError, match="nothing is overwritten"):
        run(experiment(world, method="mle"), tmp_path / "theirs", overwrite=True)
    assert (tmp_path / "theirs" / "posterior").is_dir()


def test_a_run_records_the_size_of_the_adapter_that_it_started_from(world: Path, tmp_path: Path) -> None:
    adapter = folder_of_another_program(world, tmp_path / "lora", r=3, lora_alpha=5)
    run(experiment(world, method="tfb", adapter=str(adapter)), tmp_path / "run")
    recorded = json.loads((tmp_path / "run" / "result.json").read_text())["experiment"]
    assert (recorded["rank"], recorded["lora_alpha"], recorded["target_modules"]) == (3, 5, ["query"])
    recorded = json.loads((tmp_path / "run" / "result.json").read_text())["sha256"]
    assert recorded["start"] == file_sha256(adapter / "adapter_model.safetensors")
    assert load_run(tmp_path / "run").experiment.rank == 3


@pytest.mark.filterwarnings("ignore:fit_temperature. stopped at the bound:bayestune.errors.BayestuneWarning")
def test_nothing_is_fitted_on_the_draws_that_are_scored(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TFB's anchor rows are a sample by the run's seed; the draws of the fits are those of no evaluation."""
    anchors: list[set[str]] = []
    seeds: dict[str, set[int]] = {}

    def watch(module: str) -> None:
        right = sys.modules[module].predict

        def predict(model: Any, task: Any, rows: Any, *, draws: int, seed: int, **settings: Any) -> Any:
            seeds.setdefault(module, set()).add(seed)
            anchors.extend([{row.id for row in rows}] if module.endswith("tfb") else [])
            return right(model, task, rows, draws=draws, seed=seed, **settings)

        monkeypatch.setattr(sys.modules[module], "predict", predict)

    watch("bayestune.methods.tfb")  # the anchor rows
    watch("bayestune.experiment.run")  # the temperature
    watch("bayestune.experiment.trained")  # the scores
    for seed in (0, 1):
        given = experiment(world, method="tfb", temperature_split="train", seed=seed, steps=1)
        run(given, tmp_path / str(seed))
    assert len(anchors[0]) == 8 and anchors[0] != anchors[-1]
    assert [len(found) for found in seeds.values()] == [2, 2, 1]
    assert len(set.union(*seeds.values())) == 5 and 1 not in set.union(*seeds.values())


def test_a_width_at_the_end_of_the_search_is_told(world: Path, mle: Result, tmp_path: Path) -> None:
    with pytest.warns(BayestuneWarning, match="sigma_q = 1, the upper end"):
        run(experiment(world, method="tfb", adapter=str(mle.output), tolerance=100.0), tmp_path / "run")
