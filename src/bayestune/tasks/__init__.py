"""Tasks: multiple choice for causal models and encoders, classification; rows and known data sets."""

from bayestune.tasks.base import Task as Task
from bayestune.tasks.classification import classification as classification
from bayestune.tasks.data import AnyRow as AnyRow
from bayestune.tasks.data import Row as Row
from bayestune.tasks.data import TextRow as TextRow
from bayestune.tasks.data import read_rows as read_rows
from bayestune.tasks.datasets import DatasetSpec as DatasetSpec
from bayestune.tasks.datasets import dataset as dataset
from bayestune.tasks.datasets import load_rows as load_rows
from bayestune.tasks.multiple_choice import encoder_multiple_choice as encoder_multiple_choice
from bayestune.tasks.multiple_choice import multiple_choice as multiple_choice
