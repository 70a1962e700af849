"""Metrics against short float64 oracles, exact rational arithmetic, torchmetrics, scikit-learn and simulation."""

import importlib.util
import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
import sklearn.metrics
import torch
import torchmetrics.functional.classification as tm
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from bayestune import metrics
from bayestune.errors import ConfigError, DataError
from bayestune.metrics import bootstrap, calibration, ranking

BINS = 15
SCORES = (metrics.accuracy, metrics.nll, metrics.ece, metrics.brier)


def oracle_accuracy(probs, labels):
    return float(np.mean([row.argmax() == label for row, label in zip(probs, labels, strict=True)]))


def oracle_nll(probs, labels):
    return float(np.mean([-math.log(row[label]) for row, label in zip(probs, labels, strict=True)]))


def oracle_brier(probs, labels):
    return float(
        np.mean([((row - np.eye(len(row))[label]) ** 2).sum() for row, label in zip(probs, labels, strict=True)])
    )


def oracle_ece(probs, labels, where, bins=BINS):
    """`where` is the bin of each row, found by the caller on the probabilities, without a logarithm."""
    confidence, correct, total = probs.max(1), probs.argmax(1) == labels, 0.0
    for b in range(bins):
        inside = np.array([w == b for w in where])
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return float(total)


def assert_oracles(probs, labels, where):
    log_probs, marks = torch.from_numpy(np.log(probs)), torch.from_numpy(labels)
    assert metrics.accuracy(log_probs, marks) == pytest.approx(oracle_accuracy(probs, labels), abs=1e-12)
    assert metrics.nll(log_probs, marks) == pytest.approx(oracle_nll(probs, labels), abs=1e-9)
    assert metrics.brier(log_probs, marks) == pytest.approx(oracle_brier(probs, labels), abs=1e-9)
    assert metrics.ece(log_probs, marks) == pytest.approx(oracle_ece(probs, labels, where), abs=1e-9)


def unchecked_module(module):
    """The module again, without the run-time check of annotations."""
    spec = importlib.util.spec_from_file_location("unchecked", module.__file__)
    unchecked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unchecked)
    return unchecked


def simulated(rows, classes, scale=2.0, seed=0):
    """Overconfident predictions: float64 log-probabilities, and labels drawn from a flatter distribution."""
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(rows, classes, dtype=torch.float64, generator=generator)
    labels = torch.multinomial((logits / 2).softmax(1), 1, generator=generator)[:, 0]
    return logits.log_softmax(1), labels


@st.composite
def whole_weights(draw):
    """Rows of whole-number weights: their confidences are rational, fall on bin edges often, and reach 0 and 1."""
    classes, rows = draw(st.integers(1, 5)), draw(st.integers(1, 40))
    weights = draw(arrays(np.int64, (rows, classes), elements=st.integers(0, 15)))
    weights[weights.sum(1) == 0] = 1
    labels = draw(arrays(np.int64, rows, elements=st.integers(0, classes - 1)))
    return weights, labels


@pytest.mark.property("S19")
@given(whole_weights())
@settings(deadline=None, derandomize=True)
def test_metrics_equal_the_oracles_where_bins_are_exact_fractions(case):
    weights, labels = case
    bins = [min(int(Fraction(int(row.max()), int(row.sum())) * BINS), BINS - 1) for row in weights]
    probs = weights / weights.sum(1, keepdims=True)
    log_probs, marks = (
        torch.from_numpy(np.where(probs > 0, np.log(np.maximum(probs, 1e-300)), -np.inf)),
        torch.tensor(labels),
    )
    assert metrics.ece(log_probs, marks) == pytest.approx(oracle_ece(probs, labels, bins), abs=1e-9)
    assert metrics.brier(log_probs, marks) == pytest.approx(oracle_brier(probs, labels), abs=1e-9)
    assert metrics.accuracy(log_probs, marks) == pytest.approx(oracle_accuracy(probs, labels), abs=1e-12)
    impossible = int((probs[np.arange(len(labels)), labels] == 0).sum())
    assert metrics.impossible_labels(log_probs, marks) == impossible
    expected = math.inf if impossible else oracle_nll(probs, labels)
    assert metrics.nll(log_probs, marks) == pytest.approx(expected, abs=1e-9)
    assert metrics.reliability_bins(log_probs, marks).counts.tolist() == np.bincount(bins, minlength=BINS).tolist()


