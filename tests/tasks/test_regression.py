"""Regression: the likelihood, its curvature, units, predictions and scores, against closed forms and scipy."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from scipy import stats
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import bayestune as bt
from bayestune.adapters import gaussian_layers
from bayestune.errors import ConfigError, DataError, TaskError
from bayestune.methods import LaplacePosterior, Variational, fit_laplace, temperature_of
from bayestune.tasks import NumberRow, RegressionPrediction, read_rows
from bayestune.tasks.base import AnyPrediction
from bayestune.tasks.regression import Noise, Regression
from methods.laplace_cases import jacobians
from models import scatter
from toys import write_rows
from training.toys import arguments

Tokenizers = dict[str, Callable[[], PreTrainedTokenizerFast]]
WORDS = "rain falls on the old red barn while birds sing at noon in May and then again".split()


def numbers(count: int, *, several: bool = False) -> list[dict[str, Any]]:
    """Rows with a number, or two of different units, that follow from the text up to noise."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0)).tolist()
    found = []
    for i in range(count):
        value = 200.0 + 30 * (i % 7) + noise[i]
        target = [value, -value / 1000] if several else value
        found.append({"id": f"n{i}", "text": " ".join(WORDS[i % 7 : i % 7 + 3 + i % 4]), "target": target})
    return found


@pytest.fixture
def make(tokenizers: Tokenizers, tmp_path: Path) -> Callable[..., Regression]:
    """A task on a folder of 20 rows, by its settings."""

    def made(several: bool = False, **settings: Any) -> Regression:
        name = "pairs" if several else "grades"
        write_rows(tmp_path / name / "train.jsonl", numbers(20, several=several))
        task = bt.tasks.regression(name, tokenizers["encoder"](), data=tmp_path, **settings)
        assert isinstance(task, Regression)
        return task

    return made


