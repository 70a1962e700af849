"""Draws, predictions and their scores."""

from bayestune.inference.acquire import acquire as acquire
from bayestune.inference.draws import draw as draw
from bayestune.inference.evaluate import evaluate as evaluate
from bayestune.inference.predict import predict as predict
from bayestune.tasks import Prediction as Prediction
from bayestune.tasks import Scores as Scores
