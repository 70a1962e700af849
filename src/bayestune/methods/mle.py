"""Plain LoRA: the adapter of maximum likelihood, a posterior of one point."""

from typing import ClassVar

from bayestune.methods.base import PointMethod


class Mle(PointMethod):
    """Minimizes the mean NLL; answers with one set of weights."""

    name: ClassVar[str] = "mle"
    label: ClassVar[str] = "MLE"
    summary: ClassVar[str] = "plain LoRA, the maximum-likelihood adapter"
    paper: ClassVar[str] = "Hu et al. 2021, LoRA, arXiv 2106.09685"
