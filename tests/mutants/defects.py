"""Small defects, each with the tests that must fail on it. `make mutants` plants them one by one."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Defect:
    """`before`, found exactly once in the file `path` under src/bayestune, becomes `after`; `tests` must then fail.

    `tests` are a file under tests/, or such a file and what pytest's -k takes, with a blank between.
    """

    name: str
    path: str
    before: str
    after: str
    tests: str


FUNCTIONAL, GAUSSIAN, NOISE = "functional.py", "adapters/gaussian.py", "adapters/noise.py"
TRAINER, KL, SCORES = "training/trainer.py", "training/kl.py", "metrics/scores.py"
STATE, STORAGE, MANIFEST, FOLDER = (f"posteriors/{n}.py" for n in ("state", "storage", "manifest", "folder"))

DEFECTS = (
    # The KL and its gradient.
    Defect(
        name="KL with the wrong sign of its logarithm",
        path=FUNCTIONAL,
        before="(math.log(prior_std) - omega.log() +",
        after="(omega.log() - math.log(prior_std) +",
        tests="test_functional.py S1",
    ),
    Defect(
        name="KL at twice its scale in the variance",
        path=FUNCTIONAL,
        before="/ (2 * prior_std**2) - 0.5).sum()",
        after="/ prior_std**2 - 0.5).sum()",
        tests="test_functional.py S1",
    ),
    Defect(
        name="KL in single precision",
        path=FUNCTIONAL,
        before="m, omega = mean.double(), std(rho.double())",
        after="m, omega = mean.float(), std(rho.float())",
        tests="test_functional.py S1",
    ),
    Defect(
        name="KL gradient of the variance instead of G",
        path=FUNCTIONAL,
        before="2 * g**3 / prior_std**2 - 2 / g",
        after="g**3 / prior_std**2 - 1 / g",
        tests="test_functional.py S2",
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
        before="layer.weight.sub_(d_mean, alpha=rate * weight)",
        after="layer.weight.sub_(d_mean, alpha=rate)",
        tests="training/test_kl.py kl_step",
    ),
    Defect(
        name="KL counted once a micro-batch",
        path="training/kl.py",
        before="weight = self.settings.schedule(state.global_step, self.settings.cycle)",
        after="weight = args.gradient_accumulation_steps * self.settings.schedule(state.global_step, "
        "self.settings.cycle)",
        tests="training/test_reference_loop.py",
    ),
    Defect(
        name="KL counted once a process",
        path=KL,
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
    # Draws and their noise.
    Defect(
        name="standard deviation G instead of G squared",
        path=FUNCTIONAL,
        before="return rho * rho\n",
        after="return rho.abs()\n",
        tests="test_functional.py S1",
    ),
    Defect(
        name="variance for standard deviation in a draw",
        path=GAUSSIAN,
        before="return self.weight + std(self.rho) * epsilon.to(self.weight)",
        after="return self.weight + std(self.rho).square() * epsilon.to(self.weight)",
        tests="inference/test_draws.py S10",
    ),
    Defect(
        name="the same noise for every draw",
        path=FUNCTIONAL,
        before='derive_seed("draw", seed, index, name)',
        after='derive_seed("draw", seed, name)',
        tests="test_functional.py S10",
    ),
    Defect(
        name="the same noise for every layer",
        path=FUNCTIONAL,
        before='derive_seed("draw", seed, index, name)',
        after='derive_seed("draw", seed, index)',
        tests="test_functional.py S10",
    ),
    Defect(
        name="the seed plays no part",
        path=FUNCTIONAL,
        before='derive_seed("draw", seed, index, name)',
        after='derive_seed("draw", index, name)',
        tests="test_functional.py S10",
    ),
    Defect(
        name="prediction noise from the global generator",
        path=FUNCTIONAL,
        before="torch.randn(shape, generator=generator, dtype=torch.float64).float()",
        after="torch.randn(shape, dtype=torch.float64).float()",
        tests="test_functional.py K4",
    ),
    Defect(
        name="rows share their training noise",
        path=NOISE,
        before='_normal(layers, rows, key) if self.estimator == "independent" else _flipout(layers, rows, key)',
        after="{n: e.expand(rows, -1, -1) for n, e in _normal(layers, 1, key).items()}",
        tests="adapters/test_gaussian.py S10",
    ),
    Defect(
        name="signs for every token",
        path=GAUSSIAN,
        before="if noise.token_seed is not None:",
        after="if x.dim() == 3:",
        tests="adapters/test_gaussian.py S11",
    ),
    Defect(
        name="flipout without signs on the output",
        path=NOISE,
        before="noise[name] = shared[name] * t * u",
        after="noise[name] = shared[name] * u",
        tests="adapters/test_gaussian.py S12",
    ),
    Defect(
        name="training noise does not move on between micro-batches",
        path=NOISE,
        before="        self.micro += 1\n",
        after="",
        tests="adapters/test_gaussian.py consecutive",
    ),
    Defect(
        name="noise in evaluation mode",
        path="adapters/random.py",
        before="        if not self.training:\n            return F.linear(x, self.weight)\n",
        after="",
        tests="adapters/test_gaussian.py S15",
    ),
    Defect(
        name="a draw of a merged adapter",
        path="posteriors/variational.py",
        before="    if is_merged(model):\n",
        after="    if False:\n",
        tests="inference/test_draws.py S15",
    ),
    Defect(
        name="a draw leaks out of its context",
        path="adapters/random.py",
        before="        _ACTIVE.weights, _ACTIVE.sizes = before\n",
        after="        pass\n",
        tests="inference/test_draws.py P13",
    ),
    Defect(
        name="a draw is seen by all threads",
        path="adapters/random.py",
        before="class _ThreadDraw(threading.local):",
        after="class _ThreadDraw:",
        tests="inference/test_threads.py",
    ),
    Defect(
        name="variances cast to half precision with the model",
        path="adapters/random.py",
        before="return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved",
        after="return moved",
        tests="adapters/test_precision.py N1",
    ),
    Defect(
        name="masks that do not rescale",
        path="adapters/dropout.py",
        before="return self.weight * kept / (1 - self.p)",
        after="return self.weight * kept",
        tests="adapters/test_distributions.py",
    ),
    Defect(
        name="masks on single weights instead of inputs",
        path="adapters/dropout.py",
        before="epsilon[..., :1, :]",
        after="epsilon",
        tests="adapters/test_distributions.py",
    ),
    # The objective.
    Defect(
        name="sum of the NLLs instead of their mean",
        path=TRAINER,
        before="loss = nll.sum() * (processes / (draws * total))",
        after="loss = nll.sum() * processes",
        tests="training/test_gradient.py S17",
    ),
    Defect(
        name="micro-batches averaged by their number",
        path=TRAINER,
        before="total = rows if num_items_in_batch is None else int(num_items_in_batch)",
        after="total = rows * self.args.gradient_accumulation_steps",
        tests="training/test_gradient.py S17",
    ),
    Defect(
        name="G among AdamW's parameters too",
        path=TRAINER,
        before="rhos = {id(layer.rho) for layer in self._gaussian.values()}\n            means",
        after="rhos: set[int] = set()\n            means",
        tests="training/test_trainer.py N9",
    ),
    Defect(
        name="a loss that is not finite is trained on",
        path=TRAINER,
        before="        if bad.any():\n            draw, row",
        after="        if False:\n            draw, row",
        tests="training/test_trainer.py nan",
    ),
    Defect(
        name="evaluation leaves the model in evaluation mode",
        path=TRAINER,
        before="                module.training = training\n",
        after="                pass\n",
        tests="training/test_trainer.py S18",
    ),
    Defect(
        name="the prior of the MAP counted once a row",
        path=TRAINER,
        before="share = processes * rows / (total * len(self._train_ids))",
        after="share = processes * rows / total",
        tests="training/test_prior.py",
    ),
    # Prediction and scores.
    Defect(
        name="average of log-probabilities instead of probabilities",
        path="inference/predict.py",
        before="return self.draw_log_probs.logsumexp(0) - math.log(self.draw_log_probs.shape[0])",
        after="return self.draw_log_probs.mean(0).log_softmax(-1)",
        tests="inference/test_predict.py S16",
    ),
    Defect(
        name="a temperature without effect",
        path="inference/predict.py",
        before="(logits / temperature)",
        after="logits",
        tests="posteriors/test_ensemble.py temperature",
    ),
    Defect(
        name="answers in the order of their length",
        path="inference/predict.py",
        before="logits[:, places] = _finite",
        after="logits[:, sorted(places)] = _finite",
        tests="inference/test_predict.py N7",
    ),
    Defect(
        name="logits that are no numbers are averaged",
        path="inference/predict.py",
        before="    if bad.any():\n        row",
        after="    if False:\n        row",
        tests="inference/test_unusual_models.py N2",
    ),
    Defect(
        name="confidence 1 in a bin of its own",
        path=SCORES,
        before="_edges(bins)[1:-1], right=True)",
        after="_edges(bins)[1:], right=True)",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="bins closed on the right",
        path=SCORES,
        before="_edges(bins)[1:-1], right=True)",
        after="_edges(bins)[1:-1], right=False)",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="Brier score halved",
        path=SCORES,
        before="return (log_probs.exp() - truth).square().sum(1)",
        after="return (log_probs.exp() - truth).square().sum(1) / 2",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="an impossible label clipped",
        path=SCORES,
        before="return -log_probs.gather(1, labels[:, None])[:, 0]",
        after="return -log_probs.gather(1, labels[:, None])[:, 0].clamp(min=-30)",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="rows with NaN pass",
        path=SCORES,
        before="improper = ~((sums - 1).abs() <= SUM_TOLERANCE)",
        after="improper = (sums - 1).abs() > SUM_TOLERANCE",
        tests="test_metrics.py S19",
    ),
    Defect(
        name="ties cut in the order of rows",
        path="metrics/ranking.py",
        before="return_inverse=True, return_counts=True)\n",
        after="return_inverse=True, return_counts=True)\n    where, counts = values.argsort().argsort(), "
        "torch.ones_like(values).long()\n",
        tests="test_metrics.py auroc",
    ),
    Defect(
        name="the threshold stops at the first that fails",
        path="metrics/selective.py",
        before="last = int(good[-1])",
        after="last = int(good[0])",
        tests="metrics/test_selective.py threshold",
    ),
    # Files.
    Defect(
        name="a standard deviation of 0 is saved",
        path=STATE,
        before='        if key.endswith((".lora_A.rho", ".lora_B.rho")) and not torch.all(tensor != 0):',
        after="        if False:",
        tests="posteriors/test_storage.py would_not_come_back",
    ),
    Defect(
        name="an unknown setting is ignored",
        path=STATE,
        before="        if name not in defaults:\n            return",
        after="        if name not in defaults:\n            continue\n            return",
        tests="posteriors/test_faults.py P6",
    ),
    Defect(
        name="a superfluous tensor is ignored",
        path=STATE,
        before="    for key in sorted(found.keys() - expected.keys()):",
        after="    for key in sorted(set()):",
        tests="posteriors/test_faults.py P6",
    ),
    Defect(
        name="other weights of the same shapes are taken for the base",
        path=STORAGE,
        before="    difference = weights_difference(manifest",
        after="    difference = None and weights_difference(manifest",
        tests="posteriors/test_faults.py P6",
    ),
    Defect(
        name="hashes are not compared",
        path=MANIFEST,
        before='        if digest != record["sha256"]:',
        after="        if False:",
        tests="posteriors/test_faults.py P8",
    ),
    Defect(
        name="the manifest's own checksum is not compared",
        path=MANIFEST,
        before="    if _serialised(found) != text:",
        after="    if False:",
        tests="posteriors/test_faults.py P8",
    ),
    Defect(
        name="files that the manifest does not list are let in",
        path=MANIFEST,
        before="        if entry.name not in allowed:",
        after="        if False:",
        tests="posteriors/test_faults.py P9",
    ),
    Defect(
        name="the old posterior is removed before the new one stands",
        path=FOLDER,
        before="            os.rename(target, aside)\n",
        after="            shutil.rmtree(target)\n",
        tests="posteriors/test_storage.py P2",
    ),
    Defect(
        name="nothing is flushed to the disk",
        path=FOLDER,
        before="        _flush(work)\n",
        after="",
        tests="posteriors/test_storage.py on_disk",
    ),
    Defect(
        name="a key given twice",
        path=FOLDER,
        before="object_pairs_hook=_unique, parse_constant=_no_constant)",
        after="parse_constant=_no_constant)",
        tests="posteriors/test_faults.py P6",
    ),
    Defect(
        name="any adapter name becomes a path",
        path=STATE,
        before="    if not _NAME.fullmatch(name):",
        after="    if False:",
        tests="posteriors/test_storage.py P10",
    ),
    Defect(
        name="a resumed run with other settings",
        path="training/checkpoint.py",
        before='            if saved["course"].get(name) != value:',
        after="            if False:",
        tests="training/test_checkpoint.py settings",
    ),
    Defect(
        name="the exported draw is another one",
        path="export.py",
        before="weights.get(index, {})",
        after="weights.get(0, {})",
        tests="test_export.py ensemble",
    ),
    # Data, reports, runs.
    Defect(
        name="a field given twice in a row",
        path="tasks/data.py",
        before="object_pairs_hook=_unique, parse_constant=_refuse_constant",
        after="parse_constant=_refuse_constant",
        tests="tasks/test_data.py D1",
    ),
    Defect(
        name="a negative label counts from the end",
        path="tasks/data.py",
        before="if not 0 <= self.answer < len(self.choices):",
        after="if not self.answer < len(self.choices):",
        tests="tasks/test_data.py D3",
    ),
    Defect(
        name="a row that is too long is taken",
        path="tasks/base.py",
        before="        if tokens > self.max_tokens:",
        after="        if False:",
        tests="tasks/test_multiple_choice.py D6",
    ),
    Defect(
        name="texts of a report are not escaped",
        path="report/html.py",
        before="autoescape=True",
        after="autoescape=False",
        tests="report/test_html.py X5",
    ),
    Defect(
        name="every process writes",
        path="experiment/processes.py",
        before='return int(os.environ.get("RANK", "0")) == 0',
        after="return True",
        tests="test_launch.py torchrun",
    ),
    Defect(
        name="all members of an ensemble have one seed",
        path="experiment/methods.py",
        before='derive_seed("member", experiment.seed, number) % 2**31',
        after="experiment.seed",
        tests="test_methods.py first_member",
    ),
    Defect(
        name="a table takes part of a run for the whole",
        path="experiment/grid.py",
        before='return {cell["draws"] for cell in found} >= counts(experiment)',
        after="return bool(found)",
        tests="experiment/test_grid.py killed",
    ),
    Defect(
        name="the widest trial instead of the widest accepted",
        path="posteriors/tfb.py",
        before="(trial for trial in trace if trial.accepted)",
        after="trace",
        tests="posteriors/test_tfb.py what_is_returned",
    ),
    Defect(
        name="a fit on the rows that are scored",
        path="experiment/run.py",
        before="        if shared:\n",
        after="        if False:\n",
        tests="test_methods.py refused_and_nothing",
    ),
)
