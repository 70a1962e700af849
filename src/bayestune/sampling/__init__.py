"""How draws of a posterior produce outputs: whole sets of weights, stacked forwards, or draws of the logits."""

from bayestune.sampling.base import Posterior as Posterior
from bayestune.sampling.base import Sampler as Sampler
from bayestune.sampling.posteriors import Point as Point
from bayestune.sampling.posteriors import Variational as Variational
