"""Random LoRA adapters as a PEFT method. Importing this registers the PEFT type "BAYES_LORA"."""

from bayestune.adapters.config import BayesLoraConfig as BayesLoraConfig
from bayestune.adapters.config import BlobConfig as BlobConfig
from bayestune.adapters.dropout import DropoutLinear as DropoutLinear
from bayestune.adapters.gaussian import GaussianLinear as GaussianLinear
from bayestune.adapters.layers import gaussian_layers as gaussian_layers
from bayestune.adapters.layers import is_merged as is_merged
from bayestune.adapters.layers import mean_std as mean_std
from bayestune.adapters.layers import random_layers as random_layers
from bayestune.adapters.layers import tied_head as tied_head
from bayestune.adapters.model import BayesLoraModel as BayesLoraModel
from bayestune.adapters.noise import TrainingNoise as TrainingNoise
from bayestune.adapters.noise import training_noise as training_noise
from bayestune.adapters.random import RandomLinear as RandomLinear
from bayestune.adapters.random import drawn_weights as drawn_weights
from bayestune.adapters.random import row_major_sizes as row_major_sizes
from bayestune.adapters.registration import register

register(BayesLoraConfig, BayesLoraModel)
