"""All planted defects. `make mutants` plants them one by one; the tests named with each must then fail."""

from mutants import data, draws, files, kl, maths, objective, prediction, runs, train, width
from mutants.defect import Defect

DEFECTS: tuple[Defect, ...] = (
    *kl.DEFECTS,
    *draws.DEFECTS,
    *objective.DEFECTS,
    *prediction.DEFECTS,
    *files.DEFECTS,
    *runs.DEFECTS,
    *train.DEFECTS,
    *width.DEFECTS,
    *data.DEFECTS,
    *maths.DEFECTS,
)
