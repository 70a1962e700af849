"""All planted defects: importing their modules lists them."""

from mutants import draws as draws
from mutants import generation as generation
from mutants import mathematics as mathematics
from mutants import methods as methods
from mutants import numbers as numbers
from mutants import rows as rows
from mutants import runs as runs
from mutants import saved as saved
from mutants import scores as scores
from mutants import served as served
from mutants import training as training
from mutants.defect import DEFECTS as DEFECTS
