"""The methods that obtain posteriors over adapter weights. `METHODS` lists all of them."""

import os

from torch import nn

from bayestune import storage
from bayestune.methods.base import Fitting as Fitting
from bayestune.methods.base import Line as Line
from bayestune.methods.base import Method as Method
from bayestune.methods.base import PointMethod as PointMethod
from bayestune.methods.base import PostHocMethod as PostHocMethod
from bayestune.methods.base import Updates as Updates
from bayestune.methods.bbb import Bbb as Bbb
from bayestune.methods.blob import Blob as Blob
from bayestune.methods.distilled import Distilled as Distilled
from bayestune.methods.dropout import Dropout as Dropout
from bayestune.methods.ensemble import Ensemble as Ensemble
from bayestune.methods.ensemble import EnsemblePosterior as EnsemblePosterior
from bayestune.methods.ivon import Ivon as Ivon
from bayestune.methods.ivon import IvonCallback as IvonCallback
from bayestune.methods.ivon import IvonOptimizer as IvonOptimizer
from bayestune.methods.ivon import ivon_posterior as ivon_posterior
from bayestune.methods.laplace import Laplace as Laplace
from bayestune.methods.laplace import LaplacePosterior as LaplacePosterior
from bayestune.methods.laplace import fit_laplace as fit_laplace
from bayestune.methods.map import Map as Map
from bayestune.methods.mle import Mle as Mle
from bayestune.methods.scale import ScaleSearch as ScaleSearch
from bayestune.methods.scale import fit_scale as fit_scale
from bayestune.methods.search import SigmaSearch as SigmaSearch
from bayestune.methods.search import search_sigma as search_sigma
from bayestune.methods.swag import Swag as Swag
from bayestune.methods.swag import SwagCallback as SwagCallback
from bayestune.methods.swag import SwagPosterior as SwagPosterior
from bayestune.methods.temperature import Temperature as Temperature
from bayestune.methods.temperature import fit_temperature as fit_temperature
from bayestune.methods.temperature import temperature_of as temperature_of
from bayestune.methods.tfb import Tfb as Tfb
from bayestune.methods.tfb import anchor_loss as anchor_loss
from bayestune.methods.tfb import fit_tfb as fit_tfb
from bayestune.sampling import Point as Point
from bayestune.sampling import Posterior as Posterior
from bayestune.sampling import Sampler as Sampler
from bayestune.sampling import Variational as Variational
from bayestune.storage import load_posterior as load_posterior
from bayestune.storage import save_posterior as save_posterior

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (Mle, Map, Dropout, Ensemble, Bbb, Laplace, Swag, Tfb, Temperature, Ivon, Distilled, Blob)
}
"""Every method by its name, in the order of a table's lines. Add your own with `register`."""

DEFAULT: type[Method] = Blob


def register(method: type[Method]) -> type[Method]:
    """Add your own method to `METHODS`, replacing one of the same name; usable as a decorator."""
    METHODS[method.name] = method
    return method


def load(base_model: nn.Module, path: str | os.PathLike[str]) -> Posterior:
    """Load a posterior of any method that `save_posterior` wrote; frozen, in evaluation mode, ready for `predict`.

    Every file of the folder is checked, as in `load_posterior`.

    Args:
        base_model: the pretrained model, without adapters; it is modified in place.
        path: the folder.

    Raises:
        ConfigError: `base_model` already carries an adapter.
        PosteriorError: the folder is incomplete, altered, of a newer format, or made for another base.
    """
    kinds = {method.posterior.kind: method.posterior for method in METHODS.values()}
    return storage.load(base_model, path, kinds=kinds)
