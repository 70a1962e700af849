"""Run one experiment: from its settings to a run folder with a posterior and its scores."""

from bayestune.experiment.detection import detection as detection
from bayestune.experiment.detection import novelty_of as novelty_of
from bayestune.experiment.run import Result as Result
from bayestune.experiment.run import run as run
from bayestune.experiment.score_table import score_table as score_table
from bayestune.experiment.settings import Experiment as Experiment
from bayestune.experiment.trained import Run as Run
from bayestune.experiment.trained import load_run as load_run
from bayestune.experiment.trained import other_task as other_task