@pytest.mark.property("S19")
@given(st.data(), st.integers(1, 60), st.integers(1, 6))
@settings(deadline=None, derandomize=True)
def test_metrics_equal_the_oracles_on_any_logits(data, rows, classes):
    logits = data.draw(arrays(np.float64, (rows, classes), elements=st.floats(-300, 300)))
    labels = data.draw(arrays(np.int64, rows, elements=st.integers(0, classes - 1)))
    probs = np.exp(logits - logits.max(1, keepdims=True))
    probs /= probs.sum(1, keepdims=True)
    where = np.minimum((probs.max(1) * (1 + metrics.EDGE_TOLERANCE) * BINS).astype(int), BINS - 1)
    assert_oracles(probs, labels, where)


@pytest.mark.property("S19")
@pytest.mark.parametrize("bins", [1, 2, 10, 15, 20, 39])
def test_a_confidence_on_an_edge_is_in_the_bin_that_it_opens(bins):
    def bin_of(confidence):
        probs = torch.full((1, bins + 1), (1 - confidence) / bins, dtype=torch.float64)
        probs[0, 0] = confidence
        return metrics.reliability_bins(probs.log(), torch.tensor([0]), bins=bins).counts.nonzero().item()

    for k in range(1, bins):
        assert bin_of(k / bins) == k
        assert bin_of(k / bins - 1e-9) == k - 1
    assert bin_of(1.0) == bins - 1


@pytest.mark.property("S19")
def test_confidence_of_exactly_one_shares_the_last_bin():
    # One wrong row at 0.98 and one right row at 1.0: in one bin |0.5 - 0.99|, in two (0.98 + 0) / 2.
    log_probs = torch.tensor([[0.98, 0.02], [1.0, 0.0]], dtype=torch.float64).log()
    assert metrics.ece(log_probs, torch.tensor([1, 0])) == pytest.approx(0.49, abs=1e-12)


@pytest.mark.property("S19")
def test_saturated_float32_softmax():
    generator = torch.Generator().manual_seed(3)
    logits = 40 * torch.randn(400, 4, generator=generator)
    labels = torch.randint(4, (400,), generator=generator)
    log_probs = logits.log_softmax(1)
    probs = log_probs.double().exp().numpy()
    saturated = (probs.max(1) == 1.0).mean()
    assert saturated > 0.4
    where = np.minimum(np.floor(probs.max(1) * BINS), BINS - 1)
    assert metrics.ece(log_probs, labels) == pytest.approx(oracle_ece(probs, labels.numpy(), where), abs=1e-9)
    exact = torch.nn.functional.cross_entropy(log_probs.double(), labels).item()
    assert metrics.nll(log_probs, labels) == pytest.approx(exact, rel=1e-6)
    assert metrics.impossible_labels(log_probs, labels) == 0


@pytest.mark.property("S19")
def test_tied_rows_answer_the_first_class():
    log_probs = torch.full((6, 3), 1 / 3, dtype=torch.float64).log()
    labels = torch.tensor([0, 0, 1, 2, 2, 1])
    assert metrics.accuracy(log_probs, labels) == pytest.approx(1 / 3)
    assert metrics.ece(log_probs, labels) == pytest.approx(0, abs=1e-12)
    assert metrics.reliability_bins(log_probs, labels).counts[5] == 6


