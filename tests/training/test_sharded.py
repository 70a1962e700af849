"""Processes that hold shards (FSDP2, here by gloo on a CPU) train what one process trains, and go on after a kill."""

import importlib
import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn
from transformers.training_args import ParallelMode

from bayestune.errors import BayestuneWarning, ConfigError
from bayestune.experiment import Experiment, load_run, run
from bayestune.experiment.train import Training
from bayestune.training import last_complete
from bayestune.training.checks import check_arguments, check_plugins
from bayestune.training.sharding import asked, to_device, to_shard
from test_launch import EXAMPLES, pairs, pretrained_roberta
from toys import write_rows
from training.launching import beside_one, launch
from training.sharded import logged
from training.toys import arguments, lora

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
"""What `accelerate launch --use_fsdp --fsdp_version 2` sets; the whole model is one group of weights."""
BY_LAYERS = {
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "RobertaLayer",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}
SHORT = ("blob", "narrow")
LONGER = ("lora", "kl", "ivon", "map", "accumulated")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with what two processes wrote after 20 updates of a kind; the longer ones are trained together."""
    made: dict[str, Path] = {}

    def get(kind: str) -> Path:
        kinds = LONGER if kind in LONGER else SHORT
        if kind not in made:
            folder = tmp_path_factory.mktemp("sharded")
            done = launch("sharded.py", "train", folder, *kinds)
            assert done.returncode == 0, done.stderr[-3000:]
            made.update(dict.fromkeys(kinds, folder))
        return made[kind]

    return get


@pytest.mark.property("R06")
@pytest.mark.parametrize("kind", [*SHORT, *(pytest.param(kind, marks=pytest.mark.nightly) for kind in LONGER)])
def test_two_processes_train_on_shards_what_one_trains(
    two: Callable[[str], Path], tmp_path: Path, figure: Callable[..., None], kind: str
) -> None:
    """To rounding of float64, into the model that each was given; the noise is that of two processes by DDP."""
    alone, written = beside_one(two(kind), kind, tmp_path, figure, at_most=1e-12)
    for found in written:
        assert found["log"] == pytest.approx(logged(alone), rel=1e-6)  # the Trainer adds losses in float32


@pytest.mark.property("R06")
def test_each_process_holds_half_of_every_weight_and_state(two: Callable[[str], Path]) -> None:
    """Of the base, of M, G and B, and of AdamW's averages for M and B; every dimension here is even."""
    first, second = (json.loads((two("blob") / f"held-{rank}.json").read_text()) for rank in (0, 1))
    kinds = {name.rpartition(".")[2] for name in first}
    assert kinds == {"weight", "bias", "rho", "weight exp_avg", "weight exp_avg_sq"}
    for name, (here, every) in first.items():
        assert here == second[name][0] == every // 2, name


@pytest.mark.property("R05")
def test_a_fault_in_one_shard_is_seen_by_every_process(two: Callable[[str], Path]) -> None:
    for rank in (0, 1):
        said = json.loads((two("blob") / f"faults-{rank}.json").read_text())
        assert said.pop("weights").startswith("process 1 has first_weights=")
        assert said == dict.fromkeys(("nan in 0", "nan in 1", "inf in 0", "inf in 1"), ["bad", 1])


@pytest.mark.property("P05")
@pytest.mark.nightly
def test_a_killed_run_on_shards_goes_on_bit_for_bit(tmp_path: Path, figure: Callable[..., None]) -> None:
    """Killed at update 3, after the checkpoint of update 2, with dropout; DDP too can go on from that checkpoint."""
    assert launch("sharded.py", "run", tmp_path, "whole", **FSDP).returncode == 0
    assert launch("sharded.py", "run", tmp_path, "killed", "3", **FSDP).returncode != 0
    assert last_complete(tmp_path / "killed") == tmp_path / "killed" / "checkpoint-2"
    shutil.copytree(tmp_path / "killed", tmp_path / "ddp")
    assert launch("sharded.py", "run", tmp_path, "killed", **FSDP).returncode == 0
    assert launch("sharded.py", "run", tmp_path, "ddp").returncode == 0
    for rank in (0, 1):
        whole, resumed, ddp = (
            load_file(tmp_path / f"{name}-{rank}.safetensors") for name in ("whole", "killed", "ddp")
        )
        for name, tensor in whole.items():
            assert torch.equal(tensor, resumed[name]), name
        difference = max((tensor - ddp[name]).abs().max().item() for name, tensor in whole.items())
        figure("weights of a run on shards, and of one that DDP continued", difference, at_most=1e-12)


