"""Laplace-LoRA."""

from bayestune.methods.laplace.method import Laplace as Laplace
from bayestune.methods.laplace.posterior import LaplacePosterior as LaplacePosterior
from bayestune.methods.laplace.posterior import fit_laplace as fit_laplace