@pytest.mark.property("S19")
def test_one_row_and_one_class():
    assert [score(torch.zeros(1, 1), torch.tensor([0])) for score in SCORES] == [1, 0, 0, 0]
    log_probs = torch.tensor([[0.25, 0.75]], dtype=torch.float64).log()
    found = [score(log_probs, torch.tensor([0])) for score in SCORES]
    assert found == pytest.approx([0, math.log(4), 0.75, 2 * 0.75**2], abs=1e-12)


@pytest.mark.property("S19")
def test_one_label_only():
    log_probs, _ = simulated(50, 3)
    labels = torch.full((50,), 2)
    probs = log_probs.exp().numpy()
    assert_oracles(probs, labels.numpy(), np.floor(probs.max(1) * BINS))


@pytest.mark.property("S19")
def test_zero_probability_on_the_label_is_infinite_and_counted():
    log_probs = torch.tensor([[0.0, -math.inf], [math.log(0.5), math.log(0.5)], [-math.inf, 0.0]])
    labels = torch.tensor([1, 0, 0])
    assert metrics.nll(log_probs, labels) == math.inf
    assert metrics.impossible_labels(log_probs, labels) == 2
    assert metrics.row_nll(log_probs, labels).tolist() == pytest.approx([math.inf, math.log(2), math.inf])
    assert metrics.brier(log_probs, labels) == pytest.approx((2 + 0.5 + 2) / 3)


@pytest.mark.property("S19")
def test_reliability_bins_sum_to_the_ece_and_are_nan_where_empty():
    log_probs, labels = simulated(200, 2)
    found = metrics.reliability_bins(log_probs, labels)
    assert found.counts.sum() == 200 and found.edges.tolist() == [k / 15 for k in range(16)]
    assert found.confidence[:7].isnan().all() and found.accuracy[:7].isnan().all()
    total = (found.counts * (found.accuracy - found.confidence).abs()).nansum() / 200
    assert metrics.ece(log_probs, labels) == pytest.approx(total.item(), abs=1e-12)


@pytest.mark.property("S19")
@pytest.mark.nightly
def test_a_million_rows_in_any_order(nightly_seed, figure):
    """As many as no loop of Python sums: each score against the same by numpy, in float64."""
    rows, classes = 1_000_000, 3
    log_probs, labels = simulated(rows, classes, seed=nightly_seed)
    probs, marks = log_probs.exp().numpy(), labels.numpy()
    confidence, correct = probs.max(1), probs.argmax(1) == marks
    where = np.minimum(np.floor(confidence * BINS).astype(int), BINS - 1)
    gaps = np.bincount(where, correct - confidence, minlength=BINS)
    expected = {
        "accuracy": correct.mean(),
        "nll": -np.log(probs[np.arange(rows), marks]).mean(),
        "ece": np.abs(gaps).sum() / rows,
        "brier": (np.square(probs).sum(1) - 2 * probs[np.arange(rows), marks] + 1).mean(),
    }
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(0))
    for score in SCORES:
        for found in (score(log_probs, labels), score(log_probs[order], labels[order])):
            error = abs(found / expected[score.__name__] - 1)
            figure(f"{score.__name__} of a million rows, relative error", error, at_most=1e-9)


@pytest.mark.property("S19")
@pytest.mark.parametrize("classes", [2, 5])
def test_agrees_with_torchmetrics_and_scikit_learn(classes):
    log_probs, labels = simulated(1000, classes)
    # torchmetrics gives a confidence of exactly 1 a bin of its own; there are none here.
    assert log_probs.max() < 0
    probs = log_probs.exp()
    reference = tm.multiclass_calibration_error(probs, labels, num_classes=classes, n_bins=BINS, norm="l1")
    assert metrics.ece(log_probs, labels) == pytest.approx(reference.item(), abs=1e-7)
    reference = tm.multiclass_accuracy(probs, labels, num_classes=classes, average="micro")
    assert metrics.accuracy(log_probs, labels) == pytest.approx(reference.item(), abs=1e-7)
    names, predicted = range(classes), probs.argmax(1)
    assert metrics.accuracy(log_probs, labels) == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    assert metrics.nll(log_probs, labels) == pytest.approx(
        sklearn.metrics.log_loss(labels, probs, labels=names), abs=1e-9
    )
    reference = sklearn.metrics.brier_score_loss(labels, probs, labels=names, scale_by_half=False)
    assert metrics.brier(log_probs, labels) == pytest.approx(reference, abs=1e-9)