@pytest.mark.nightly
def test_the_command_trains_on_shards_what_it_trains_by_ddp(tmp_path: Path, figure: Callable[..., None]) -> None:
    """The RoBERTa recipe, which has a head of its own, up to result.json; in three updates of at most 5e-4."""
    model = pretrained_roberta(tmp_path / "model")
    write_rows(tmp_path / "data" / "rte" / "train.jsonl", pairs(0, 80))
    write_rows(tmp_path / "data" / "rte" / "dev.jsonl", pairs(80, 12))
    command = ["train", "--config", EXAMPLES / "roberta.yaml", "--model", model, "--data", tmp_path / "data"]
    command += ["--steps", "3", "--draws", "2", "--output"]
    found = {}
    for name, environment in {"shards": {**FSDP, **BY_LAYERS}, "ddp": {}}.items():
        done = launch("sharded.py", "bayestune", *command, tmp_path / name, **environment)
        assert done.returncode == 0, done.stderr[-3000:]
        record = json.loads((tmp_path / name / "result.json").read_text())
        assert record["methods"]["blob_n2"]["rows"] == 12 and record["processes"] == 2
        found[name] = load_file(tmp_path / name / "posterior" / "adapter_model.safetensors")
    assert found["shards"].keys() == found["ddp"].keys()
    difference = max((tensor - found["ddp"][key]).abs().max().item() for key, tensor in found["shards"].items())
    figure("weights of a command's run on shards and by DDP, float32", difference, at_most=1e-3 * 3 * 5e-4)
    loaded = load_run(tmp_path / "shards")
    assert loaded.predict(loaded.task.rows("dev"), draws=2).probs.isfinite().all()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"FSDP_VERSION": "1"}, "FSDP: found version 1, expected 2: set fsdp_version 2"),
        ({}, "FSDP: found version 1, expected 2: set fsdp_version 2"),  # accelerate's default
        ({"FSDP_VERSION": "2"}, "FSDP: found one process, expected several: start them with accelerate launch"),
    ],
)
def test_a_setting_that_cannot_shard_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        check_arguments(arguments(tmp_path))


def test_a_plugin_that_would_not_shard_is_refused() -> None:
    """accelerate ignores FSDP on a CPU, and would train by DDP."""
    on_a_cpu = Mock(fsdp_plugin_args={"fsdp_version": 2}, parallel_mode=ParallelMode.DISTRIBUTED)
    on_a_cpu.distributed_state.distributed_type = DistributedType.MULTI_CPU
    with pytest.raises(ConfigError, match="FSDP: found processes on a CPU, expected GPUs"):
        asked(on_a_cpu)
    with pytest.raises(ConfigError, match="DeepSpeed, which owns the optimizer step: use FSDP2"):
        check_plugins(deepspeed=True)


@pytest.mark.parametrize("free", [True, False])
def test_the_whole_model_goes_to_a_gpu_if_it_has_room(monkeypatch: pytest.MonkeyPatch, free: bool) -> None:
    model = nn.Linear(100, 10, bias=False)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4000 if free else 3999, 8000))
    monkeypatch.setattr(model, "to", lambda device: model.register_buffer("moved_to", torch.empty(0)))
    with nullcontext() if free else pytest.warns(BayestuneWarning, match="cuda:0 has 0.0 GB free: it stays on the"):
        to_device(model, torch.device("cuda:0"))
    assert hasattr(model, "moved_to") == free


def test_the_command_loads_a_base_to_shard_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be too large for one GPU."""
    write_rows(tmp_path / "data" / "rte" / "train.jsonl", pairs(0, 8))
    write_rows(tmp_path / "data" / "rte" / "dev.jsonl", pairs(8, 4))
    settings = {"model": str(pretrained_roberta(tmp_path / "model")), "task": "rte", "data": str(tmp_path / "data")}
    experiment = Experiment.from_dict({**settings, "max_tokens": 64, "method": "mle", "steps": 1}, where="test")
    load_base = Mock(side_effect=KeyboardInterrupt)
    monkeypatch.setattr(importlib.import_module("bayestune.experiment.run"), "load_base", load_base)
    for value, device in {"false": None, "true": "cpu"}.items():
        monkeypatch.setenv("ACCELERATE_USE_FSDP", value)
        with pytest.raises(KeyboardInterrupt):
            run(experiment, tmp_path / "run")
        assert load_base.call_args.kwargs == {"device": device}


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"method": "ensemble"}, "method 'ensemble'"),
        ({"method": "temperature", "temperature_split": "dev", "adapter": "runs/mle"}, "adapter 'runs/mle'"),
    ],
)
def test_the_command_shards_one_training_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], found: str
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setattr("bayestune.experiment.train.check_arguments", Mock())
    given = {"model": "minilm", "task": "everyday", "batch_size": 4, "learning_rate": 0.1, "method": "mle", **settings}
    training = Training(
        experiment=Experiment.from_dict(given, where="test"),
        task=Mock(),
        rows=[],
        checkpoints=tmp_path,
        resume=False,
        progress=False,
    )
    with pytest.raises(ConfigError, match=f"FSDP: found {found}, expected a method that trains exactly one"):
        training.check(lora())


def test_a_quantized_base_is_not_sharded() -> None:
    model = lora()
    norm = model.get_submodule("base_model.model.transformer.h.0.ln_1")
    norm.weight = nn.Parameter(norm.weight.data.to(torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match=r"found base_model.model.transformer.h.0.ln_1.weight quantized \(Parameter"):
        to_shard(model)


def test_the_copy_to_shard_shares_the_weights_but_not_the_parameters() -> None:
    """What happens to its parameters is not seen in the model; tied weights stay tied."""
    model = lora()
    copied = to_shard(model)
    own, others = dict(model.named_parameters()), dict(copied.named_parameters())
    assert own.keys() == others.keys()
    for name, parameter in own.items():
        assert others[name] is not parameter and others[name].data_ptr() == parameter.data_ptr(), name
        assert others[name].requires_grad == parameter.requires_grad, name
    base = copied.get_base_model()
    assert base.get_output_embeddings().weight is base.get_input_embeddings().weight
