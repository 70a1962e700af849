"""Plain LoRA: the maximum-likelihood adapter, a posterior with one point."""

from bayestune.methods.base import PointMethod


class Mle(PointMethod):
    """Minimizes the mean NLL; answers with one set of weights."""

    name = "mle"
    label = "MLE"
    summary = "plain LoRA, the maximum-likelihood adapter"
    paper = "Hu et al. 2021, LoRA, arXiv 2106.09685"
