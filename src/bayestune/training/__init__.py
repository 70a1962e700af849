"""Training a posterior over adapter weights."""

from bayestune.functional import initial_std as initial_std
from bayestune.training.callbacks import KLCallback as KLCallback
from bayestune.training.checkpoint_files import last_complete as last_complete
from bayestune.training.kl import KLSettings as KLSettings
from bayestune.training.kl import elbo_kl_weight as elbo_kl_weight
from bayestune.training.posterior_std import default_kl as default_kl
from bayestune.training.posterior_std import kl_only_std as kl_only_std
from bayestune.training.posterior_std import kl_rate_for_std as kl_rate_for_std
from bayestune.training.trainer import BayesTrainer as BayesTrainer
