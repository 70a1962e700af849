"""Draws and predictions."""

from bayestune.inference.draws import draw as draw
from bayestune.inference.evaluate import Scores as Scores
from bayestune.inference.evaluate import evaluate as evaluate
from bayestune.inference.predict import Prediction as Prediction
from bayestune.inference.predict import predict as predict
