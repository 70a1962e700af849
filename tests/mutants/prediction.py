"""Defects of prediction and scores."""

from mutants.defect import Defect

SCORES = "metrics/scores.py"

DEFECTS = (
    Defect(
        name="average of log-probabilities instead of probabilities",
        path="inference/predict.py",
        before="return self.draw_log_probs.logsumexp(0) - math.log(self.draw_log_probs.shape[0])",
        after="return self.draw_log_probs.mean(0).log_softmax(-1)",
        tests="inference/test_predict.py S16",
    ),
    Defect(
        name="a temperature without effect",
        path="inference/predict.py",
        before="(logits / temperature)",
        after="logits",
        tests="methods/test_ensemble.py temperature",
    ),
    Defect(
        name="answers in the order of their length",
        path="inference/predict.py",
        before="logits[:, places] = _finite",
        after="logits[:, sorted(places)] = _finite",
        tests="inference/test_predict.py N07",
    ),
    Defect(
        name="logits that are no numbers are averaged",
        path="inference/predict.py",
        before="    if bad.any():\n        row",
        after="    if False:\n        row",
        tests="inference/test_unusual_models.py N02",
    ),
    Defect(
        name="confidence 1 in a bin of its own",
        path=SCORES,
        before="_edges(bins)[1:-1], right=True)",
        after="_edges(bins)[1:], right=True)",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="bins closed on the right",
        path=SCORES,
        before="confidence * (1 + EDGE_TOLERANCE)",
        after="confidence * (1 - EDGE_TOLERANCE)",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="Brier score halved",
        path=SCORES,
        before="return (log_probs.exp() - truth).square().sum(1)",
        after="return (log_probs.exp() - truth).square().sum(1) / 2",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="an impossible label clipped",
        path=SCORES,
        before="return -log_probs.gather(1, labels[:, None])[:, 0]",
        after="return -log_probs.gather(1, labels[:, None])[:, 0].clamp(min=-30)",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="rows with NaN pass",
        path=SCORES,
        before="improper = ~((sums - 1).abs() <= SUM_TOLERANCE)",
        after="improper = (sums - 1).abs() > SUM_TOLERANCE",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="ties cut in the order of rows",
        path="metrics/ranking.py",
        before='method="average"',
        after='method="ordinal"',
        tests="test_metrics.py auroc",
    ),
    Defect(
        name="the threshold stops at the first that fails",
        path="metrics/selective.py",
        before="last = int(good[-1])",
        after="last = int(good[0])",
        tests="metrics/test_selective.py threshold",
    ),
    Defect(
        name="antithetic draws that are the same draw twice",
        path="sampling/stacked.py",
        before="(-1) ** k * prediction_noise(",
        after="prediction_noise(",
        tests="sampling/test_variational.py antithetic",
    ),
    Defect(
        name="covariance of logits with G for the standard deviation",
        path="sampling/logit_space.py",
        before="std(layer.rho.detach()).flatten()",
        after="layer.rho.detach().flatten()",
        tests="sampling/test_variational.py covariance",
    ),
    Defect(
        name="covariance of logits instead of their differences",
        path="sampling/logit_space.py",
        before="(vector - first * vector.sum(1, keepdim=True) for vector in others)",
        after="(vector + 0 * first for vector in others)",
        tests="sampling/test_variational.py covariance",
    ),
    Defect(
        name="a root that turns with the signs of eigenvectors",
        path="sampling/logit_space.py",
        before=" @ vectors.transpose(-1, -2)\n",
        after="\n",
        tests="sampling/test_variational.py root",
    ),
)
