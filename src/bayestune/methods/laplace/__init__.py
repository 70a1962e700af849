"""Laplace-LoRA."""

from bayestune.methods.laplace.linears import factor_bytes as factor_bytes
from bayestune.methods.laplace.linears import refuse_if_too_large as refuse_if_too_large
from bayestune.methods.laplace.method import Laplace as Laplace
from bayestune.methods.laplace.posterior import LaplacePosterior as LaplacePosterior
from bayestune.methods.laplace.posterior import fit_laplace as fit_laplace
