"""All planted defects. `make mutants` plants them one by one; the tests named with each must then fail."""

from mutants import draws, files, kl, objective, prediction, runs, runtime, width
from mutants.defect import Defect

DEFECTS: tuple[Defect, ...] = (
    *kl.DEFECTS,
    *draws.DEFECTS,
    *objective.DEFECTS,
    *prediction.DEFECTS,
    *files.DEFECTS,
    *runs.DEFECTS,
    *runtime.DEFECTS,
    *width.DEFECTS,
)
