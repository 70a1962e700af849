"""Bayesian LoRA fine-tuning: train a posterior over adapters, get calibrated answers, keep it as a file, serve it.

Importing this package registers the PEFT type "BAYES_LORA". Without torch, only `bayestune.serving.Client`
can be imported.
"""

from importlib.util import find_spec

from bayestune import serving as serving

if find_spec("torch") is not None:
    from bayestune import methods as methods
    from bayestune import metrics as metrics
    from bayestune import tasks as tasks
    from bayestune.adapters import BayesLoraConfig as BayesLoraConfig
    from bayestune.adapters import BlobConfig as BlobConfig
    from bayestune.experiment import Experiment as Experiment
    from bayestune.inference import Generation as Generation
    from bayestune.inference import Prediction as Prediction
    from bayestune.inference import Scores as Scores
    from bayestune.inference import answer_scores as answer_scores
    from bayestune.inference import best_of_n as best_of_n
    from bayestune.inference import diagnostics as diagnostics
    from bayestune.inference import draw as draw
    from bayestune.inference import evaluate as evaluate
    from bayestune.inference import generate as generate
    from bayestune.inference import novelty as novelty
    from bayestune.inference import predict as predict
    from bayestune.inference import rewards as rewards
    from bayestune.inference import score as score
    from bayestune.serving import export_lora as export_lora
    from bayestune.storage import load_posterior as load_posterior
    from bayestune.storage import save_posterior as save_posterior
    from bayestune.training import BayesTrainer as BayesTrainer
    from bayestune.training import KLCallback as KLCallback
    from bayestune.training import KLSettings as KLSettings
