"""Posteriors: distributions over adapter weights, and the folders that keep them."""

from bayestune.posteriors.storage import load_posterior as load_posterior
from bayestune.posteriors.storage import save_posterior as save_posterior
