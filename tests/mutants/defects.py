"""All planted defects. `make mutants` plants them one by one; the tests named with each must then fail."""

from mutants import data, draws, files, kl, maths, objective, persist, prediction, runs, runtime, secure, train, width
from mutants.defect import Defect

DEFECTS: tuple[Defect, ...] = (
    *kl.DEFECTS,
    *draws.DEFECTS,
    *objective.DEFECTS,
    *prediction.DEFECTS,
    *files.DEFECTS,
    *runs.DEFECTS,
    *train.DEFECTS,
    *secure.DEFECTS,
    *runtime.DEFECTS,
    *width.DEFECTS,
    *maths.DEFECTS,
    *data.DEFECTS,
    *persist.DEFECTS,
)
