"""Defects of the draws, of sums over many layers, and of the objective's parts, that only statistics can see."""

from mutants.defect import Defect

CALIBRATION = "adapters/test_calibration.py told_apart"
VARIATIONAL = "posteriors/variational.py"
STACKED = "weights[layer] = layer.drawn(torch.stack(noise))"

DEFECTS = (
    Defect(
        name="draws around a mean that is 10 % too small",
        path=VARIATIONAL,
        before=STACKED,
        after="weights[layer] = layer.drawn(torch.stack(noise)) - 0.1 * layer.weight",
        tests=CALIBRATION,
    ),
    Defect(
        name="draws that are 10 % too wide",
        path=VARIATIONAL,
        before=STACKED,
        after="weights[layer] = layer.drawn(1.1 * torch.stack(noise))",
        tests=CALIBRATION,
    ),
    Defect(
        name="KL gradient of the mean four times as strong",
        path="functional.py",
        before="return mean / prior_std**2, ",
        after="return 4 * mean / prior_std**2, ",
        tests=CALIBRATION,
    ),
)
