"""Defects of the draws, of sums over many layers, and of the objective's parts, that only statistics can see."""

from mutants.defect import Defect

GAUSSIAN = "adapters/gaussian.py"
DRAWN = "return self.weight + std(self.rho) * epsilon.to(self.weight)"
TRAINER = "training/trainer.py"
CALIBRATION = "adapters/test_calibration.py told_apart"
VARIATIONAL = "sampling/stacked.py"
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
        path="training/kl.py",
        before='"kl": math.fsum(layer.kl().item() for layer in layers),',
        after='"kl": float(sum(layer.kl().float() for layer in layers)),',
        tests="training/test_large_kl.py billions",
    ),
    Defect(
        name="the KL logged within the NLL",
        path="training/trainer.py",
        before='logs = {**logs, "nll": logs["loss"], **posterior_summary(self._gaussian.values())}',
        after="logs = {**logs, **(state := posterior_summary(self._gaussian.values())), "
        '"nll": logs["loss"] + state.get("kl", 0.0)}',
        tests="training/test_large_kl.py log_has",
    ),
    Defect(
        name="the NLL of G lost beside the KL",
        path="training/kl.py",
        before="        step.sub_(_joined(gradients), alpha=rate)",
        after="        step.sub_(_joined(gradients), alpha=rate * weight)",
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
        before="if not ids:",
        after="if False:",
        tests="tasks/test_rows_without_tokens.py refused",
    ),
    Defect(
        name="no gradient reaches G",
        path=GAUSSIAN,
        before=DRAWN,
        after="return self.weight + std(self.rho).detach() * epsilon.to(self.weight)",
        tests="adapters/test_conjugate.py S04_minibatch",
    ),
    Defect(
        name="gradient of G of a linear width",
        path=GAUSSIAN,
        before=DRAWN,
        after="return self.weight + self.rho.detach() * self.rho * epsilon.to(self.weight)",
        tests="training/test_gradient.py S03_gradient_equals_finite_differences",
    ),
    Defect(
        name="the tighter bound of several draws for the ELBO",
        path=TRAINER,
        before="loss = nll.sum() * (processes / (draws * total))",
        after="loss = (math.log(draws) - (-nll).logsumexp(0)).sum() * (processes / total)",
        tests="training/test_gradient.py S05",
    ),
    Defect(
        name="KL of one row of A",
        path=GAUSSIAN,
        before="return gaussian_kl(self.weight, self.rho, self.prior_std)",
        after="return gaussian_kl(self.weight[:1], self.rho[:1], self.prior_std)",
        tests="adapters/test_conjugate.py S09b",
    ),
    Defect(
        name="processes share their training noise",
        path="functional.py",
        before='derive_seed("training", seed, step, micro, rank, device_index)',
        after='derive_seed("training", seed, step, micro, device_index)',
        tests="adapters/test_gaussian.py S10_noise_of_steps",
    ),
    Defect(
        name="noise where dropout left nothing",
        path=GAUSSIAN,
        before="F.linear(x * signs[0], std(self.rho) * epsilon)",
        after="F.linear(x.where(x != 0, 1.0) * signs[0], std(self.rho) * epsilon)",
        tests="adapters/test_gaussian.py S13",
    ),
    Defect(
        name="a width that never vanishes",
        path=GAUSSIAN,
        before=DRAWN,
        after="return self.weight + (std(self.rho) + 1e-4) * epsilon.to(self.weight)",
        tests="adapters/test_gaussian.py S14_without_variance",
    ),
    Defect(
        name="an evaluation scored on its first batch",
        path=TRAINER,
        before='"nll": nll(log_probs, labels)}',
        after='"nll": nll(log_probs[:4], labels[:4])}',
        tests="training/test_trainer.py S20",
    ),
    Defect(
        name="95 % intervals that cover 90 %",
        path="metrics/scores.py",
        before="tail = (1 - level) / 2",
        after="tail = 1 - level",
        tests="test_metrics.py S21_intervals_equal",
    ),
    Defect(
        name="loss through probabilities instead of their logarithms",
        path="tasks/base.py",
        before='return F.cross_entropy(self.outputs(model, batch), batch["labels"], reduction="none")',
        after='return F.nll_loss(self.outputs(model, batch).softmax(-1).log(), batch["labels"], reduction="none")',
        tests="tasks/test_classification.py N02",
    ),
    Defect(
        name="positions counted from the padding",
        path="tasks/multiple_choice.py",
        before='"position_ids": (mask.cumsum(-1) - 1).clamp(min=0).unflatten(0, shape),',
        after='"position_ids": (mask.cumsum(-1) * 0 + torch.arange(mask.shape[-1])).unflatten(0, shape),',
        tests="tasks/test_multiple_choice.py N07_padding",
    ),
    Defect(
        name="training noise is used up by the first forward",
        path="adapters/random.py",
        before="        return self.perturbed(x, self.noise)",
        after="        noise, self.noise = self.noise, None\n        return self.perturbed(x, noise)",
        tests="training/test_gradient.py N08",
    ),
    Defect(
        name="weight decay on the means",
        path="training/optimizer.py",
        before="groups[name in decayed and id(parameter) not in means]",
        after="groups[name in decayed]",
        tests="training/test_trainer.py N09",
    ),
)
