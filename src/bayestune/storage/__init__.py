"""Posteriors as folders: saved whole or not at all, and loaded with every byte checked."""

from bayestune.storage.folders import load as load
from bayestune.storage.folders import load_posterior as load_posterior
from bayestune.storage.folders import save_posterior as save_posterior
