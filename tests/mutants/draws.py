"""Defects of draws and their noise."""

from mutants.defect import Defect

FUNCTIONAL = "functional.py"
GAUSSIAN = "adapters/gaussian.py"
NOISE = "adapters/noise.py"

DEFECTS = (
    Defect(
        name="standard deviation G instead of G squared",
        path=FUNCTIONAL,
        before="return rho * rho\n",
        after="return rho.abs()\n",
        tests="test_functional.py S01",
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
        tests="test_functional.py K04",
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
        path="sampling/stacked.py",
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
        tests="adapters/test_precision.py N01",
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
)
