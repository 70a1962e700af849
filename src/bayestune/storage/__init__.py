"""Save posteriors as folders, whole or not at all, and load them with every byte checked."""

from bayestune.storage.loading import load as load
from bayestune.storage.loading import load_posterior as load_posterior
from bayestune.storage.saving import save_posterior as save_posterior
