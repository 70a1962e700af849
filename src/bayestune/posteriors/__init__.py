"""Posteriors: distributions over adapter weights, how they are obtained, and the folders that keep them."""

from bayestune.posteriors.base import Posterior as Posterior
from bayestune.posteriors.base import Sampler as Sampler
from bayestune.posteriors.ensemble import Ensemble as Ensemble
from bayestune.posteriors.laplace import Laplace as Laplace
from bayestune.posteriors.laplace import fit_laplace as fit_laplace
from bayestune.posteriors.linears import factor_bytes as factor_bytes
from bayestune.posteriors.linears import refuse_if_too_large as refuse_if_too_large
from bayestune.posteriors.point import Point as Point
from bayestune.posteriors.storage import load as load
from bayestune.posteriors.storage import load_posterior as load_posterior
from bayestune.posteriors.storage import save_posterior as save_posterior
from bayestune.posteriors.swag import Swag as Swag
from bayestune.posteriors.temperature import fit_temperature as fit_temperature
from bayestune.posteriors.tfb import SigmaSearch as SigmaSearch
from bayestune.posteriors.tfb import search_sigma as search_sigma
from bayestune.posteriors.tfb import tfb as tfb
from bayestune.posteriors.variational import Variational as Variational
