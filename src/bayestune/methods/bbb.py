"""Bayes by backprop on LoRA: a Gaussian over A and B."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar

from bayestune.adapters.config import Distribution
from bayestune.methods.base import Line
from bayestune.methods.blob import Blob


class Bbb(Blob):
    """As BLoB, with a Gaussian over B as well: the posterior is over both matrices of every layer."""

    name: ClassVar[str] = "bbb"
    label: ClassVar[str] = "BBB"
    summary: ClassVar[str] = "Bayes by backprop: a Gaussian posterior over A and B"
    paper: ClassVar[str] = "Blundell et al. 2015, arXiv 1505.05424"
    distribution: ClassVar[Distribution] = "gaussian_ab"
    variants: ClassVar[Mapping[str, Line]] = MappingProxyType({})
