"""Methods: how posteriors over adapter weights are obtained."""

import os
from collections.abc import Mapping

from torch import nn

from bayestune import storage
from bayestune.methods.anchor import anchor_loss as anchor_loss
from bayestune.methods.ensemble import Ensemble as Ensemble
from bayestune.methods.laplace import Laplace as Laplace
from bayestune.methods.laplace import factor_bytes as factor_bytes
from bayestune.methods.laplace import fit_laplace as fit_laplace
from bayestune.methods.laplace import refuse_if_too_large as refuse_if_too_large
from bayestune.methods.swag import Swag as Swag
from bayestune.methods.swag_callback import SwagCallback as SwagCallback
from bayestune.methods.temperature import fit_temperature as fit_temperature
from bayestune.methods.tfb import SigmaSearch as SigmaSearch
from bayestune.methods.tfb import search_sigma as search_sigma
from bayestune.methods.tfb import tfb as tfb
from bayestune.sampling import Point as Point
from bayestune.sampling import Posterior as Posterior
from bayestune.sampling import Sampler as Sampler
from bayestune.sampling import Variational as Variational
from bayestune.storage import load_posterior as load_posterior
from bayestune.storage import save_posterior as save_posterior

KINDS: Mapping[str, type[Posterior]] = {found.kind: found for found in (Point, Variational, Ensemble, Swag, Laplace)}
"""The posteriors that `load` knows, by the kind in the manifest of their folder."""


def load(base_model: nn.Module, path: str | os.PathLike[str]) -> Posterior:
    """Load a posterior of any kind that `save_posterior` wrote, for `predict`; frozen and in evaluation mode.

    Everything is checked as by `load_posterior`, and every other file of the folder in the same way.

    Raises:
        ConfigError, PosteriorError: as `load_posterior`.
    """
    return storage.load(base_model, path, kinds=KINDS)