@pytest.mark.property("S19")
@given(st.data(), st.integers(2, 40))
@settings(deadline=None, derandomize=True)
def test_auroc_is_the_share_of_pairs_in_order(data, rows):
    scores = data.draw(arrays(np.float64, rows, elements=st.sampled_from([-math.inf, -1, 0, 0.5, 2, math.inf])))
    positives = data.draw(arrays(np.bool_, rows))
    positives[:2] = [True, False]
    pairs = [(p > n) + (p == n) / 2 for p in scores[positives] for n in scores[~positives]]
    assert metrics.auroc(torch.tensor(scores), torch.tensor(positives)) == pytest.approx(np.mean(pairs), abs=1e-12)


@pytest.mark.property("S19")
def test_auroc_agrees_with_torchmetrics_and_scikit_learn():
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(2000, generator=generator, dtype=torch.float64).round(decimals=1)
    positives = scores + torch.randn(2000, generator=generator) > 0.3
    found = metrics.auroc(scores, positives.long())
    assert found == pytest.approx(sklearn.metrics.roc_auc_score(positives, scores), abs=1e-12)
    assert found == pytest.approx(tm.binary_auroc(scores, positives.long()).item(), abs=1e-6)


@pytest.mark.property("S19")
@pytest.mark.parametrize(
    ("value", "name"),
    [
        ([math.nan, -1.0], "nan"),
        ([math.inf, -1.0], "inf"),
        ([math.log(0.7), math.log(0.2)], "0.9"),
        ([0.7, 0.3], "3.36"),
        ([0.002, -math.inf], "1.002"),
        ([-math.inf, -math.inf], "to 0,"),
    ],
    ids=["nan", "inf", "short", "probabilities", "above-one", "all-masked"],
)
def test_a_row_that_is_no_distribution_is_named(value, name):
    log_probs = torch.full((9, 2), math.log(0.5))
    log_probs[4] = torch.tensor(value)
    log_probs[7] = math.nan
    functions = (*SCORES, metrics.impossible_labels, metrics.reliability_bins, metrics.intervals)
    for function in functions:
        with pytest.raises(DataError, match=f"row 4 .*{name}") as caught:
            function(log_probs, torch.zeros(9, dtype=torch.int64))
        assert isinstance(caught.value, ValueError)


@pytest.mark.property("S19")
def test_a_negative_probability_is_named_by_its_row():
    probs = torch.tensor([[0.5, 0.5], [1.2, -0.2], [0.5, 0.5]])
    with pytest.raises(DataError, match="row 1 "):
        metrics.nll(probs.log(), torch.tensor([0, 0, 0]))


@pytest.mark.property("S19")
def test_a_sum_within_a_thousandth_passes():
    assert metrics.brier(torch.tensor([[0.6004, 0.4004]]).log(), torch.tensor([0])) > 0


@pytest.mark.property("S19")
@pytest.mark.parametrize("label", [-1, 2, -100])
def test_a_label_that_is_no_class_is_named(label):
    log_probs, labels = simulated(6, 2)
    labels[3] = label
    with pytest.raises(DataError, match=f"row 3 is {label}, expected 0 to 1"):
        metrics.accuracy(log_probs, labels)


