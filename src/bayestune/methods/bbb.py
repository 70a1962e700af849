"""Bayes by backprop on LoRA: a Gaussian over A and B."""

from types import MappingProxyType

from bayestune.methods.blob import Blob


class Bbb(Blob):
    """Like BLoB, but with a Gaussian over B too: the posterior is over both matrices of every layer."""

    name = "bbb"
    label = "BBB"
    summary = "Bayes by backprop: a Gaussian posterior over A and B"
    paper = "Blundell et al. 2015, arXiv 1505.05424"
    distribution = "gaussian_ab"
    variants = MappingProxyType({})
