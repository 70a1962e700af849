"""Tasks: multiple choice, classification, regression, generation, preferences; their rows and predictions."""

from bayestune.tasks.base import AnyPrediction as AnyPrediction
from bayestune.tasks.base import AnyScores as AnyScores
from bayestune.tasks.base import Task as Task
from bayestune.tasks.classes import ClassTask as ClassTask
from bayestune.tasks.classes import Prediction as Prediction
from bayestune.tasks.classes import Scores as Scores
from bayestune.tasks.classification import Classification
from bayestune.tasks.classification import classification as classification
from bayestune.tasks.data import read_rows as read_rows
from bayestune.tasks.datasets import DatasetSpec as DatasetSpec
from bayestune.tasks.datasets import dataset as dataset
from bayestune.tasks.datasets import load_rows as load_rows
from bayestune.tasks.encoder_multiple_choice import EncoderMultipleChoice
from bayestune.tasks.encoder_multiple_choice import encoder_multiple_choice as encoder_multiple_choice
from bayestune.tasks.generation import GenerationTask
from bayestune.tasks.generation import TextPrediction as TextPrediction
from bayestune.tasks.generation import TextScores as TextScores
from bayestune.tasks.generation import generation as generation
from bayestune.tasks.multiple_choice import CausalMultipleChoice
from bayestune.tasks.multiple_choice import multiple_choice as multiple_choice
from bayestune.tasks.numbers import RegressionPrediction as RegressionPrediction
from bayestune.tasks.numbers import RegressionScores as RegressionScores
from bayestune.tasks.preference import Preference as Preference
from bayestune.tasks.preference import Rewards as Rewards
from bayestune.tasks.preference import preference as preference
from bayestune.tasks.preference_rows import Candidate as Candidate
from bayestune.tasks.preference_rows import PreferenceRow as PreferenceRow
from bayestune.tasks.prompted import PromptRow as PromptRow
from bayestune.tasks.prompts import Prompt as Prompt
from bayestune.tasks.regression import Regression
from bayestune.tasks.regression import regression as regression
from bayestune.tasks.rows import AnyRow as AnyRow
from bayestune.tasks.rows import NumberRow as NumberRow
from bayestune.tasks.rows import Row as Row
from bayestune.tasks.rows import TextRow as TextRow
from bayestune.tasks.text_choice import CausalTextChoice
from bayestune.tasks.text_choice import text_choice as text_choice
from bayestune.tasks.tokenized import TokenizedTask as TokenizedTask

TASKS: tuple[type[TokenizedTask], ...] = (
    CausalMultipleChoice,
    CausalTextChoice,
    EncoderMultipleChoice,
    Classification,
    Regression,
    GenerationTask,
    Preference,
)
"""The tasks of the command line; the first one that fits the data set's rows and the model's family is used."""