@pytest.mark.property("S19")
def test_no_rows_is_an_error():
    for function in (*SCORES, metrics.reliability_bins, metrics.intervals):
        with pytest.raises(DataError, match="at least one row"):
            function(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
        with pytest.raises(DataError, match="one class"):
            function(torch.zeros(3, 0), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(DataError, match="at least one row"):
        metrics.bootstrap_interval(torch.zeros(0))


@pytest.mark.property("S19")
def test_wrong_shapes_and_types_are_errors_without_a_type_checker():
    unchecked = unchecked_module(calibration)
    log_probs, labels = simulated(4, 2)
    for bad_log_probs, bad_labels in (
        (log_probs, labels[:3]),
        (log_probs[0], labels),
        (log_probs, labels.double()),
        (log_probs, labels > 0),
        (log_probs.long(), labels),
    ):
        with pytest.raises(DataError, match="expected"):
            unchecked.ece(bad_log_probs, bad_labels)
    with pytest.raises(DataError, match="expected both"):
        unchecked_module(ranking).auroc(log_probs[:, 0], labels[:3])
    with pytest.raises(DataError, match="expected \\[rows\\]"):
        unchecked_module(bootstrap).bootstrap_interval(log_probs)


@pytest.mark.property("S19")
def test_auroc_errors_name_what_was_found():
    with pytest.raises(DataError, match="row 1 is NaN"):
        metrics.auroc(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))
    with pytest.raises(DataError, match="row 1 is 2, expected 0 or 1"):
        metrics.auroc(torch.tensor([0.0, 1.0]), torch.tensor([0, 2]))
    for positives in (torch.tensor([True, True]), torch.tensor([False, False])):
        with pytest.raises(DataError, match="at least one of each"):
            metrics.auroc(torch.tensor([0.0, 1.0]), positives)


def test_settings_that_cannot_be_right_are_refused():
    log_probs, labels = simulated(4, 2)
    for bad in ({"level": 0.0}, {"level": 1.0}, {"level": math.nan}, {"resamples": 0}, {"seed": -1}, {"bins": 0}):
        with pytest.raises(ConfigError, match="expected"):
            metrics.intervals(log_probs, labels, **bad)


@pytest.mark.property("S20")
@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_metric_is_an_average_over_rows(batch_size, figure):
    log_probs, labels = simulated(101, 4)
    order = torch.randperm(101, generator=torch.Generator().manual_seed(0))
    for score in SCORES:
        assert score(log_probs[order], labels[order]) == pytest.approx(score(log_probs, labels), abs=1e-12)
    for score in (metrics.accuracy, metrics.nll, metrics.brier):
        parts = zip(log_probs[order].split(batch_size), labels[order].split(batch_size), strict=True)
        weighted = sum(len(y) * score(p, y) for p, y in parts) / 101
        error = abs(weighted - score(log_probs, labels))
        figure(f"{score.__name__} of batches of 1, 7 and 64 less that of all rows", error, at_most=1e-9)


@pytest.mark.property("S20")
def test_metrics_leave_their_input_alone_and_read_half_the_precision():
    log_probs, labels = simulated(64, 3)
    kept = log_probs.clone()
    low = log_probs.float()
    for score in SCORES:
        assert score(low, labels.int()) == pytest.approx(score(log_probs, labels), abs=1e-6)
    metrics.intervals(log_probs, labels, resamples=5)
    assert torch.equal(log_probs, kept)


@pytest.mark.property("S21")
def test_intervals_equal_a_loop_over_resampled_rows():
    log_probs, labels = simulated(37, 3)
    drawn = np.random.Generator(np.random.PCG64(5)).integers(37, size=(200, 37))
    found = metrics.intervals(log_probs, labels, resamples=200, level=0.9, seed=5)
    for score in SCORES:
        ordered = sorted(score(log_probs[rows], labels[rows]) for rows in torch.from_numpy(drawn))
        # (199 ranks) x 0.05 = 9.95, outwards: the 10th smallest and the 10th largest.
        assert found[score.__name__] == pytest.approx((ordered[9], ordered[-10]), abs=1e-12)


@pytest.mark.property("S21")
def test_intervals_are_keyed_by_the_seed_and_move_no_global_state(monkeypatch):
    log_probs, labels = simulated(50, 3)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    found = metrics.intervals(log_probs, labels, seed=1)
    assert found == metrics.intervals(log_probs, labels, seed=1)
    assert found["nll"] != metrics.intervals(log_probs, labels, seed=2)["nll"]
    assert metrics.bootstrap_interval(metrics.row_nll(log_probs, labels), seed=1) == pytest.approx(found["nll"])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    monkeypatch.setattr(bootstrap, "_COUNTS_HELD", 50 * 7)
    in_blocks = metrics.intervals(log_probs, labels, seed=1)
    for name, ends in found.items():
        assert in_blocks[name] == pytest.approx(ends, abs=1e-12)


@pytest.mark.property("S21")
def test_interval_of_a_mean_has_the_width_of_the_normal_law():
    values = torch.randn(2000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = metrics.bootstrap_interval(values, resamples=10_000)
    error = values.std(correction=0).item() / math.sqrt(2000)
    # The standard error of a 2.5 % quantile of 10,000 normals is sqrt(.025 x .975 / 10,000) / density(1.96) = 0.0267.
    assert (low - values.mean().item()) / error == pytest.approx(-1.96, abs=4 * 0.0267)
    assert (high - values.mean().item()) / error == pytest.approx(1.96, abs=4 * 0.0267)


@pytest.mark.property("S21")
def test_infinite_rows_make_an_infinite_end_and_never_nan():
    values = torch.ones(50)
    values[7] = math.inf
    # A resample misses the row with probability 0.36, so the lower end is finite and the upper is not.
    assert metrics.bootstrap_interval(values) == (1.0, math.inf)
    assert metrics.bootstrap_interval(torch.tensor([math.inf])) == (math.inf, math.inf)
    assert metrics.bootstrap_interval(torch.tensor([2.0])) == (2.0, 2.0)
    for bad in (math.nan, -math.inf):
        with pytest.raises(DataError, match="row 1 is"):
            metrics.bootstrap_interval(torch.tensor([0.0, bad]))


@pytest.mark.property("S21")
def test_intervals_cover_the_truth(figure):
    """Four kinds of rows, all overconfident, so that each truth is known and every bin is clearly off."""
    data_sets, rows = 2000, 200
    confidence = torch.tensor([0.55, 0.7, 0.85, 0.97], dtype=torch.float64)
    right = torch.tensor([0.2, 0.35, 0.5, 0.6], dtype=torch.float64)
    pairs = torch.stack([confidence, 1 - confidence], 1)
    truth = {
        "accuracy": right.mean(),
        "nll": -(right * pairs[:, 0].log() + (1 - right) * pairs[:, 1].log()).mean(),
        "ece": (confidence - right).mean(),
        "brier": 2 * (right * (1 - confidence) ** 2 + (1 - right) * confidence**2).mean(),
    }
    generator = torch.Generator().manual_seed(21)
    covered = dict.fromkeys(truth, 0)
    for data_set in range(data_sets):
        kind = torch.randint(4, (rows,), generator=generator)
        labels = (torch.rand(rows, generator=generator, dtype=torch.float64) >= right[kind]).long()
        found = metrics.intervals(pairs[kind].log(), labels, resamples=400, seed=data_set)
        for name, (low, high) in found.items():
            covered[name] += low <= truth[name].item() <= high
    # Four standard errors of a share of 0.95 among 2,000. The percentile interval of 200 rows itself covers 94.5 %.
    bound = 4 * math.sqrt(0.95 * 0.05 / data_sets)
    for name, count in covered.items():
        figure(f"coverage of 95 % intervals of {name}, less 0.95", abs(count / data_sets - 0.95), at_most=bound)
