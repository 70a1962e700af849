"""Runs on few rows, on one class, and on files that change under them."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from bayestune.errors import DataError
from bayestune.experiment import Experiment, Result, load_run, run
from bayestune.experiment.backbone import load_base
from bayestune.inference import predict
from bayestune.training import BayesTrainer
from bayestune.training.batches import LengthGrouped
from toys import pretrained_bert, pretrained_llama, questions, write_data, write_rows
from training.toys import TASK, arguments, double_blob, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with bert/ and llama/."""
    folder = tmp_path_factory.mktemp("world")
    pretrained_bert(folder / "bert")
    pretrained_llama(folder / "llama")
    return folder


def trained(world: Path, data: Path, output: Path, model: str = "llama", **changes: Any) -> Result:
    settings = {"model": str(world / model), "task": "colours", "data": str(data), "steps": 4, "batch_size": 4}
    settings |= {"draws": 2, "max_tokens": 200, "learning_rate": 0.01, "rho_init": 0.5, **changes}
    return run(Experiment.from_dict(settings, where="test"), output)


def sentences(start: int, labels: list[int]) -> list[dict[str, Any]]:
    texts = [one["question"] for one in questions(start, len(labels))]
    return [{"id": f"s{start + i}", "text": texts[i], "label": label} for i, label in enumerate(labels)]


def assert_sound(result: Result, scored: int) -> None:
    for prediction in result.predictions.values():
        assert prediction.probs.shape[0] == scored
        assert prediction.probs.isfinite().all() and (prediction.probs.sum(-1) - 1).abs().max() <= 1e-12
    for scores in result.scores.values():
        assert scores.rows == scored and math.isfinite(scores.nll) and 0 <= scores.accuracy <= 1
    json.dumps({key: scores.as_dict() for key, scores in result.scores.items()}, allow_nan=False)


@pytest.mark.property("D11")
@pytest.mark.parametrize(
    ("learnt", "scored"),
    [([1] * 6, [0, 1, 2]), ([0] * 15 + [1], [0, 1, 2]), ([0, 1, 2, 0], [1] * 3)],
    ids=["one class learnt", "15 to 1", "one class scored"],
)
def test_one_class_or_almost_is_trained_and_scored(
    world: Path, tmp_path: Path, learnt: list[int], scored: list[int]
) -> None:
    write_rows(tmp_path / "colours" / "train.jsonl", sentences(0, learnt))
    write_rows(tmp_path / "colours" / "dev.jsonl", sentences(16, scored))
    write_rows(tmp_path / "colours" / "spare.jsonl", sentences(19, [2]))  # so that there are three classes
    assert_sound(trained(world, tmp_path, tmp_path / "run", "bert"), len(scored))


@pytest.mark.property("D11")
@pytest.mark.parametrize(("learnt", "scored", "method"), [(1, 1, "blob"), (3, 1, "mle"), (5, 9, "blob")])
def test_fewer_rows_than_a_batch_and_a_last_batch_of_one_are_trained_and_scored(
    world: Path, tmp_path: Path, learnt: int, scored: int, method: str
) -> None:
    """Batches of 4 in training and of 8 in scoring."""
    write_rows(tmp_path / "colours" / "train.jsonl", questions(0, learnt))
    write_rows(tmp_path / "colours" / "dev.jsonl", questions(16, scored))
    changes = {} if method == "blob" else {"method": method}
    assert_sound(trained(world, tmp_path, tmp_path / "run", **changes), scored)


@pytest.mark.property("D11")
def test_a_last_batch_of_one_is_the_mean_over_one_row(tmp_path: Path) -> None:
    """Five rows in batches of 4 and 1: every row once an epoch, and the short batch weighs as one update."""
    args = arguments(tmp_path, per_device_train_batch_size=4, max_steps=4, train_sampling_strategy="group_by_length")
    trainer = BayesTrainer(double_blob(), task=TASK, args=args, train_rows=rows(5))
    batches = list(trainer.get_train_dataloader())
    assert [len(batch["labels"]) for batch in batches] == [4, 1]
    last = batches[-1]
    whole, each = trainer.compute_loss(trainer.model, dict(last), return_outputs=True, num_items_in_batch=1)
    assert whole.item() == each.item()
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.state.epoch == 2


@pytest.mark.property("D11")
def test_no_rows_are_refused_by_name(world: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="found no training row, expected at least one"):
        BayesTrainer(double_blob(), task=TASK, args=arguments(tmp_path), train_rows=[])
    with pytest.raises(DataError, match="predict: found no rows, expected at least one"):
        predict(double_blob(), TASK, [])
    data = write_data(tmp_path / "data")
    (data / "colours" / "train.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"train\.jsonl: found no rows, expected one JSON object per line"):
        trained(world, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.property("D13")
def test_files_that_change_after_the_preflight_do_not_change_the_run(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read once and hashed as read: files may even be gone when training starts."""
    data = write_data(tmp_path / "data")
    calm = trained(world, data, tmp_path / "calm")

    def meddling(*args: Any, **kwargs: Any) -> Any:
        write_rows(data / "colours" / "train.jsonl", questions(100, 16))
        (data / "colours" / "dev.jsonl.gz").unlink()
        return load_base(*args, **kwargs)

    module = importlib.import_module("bayestune.experiment.run")  # the package has its function by that name
    monkeypatch.setattr(module, "load_base", meddling)
    disturbed = trained(world, data, tmp_path / "disturbed")
    hashes, others = (json.loads((r.output / "result.json").read_text())["sha256"] for r in (calm, disturbed))
    assert hashes == others
    assert [p.ids for p in calm.predictions.values()] == [p.ids for p in disturbed.predictions.values()]
    assert calm.scores == disturbed.scores


@pytest.mark.property("D14")
def test_the_order_of_training_is_over_places_in_the_file(tmp_path: Path) -> None:
    """A function of the seed, the epoch and the rows' lengths by place: a shuffled file is another run."""
    ids = []
    for data in (rows(30), rows(30), rows(30)[::-1]):
        args = arguments(tmp_path, per_device_train_batch_size=4, train_sampling_strategy="group_by_length", seed=7)
        trainer = BayesTrainer(double_blob(), task=TASK, args=args, train_rows=data)
        lengths = [TASK.tokens(TASK.example(row)) for row in data]
        order = [index for batch in trainer.get_train_dataloader() for index in batch["bayestune_row"].tolist()]
        assert order == list(LengthGrouped(lengths, batch_size=4, seed=7))
        ids.append([data[index].id for index in order])
    assert ids[0] == ids[1] != ids[2]
    assert sorted(ids[0]) == sorted(ids[2])


@pytest.mark.property("D14")
def test_predictions_and_scores_follow_the_rows_not_their_places(world: Path, tmp_path: Path, figure: Any) -> None:
    data = write_data(tmp_path / "data")
    trained(world, data, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    asked = loaded.task.rows("dev")
    there, back = (loaded.predict(some, draws=3) for some in (asked, asked[::-1]))
    assert there.ids == tuple(row.id for row in asked) == back.ids[::-1]
    worst = (there.draw_log_probs.exp() - back.draw_log_probs.flip(1).exp()).abs().max().item()
    figure("probabilities of each draw, rows reversed", worst, at_most=1e-6)
    assert there.probs.std(0).max() > 1e-4
