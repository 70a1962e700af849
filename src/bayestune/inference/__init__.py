"""Draws and predictions."""

from bayestune.inference.anchor import anchor_loss as anchor_loss
from bayestune.inference.draws import draw as draw
from bayestune.inference.evaluate import Scores as Scores
from bayestune.inference.evaluate import evaluate as evaluate
from bayestune.inference.predict import Prediction as Prediction
from bayestune.inference.predict import predict as predict