def bert(task: Regression, *, blob: bool = False) -> PeftModel:
    """A tiny BERT in float64 with a head for the task and a finished adapter, plain or Gaussian."""
    sizes: dict[str, Any] = {"vocab_size": 320, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = BertForSequenceClassification(BertConfig(**sizes, initializer_range=0.3, **task.head))
    lora: dict[str, Any] = {"r": 2, "lora_alpha": 4, "target_modules": ["query", "value"]}
    config = bt.BayesLoraConfig if blob else LoraConfig
    return scatter(get_peft_model(base, config(**lora, modules_to_save=["classifier"])).double()).eval()


def predicted(means: Tensor, variances: Tensor, targets: Tensor | None) -> RegressionPrediction:
    ids = tuple(f"r{i}" for i in range(means.shape[1]))
    return RegressionPrediction(
        ids=ids, draw_means=means, draw_variances=variances, targets=targets, draws=len(means), seed=0, task="made"
    )


def some_draws(draws: int = 4, rows: int = 50, count: int = 2) -> RegressionPrediction:
    generator = torch.Generator().manual_seed(1)
    means, spread = torch.randn(2, draws, rows, count, generator=generator, dtype=torch.float64)
    targets = torch.randn(rows, count, generator=generator, dtype=torch.float64)
    return predicted(means, 0.1 + spread.square(), targets)


# The likelihood.


@pytest.mark.parametrize("noise", ["predicted", "constant"])
def test_the_loss_is_the_density_of_scipy_in_the_unit_of_the_target(
    make: Callable[..., Regression], noise: Noise
) -> None:
    """And so are the metrics of an evaluation during training, and the scores of the mean."""
    task = make(several=True, noise=noise)
    rows = task.rows("train")
    outputs = torch.randn(20, task.columns, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    labels = torch.tensor([task.target(row) for row in rows], dtype=torch.float64)
    found = task.row_loss(outputs, {"labels": labels})
    target = np.array([row.numbers for row in rows])
    mean, std = target.mean(0), target.std(0)
    scale = std * (np.exp(outputs[:, 2:].numpy() / 2) if noise == "predicted" else 1)
    expected = -stats.norm.logpdf(target, mean + std * outputs[:, :2].numpy(), scale).sum(1)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    answer = task.prediction(outputs[None], rows, draws=0, seed=0)
    torch.testing.assert_close(answer.row_nll(), found, rtol=1e-9, atol=1e-9)
    scores = answer.scores(resamples=2)
    during = task.metrics(outputs, labels)
    assert during["nll"] == pytest.approx(scores.nll, rel=1e-9)
    assert task.metrics(outputs[:, :], labels).keys() == {"nll", "rmse"}
    one_number = math.sqrt(((answer.mean - torch.from_numpy(target)) ** 2).mean().item())
    assert during["rmse"] == pytest.approx(one_number, rel=1e-9) and scores.rmse == pytest.approx(one_number, rel=1e-9)


@pytest.mark.parametrize("noise", ["predicted", "constant"])
def test_the_roots_of_the_loss_give_the_fisher_matrix(make: Callable[..., Regression], noise: Noise) -> None:
    """It is the mean of score score^T over y, here by Gauss-Hermite quadrature of the loss's own gradient."""
    task = make(noise=noise)
    outputs = torch.tensor([[0.3, -1.2], [-0.4, 0.8]], dtype=torch.float64)[:, : task.columns]
    nodes, weights = np.polynomial.hermite_e.hermegauss(20)
    mean, log_variance = outputs[:, :1], outputs[:, 1:] if noise == "predicted" else torch.zeros_like(outputs)
    expected = torch.zeros(2, task.columns, task.columns, dtype=torch.float64)
    for node, weight in zip(nodes, weights / weights.sum(), strict=True):
        free = outputs.clone().requires_grad_()
        labels = mean + float(node) * (log_variance / 2).exp()
        (score,) = torch.autograd.grad(task.row_loss(free, {"labels": labels}).sum(), free)
        expected += float(weight) * score[:, :, None] * score[:, None]
    found = sum((root[:, :, None] * root[:, None] for root in task.loss_roots(outputs)), torch.zeros_like(expected))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_other_units_give_the_same_answers_in_them(make: Callable[..., Regression], tmp_path: Path) -> None:
    """y -> 12 y - 7 shifts and scales means and variances, and adds log 12 to the NLL; the loss has the gradient."""
    task = make()
    other = [{**row, "target": 12 * row["target"] - 7} for row in numbers(20)]
    write_rows(tmp_path / "feet" / "train.jsonl", other)
    feet = bt.tasks.regression("feet", task.tokenizer, data=tmp_path)
    assert task.target_mean != feet.target_mean
    outputs = torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    one, two = (each.prediction(outputs, each.rows("train"), draws=3, seed=0) for each in (task, feet))
    torch.testing.assert_close(two.mean, 12 * one.mean - 7)
    for name in ("total", "aleatoric", "epistemic"):
        torch.testing.assert_close(getattr(two, name), 144 * getattr(one, name))
    torch.testing.assert_close(two.quantiles([0.1]), 12 * one.quantiles([0.1]) - 7)
    torch.testing.assert_close(two.row_nll(), one.row_nll() + math.log(12))
    assert two.scores(resamples=2).crps == pytest.approx(12 * one.scores(resamples=2).crps)
    examples = [[each.example(row)["label"] for row in each.rows("train")] for each in (task, feet)]
    torch.testing.assert_close(torch.tensor(examples[0]), torch.tensor(examples[1]))


# Predictions and scores.


def test_the_variances_are_those_of_the_mixture() -> None:
    """E[y^2] - E[y]^2 of the mixture, and without a second draw no epistemic part."""
    answer = some_draws()
    square = (answer.draw_variances + answer.draw_means.square()).mean(0)
    torch.testing.assert_close(answer.total, square - answer.draw_means.mean(0).square())
    assert (some_draws(draws=1).epistemic == 0).all()


def test_the_coverage_counts_the_interval_and_has_its_binomial_error() -> None:
    answer = some_draws()
    assert answer.targets is not None
    low, high = answer.interval()
    inside = ((low <= answer.targets) & (answer.targets <= high)).double().mean().item()
    scores = bt.evaluate(answer, resamples=20)
    assert 0 < inside < 1 and scores.coverage == pytest.approx(inside)
    assert scores.coverage_error == pytest.approx(stats.binom(100, inside).std() / 100)
    crps = bt.metrics.mixture_crps(answer.draw_means, answer.draw_variances.sqrt(), answer.targets)
    assert scores.crps == pytest.approx(crps.mean().item())
    low, high = scores.intervals["rmse"]
    assert low <= scores.rmse <= high and scores.intervals.keys() == scores.headings.keys()


def test_a_row_without_a_target_has_an_answer_and_no_score() -> None:
    answer = dataclasses.replace(some_draws(), targets=None)
    rows = [NumberRow(id=id, text="It rains.") for id in answer.ids]
    assert len(answer.records(rows)) == 50
    with pytest.raises(DataError, match="some rows have no target"):
        bt.evaluate(answer)


@pytest.mark.parametrize("count", [1, 2])
def test_a_record_has_a_number_or_a_list_and_is_known_again(count: int) -> None:
    answer = some_draws(count=count)
    rows = [NumberRow(id=id, text="It rains.") for id in answer.ids]
    records = answer.records(rows)
    assert records[3].keys() == {"id", "mean", "interval", "total", "aleatoric", "epistemic"}
    mean, interval = answer.mean[3].tolist(), answer.interval()[:, 3].T.tolist()
    assert (records[3]["mean"], records[3]["interval"]) == ((mean[0], interval[0]) if count == 1 else (mean, interval))
    std = answer.total[3, 0].sqrt().item()
    for shift, same in ((1e-5 * std, True), (0.1 * std, False)):
        moved = dataclasses.replace(answer, draw_means=answer.draw_means + shift).records(rows)
        assert answer.same_answer(records[3], moved[3]) is same
    assert not answer.same_answer(records[3], {"id": "r3", "probs": [0.5, 0.5]})


def test_the_temperature_of_constant_noise_is_the_mean_squared_residual(make: Callable[..., Regression]) -> None:
    """In units of the target's variance, as the least-squares estimate of the noise is."""
    task = make(noise="constant")
    rows = task.rows("train")
    outputs = torch.randn(1, 20, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    answer = task.prediction(outputs, rows, draws=0, seed=0)
    assert answer.targets is not None
    squares = (answer.mean - answer.targets).square().mean().item()
    found = temperature_of(answer)
    assert found == pytest.approx(squares / task.target_std[0] ** 2, rel=1e-4)  # the NLL is flat at its minimum
    warm = task.prediction(outputs, rows, draws=0, seed=0, temperature=found)
    torch.testing.assert_close(warm.row_nll(), answer.tempered(found).row_nll())
    assert warm.total[0, 0].item() == pytest.approx(squares, rel=1e-4)


def test_a_prediction_without_a_temperature_says_so() -> None:
    class Bare(RegressionPrediction):
        tempered = AnyPrediction.tempered

    with pytest.raises(TaskError, match="task made: its predictions have no temperature"):
        temperature_of(Bare(**vars(some_draws())))


# Posteriors.


def closed_form(task: Regression, model: PeftModel, precision: float) -> tuple[LaplacePosterior, Tensor, Tensor]:
    """The Laplace posterior of a linear head at its mode, and mean and variance of the weights in closed form.

    y = w^T a + N(0, 1) in standard units with w ~ N(0, 1 / precision): the covariance is (A^T A + precision)^-1.
    """
    rows = task.rows("train")
    features = features_of(task, model)
    labels = torch.tensor([task.target(row) for row in rows], dtype=torch.float64)
    covariance = torch.linalg.inv(features.T @ features + precision * torch.eye(8, dtype=torch.float64))
    mean = covariance @ features.T @ labels
    head = dict(model.named_modules())["base_model.model.classifier.modules_to_save.default"]
    with torch.no_grad():
        head.weight.copy_(mean.T)
        head.bias.zero_()
    posterior = fit_laplace(model, task, rows, layers="last", precision=precision, batch_size=7)
    return posterior, mean, covariance


def features_of(task: Regression, model: PeftModel) -> Tensor:
    """What the head of the model reads in each row."""
    caught: list[Tensor] = []
    head = dict(model.named_modules())["base_model.model.classifier.modules_to_save.default"]
    handle = head.register_forward_hook(lambda _, inputs, output: caught.append(inputs[0].detach()))
    with torch.no_grad():
        task.outputs(model, task.collate([task.example(row) for row in task.rows("train")]))
    handle.remove()
    return caught[0]


def test_laplace_of_a_linear_head_is_bayesian_linear_regression(make: Callable[..., Regression]) -> None:
    """The mixture of many draws has the closed form's mean, variances, quantiles and NLL, within standard errors."""
    task, draws = make(noise="constant"), 4000
    model = bert(task)
    posterior, mean, covariance = closed_form(task, model, precision=0.5)
    features = features_of(task, model)
    rows, unit = task.rows("train"), task.target_std[0]
    answer = bt.predict(posterior, task, rows, draws=draws)
    expected = task.target_mean[0] + unit * (features @ mean)[:, 0]
    variance = unit**2 * (features @ covariance * features).sum(1)
    assert (answer.epistemic[:, 0] > 0.01 * unit**2).any()
    error = variance.sqrt() / math.sqrt(draws)
    assert ((answer.mean[:, 0] - expected).abs() <= 5 * error).all()
    assert ((answer.epistemic[:, 0] / variance - 1).abs() <= 5 * math.sqrt(2 / draws)).all()
    torch.testing.assert_close(answer.aleatoric, torch.full_like(answer.aleatoric, unit**2))
    whole = stats.norm(expected.numpy(), (variance + unit**2).sqrt().numpy())
    reached = whole.cdf(answer.quantiles([0.9])[0, :, 0].numpy())
    assert np.abs(reached - 0.9).max() <= 5 * math.sqrt(0.1 * 0.9 / draws)
    nll = -whole.logpdf(np.array([row.numbers for row in rows])[:, 0])
    assert answer.row_nll().numpy() == pytest.approx(nll, abs=5 / math.sqrt(draws))


def test_linearised_draws_move_every_output(make: Callable[..., Regression]) -> None:
    """Their covariance is J diag(Omega^2) J^T, with J by jacrev: for numbers not only differences matter."""
    task, draws = make(), 4000
    model = bert(task, blob=True)
    for layer in gaussian_layers(model).values():
        layer.rho.data.mul_(0.5)
    rows = task.rows("train")[:4]
    batch = task.collate([task.example(row) for row in rows])
    expected = torch.zeros(4, 2, 2, dtype=torch.float64)
    layers = gaussian_layers(model)
    for name, jacobian in jacobians(model, layers, task, batch).items():
        scaled = (jacobian * layers[name].rho.detach() ** 2).flatten(2)
        expected += scaled @ scaled.transpose(1, 2)
    answer = bt.predict(Variational(model, predictive="linearised"), task, rows, draws=draws)
    found = answer.draw_means[..., 0].var(0) / task.target_std[0] ** 2
    assert ((found / expected[:, 0, 0] - 1).abs() <= 5 * math.sqrt(2 / draws)).all()
    logs = answer.draw_variances[..., 0].log().var(0)
    assert ((logs / expected[:, 1, 1] - 1).abs() <= 5 * math.sqrt(2 / draws)).all()


def test_training_lowers_the_nll_and_says_what_evaluate_says(make: Callable[..., Regression], tmp_path: Path) -> None:
    task = make(several=True)
    model, rows = bert(task, blob=True).float().train(), task.rows("train")
    before = bt.evaluate(bt.predict(model, task, rows, draws=0))
    settings = arguments(tmp_path, max_steps=40, learning_rate=1e-2, per_device_train_batch_size=10)
    trainer = bt.BayesTrainer(model, task=task, args=settings, train_rows=rows, eval_rows=rows)
    trainer.train()
    after = bt.evaluate(bt.predict(model, task, rows, draws=0))
    assert after.nll < before.nll
    during = trainer.evaluate()
    assert during["eval_nll"] == pytest.approx(after.nll, abs=1e-4)
    assert during["eval_rmse"] == pytest.approx(after.rmse, rel=1e-4)


# What is refused.


@pytest.mark.property("D08")
@pytest.mark.parametrize(
    ("target", "found"),
    [
        ('"a"', "found 'a', expected a number or a list of numbers"),
        ("true", "found True, expected a number"),
        ("null", "found None, expected a number"),
        ("[1, null]", r"found \[1, None\], expected a number or a list of numbers"),
        ("[]", r"found \(\), expected one or more numbers, each of them finite"),
        ("1e999", "found inf, expected one or more numbers, each of them finite"),
        ("9" * 400, "expected numbers that a float can hold"),
    ],
)
def test_a_target_that_is_no_number_is_refused_by_name(tmp_path: Path, target: str, found: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"id": "good", "text": "x", "target": 1}\n{"id": "bad", "text": "x", "target": ' + target + "}\n")
    with pytest.raises(DataError, match=rf"bad.jsonl:2 \(id bad\): field 'target': .*{found}"):
        read_rows(path)


def test_rows_of_one_data_set_have_as_many_numbers(make: Callable[..., Regression], tmp_path: Path) -> None:
    task = make()
    with pytest.raises(DataError, match=r"\(id r\): field 'target': found 2 numbers, expected 1 per row of grades"):
        task.check([NumberRow(id="r", text="It rains.", target=(1.0, 2.0))])
    mixed = write_rows(tmp_path / "m.jsonl", [*numbers(1), {**numbers(2)[1], "target": [3.0]}])
    with pytest.raises(DataError, match=r"m.jsonl:2 \(id n1\): field 'target': found \(3.0,\), expected a number"):
        read_rows(mixed)


def test_rows_without_a_label_are_what_the_rows_with_one_are(tokenizers: Tokenizers, tmp_path: Path) -> None:
    """Sentences with classes and sentences with numbers have the same texts."""
    unlabelled = [{"id": "u", "text": "It rains."}]
    write_rows(tmp_path / "grades" / "train.jsonl", numbers(3))
    write_rows(tmp_path / "grades" / "dev.jsonl", [*unlabelled, *numbers(2)])
    task = bt.tasks.regression("grades", tokenizers["encoder"](), data=tmp_path)
    with pytest.raises(DataError, match=r"dev.jsonl:1 \(id u\): field 'target': found nothing, expected a number"):
        task.rows("dev")
    (row,) = read_rows(write_rows(tmp_path / "u.jsonl", unlabelled), labelled=False)
    with pytest.raises(DataError, match=r"field 'target': found a TextRow, expected a NumberRow, as grades has"):
        task.check([row])
    task.check(read_rows(tmp_path / "u.jsonl", labelled=False, formats=(NumberRow,)))
    both = write_rows(tmp_path / "both.jsonl", [{"id": "b", "text": "x", "label": 1, "target": "ignored"}])
    assert read_rows(both)[0].target == 1


def test_settings_that_do_not_fit_are_refused(make: Callable[..., Regression], tmp_path: Path) -> None:
    task = make()
    first = task.rows("train")[0]
    assert make(target_mean=(1.0,), target_std=(2.0,)).target(first) == [(first.target - 1) / 2]
    with pytest.raises(ConfigError, match="target_mean and target_std: found one of them"):
        make(target_mean=(1.0,))
    with pytest.raises(ConfigError, match="target_mean and target_std: found 2 and 1 numbers, expected 2"):
        make(target_mean=(1.0, 2.0), target_std=(1.0,))
    with pytest.raises(ConfigError, match="target_std: found 0.0, expected numbers above 0"):
        make(target_mean=(1.0,), target_std=(0.0,))
    with pytest.raises(ConfigError, match="noise: found 'none', expected one of predicted, constant"):
        make(noise="none")
    write_rows(tmp_path / "same" / "train.jsonl", [{**row, "target": 5.0} for row in numbers(3)])
    with pytest.raises(DataError, match="same: found the same number in all 3 rows of split 'train'"):
        bt.tasks.regression("same", task.tokenizer, data=tmp_path)
    write_rows(tmp_path / "classes" / "train.jsonl", [{"id": f"{i}", "text": "x", "label": i} for i in range(2)])
    with pytest.raises(TaskError, match="classes: found sentence rows, expected rows with 'target'"):
        bt.tasks.regression("classes", task.tokenizer, data=tmp_path)
    with pytest.raises(TaskError, match="grades: the model has 4 labels, expected 2; load it with num_labels=2"):
        task.outputs(bert(make(several=True)), task.collate([task.example(row) for row in task.rows("train")]))
    with pytest.raises(ConfigError, match="laplace: found predictive 'probit' for task grades without classes"):
        fit_laplace(bert(task), task, task.rows("train"), predictive="probit")
    with pytest.raises(ConfigError, match="tfb: found task grades without classes"):
        bt.methods.anchor_loss(task, task.rows("train"))
    with pytest.raises(DataError, match=r"diagnostics: found 4 draws of 50 rows, expected .* of classes"):
        bt.diagnostics(bert(task), some_draws())
