"""How the draws of a posterior become logits: whole weights, stacked forwards, or draws of the logits themselves."""

from bayestune.sampling.base import Posterior as Posterior
from bayestune.sampling.base import Sampler as Sampler
from bayestune.sampling.point import Point as Point
from bayestune.sampling.variational import Variational as Variational
