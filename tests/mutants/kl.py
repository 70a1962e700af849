"""Defects of the KL and its gradient."""

from mutants.defect import Defect

FUNCTIONAL = "functional.py"
TRAINER = "training/trainer.py"
KL = "training/kl.py"

DEFECTS = (
    Defect(
        name="KL with the wrong sign of its logarithm",
        path=FUNCTIONAL,
        before="(math.log(prior_std) - omega.log() +",
        after="(omega.log() - math.log(prior_std) +",
        tests="test_functional.py S01",
    ),
    Defect(
        name="KL at twice its scale in the variance",
        path=FUNCTIONAL,
        before="/ (2 * prior_std**2) - 0.5).sum()",
        after="/ prior_std**2 - 0.5).sum()",
        tests="test_functional.py S01",
    ),
    Defect(
        name="KL in single precision",
        path=FUNCTIONAL,
        before="m, omega = mean.double(), std(rho.double())",
        after="m, omega = mean.float(), std(rho.float())",
        tests="test_functional.py S01",
    ),
    Defect(
        name="KL gradient of the variance instead of G",
        path=FUNCTIONAL,
        before="2 * g**3 / prior_std**2 - 2 / g",
        after="g**3 / prior_std**2 - 1 / g",
        tests="test_functional.py S02",
    ),
    Defect(
        name="weights of the paper's cycle shifted by one",
        path=FUNCTIONAL,
        before="i = step % cycle + 1\n    return 2.0",
        after="i = step % cycle\n    return 2.0",
        tests="test_functional.py S17",
    ),
    Defect(
        name="updates of a cycle rounded up",
        path=FUNCTIONAL,
        before="max(1, int(100 * rows",
        after="max(1, 1 + int(100 * rows",
        tests="test_functional.py cycle_steps",
    ),
    Defect(
        name="ELBO weight one over rows and one more",
        path=KL,
        before="return lambda step, cycle: 1.0 / rows",
        after="return lambda step, cycle: 1.0 / (rows + 1)",
        tests="training/test_kl.py elbo",
    ),
    Defect(
        name="KL step without the schedule's weight",
        path=KL,
        before="mean.sub_(d_mean, alpha=rate * weight)",
        after="mean.sub_(d_mean, alpha=rate)",
        tests="training/test_kl.py kl_step",
    ),
    Defect(
        name="KL counted once a micro-batch",
        path="training/kl_callback.py",
        before="weight = self.settings.schedule(state.global_step, self.settings.cycle)",
        after="weight = args.gradient_accumulation_steps * self.settings.schedule(state.global_step, "
        "self.settings.cycle)",
        tests="training/test_reference_loop.py",
    ),
    Defect(
        name="KL counted once a process",
        path="training/kl_callback.py",
        before="weight = self.settings.schedule(state.global_step, self.settings.cycle)",
        after="weight = args.world_size * self.settings.schedule(state.global_step, self.settings.cycle)",
        tests="training/test_processes.py kl",
    ),
    Defect(
        name="gradients averaged over processes once too often",
        path=TRAINER,
        before="processes = 1 if num_items_in_batch is None else self.args.world_size",
        after="processes = 1",
        tests="training/test_processes.py lora",
    ),
    Defect(
        name="KL jumps past its minimum",
        path=KL,
        before="step = (-rate * weight * d_rho).clamp(min=to_best.clamp(max=0), max=to_best.clamp(min=0))",
        after="step = -rate * weight * d_rho",
        tests="training/test_kl.py stops",
    ),
    Defect(
        name="one prior for all layers that move together",
        path=KL,
        before="groups.setdefault((layer.prior_std, layer.rho.device, layer.rho.dtype), [])",
        after="groups.setdefault((next(iter(layers)).prior_std, layer.rho.device, layer.rho.dtype), [])",
        tests="training/test_kl.py together",
    ),
    Defect(
        name="layers that move together keep their own M",
        path=KL,
        before="        _put_back(mean, means)\n",
        after="",
        tests="training/test_kl.py kl_step",
    ),
    Defect(
        name="the last layers that move together are left out",
        path=KL,
        before="        yield prior_std, chosen\n\n\n",
        after="        if len(chosen) > 1:\n            yield prior_std, chosen\n\n\n",
        tests="training/test_kl.py many_layers",
    ),
    Defect(
        name="an NLL gradient of G that is not looked at",
        path="training/kl_callback.py",
        before="if all_finite(largest) and all_finite(self._along()):",
        after="if all_finite(largest):",
        tests="training/test_kl.py looked_at",
    ),
)
