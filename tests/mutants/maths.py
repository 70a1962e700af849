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
    Defect(
        name="KL of many layers added up in single precision",
        path="training/trainer.py",
        before='"kl": math.fsum(layer.kl().item() for layer in layers),',
        after='"kl": float(sum(layer.kl().float() for layer in layers)),',
        tests="training/test_large_kl.py billions",
    ),
    Defect(
        name="the KL logged within the NLL",
        path="training/trainer.py",
        before='logs = {**logs, "nll": logs["loss"], **self._posterior_state()}',
        after='logs = {**logs, **(state := self._posterior_state()), "nll": logs["loss"] + state.get("kl", 0.0)}',
        tests="training/test_large_kl.py log_has",
    ),
    Defect(
        name="the NLL of G lost beside the KL",
        path="training/kl.py",
        before="        step.sub_(layer.rho.grad, alpha=rate)",
        after="        step.sub_(layer.rho.grad, alpha=rate * weight)",
        tests="training/test_large_kl.py sum_of_its_two_parts",
    ),
    Defect(
        name="an epoch in which every row is dropped is begun",
        path="training/checks.py",
        before="if args.dataloader_drop_last and rows < batch:",
        after="if args.dataloader_drop_last and batch < 1:",
        tests="training/test_gradient.py all_is_dropped",
    ),
    Defect(
        name="a text without a token is scored",
        path="tasks/base.py",
        before="if tokens < 1:",
        after="if tokens < 0:",
        tests="tasks/test_rows_without_tokens.py refused",
    ),
)
