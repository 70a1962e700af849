"""Compare the NLL, ECE and time of the linearised predictive, antithetic pairs and independent draws.

    python benchmarks/sampling_free.py RUN... --data DIR [--rows 100] [--json FILE]

Each RUN is the folder of a BLoB run. Each predictive answers the same rows of the evaluation split, with `--repeats`
seeds, in the precision of the run. The reference is 100 independent draws, made once. "float32" has the seconds of the
mean and of the linearised predictive in float32, measured in turn, because backward through torch's attention in bf16
is slow on a CPU.
"""

import argparse
import time
from pathlib import Path
from typing import Any

from options import add_json, parser, positive, publish
from pairs import seconds as timed

from bayestune import evaluate, predict
from bayestune.experiment import Run, load_run
from bayestune.experiment.fitting import autocast
from bayestune.experiment.record import rows_sha256
from bayestune.sampling import Variational

WAYS: dict[str, tuple[Any, int]] = {
    "mean": ("mc", 0),
    "mc 4": ("mc", 4),
    "antithetic 4": ("antithetic", 4),
    "mc 10": ("mc", 10),
    "antithetic 10": ("antithetic", 10),
    "linearised": ("linearised", 1000),
    "mc 100": ("mc", 100),
}

REFERENCE = "mc 100"


def main() -> None:
    made = parser(__doc__)
    made.add_argument("runs", nargs="+", help="folders of BLoB runs")
    made.add_argument("--data", help="folder of data sets")
    made.add_argument("--rows", type=positive, default=100)
    made.add_argument("--repeats", type=positive, default=2)
    add_json(made)
    options = made.parse_args()
    found = [measured(load_run(folder, data=options.data), Path(folder).name, options) for folder in options.runs]
    record = {"rows": options.rows, "repeats": options.repeats, "runs": found}
    publish(record, options)


def measured(run: Run, name: str, options: argparse.Namespace) -> dict[str, Any]:
    assert run.experiment.eval_split is not None
    rows = run.task.rows(run.experiment.eval_split)[: options.rows]
    ways: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for seed in range(options.repeats):
        for way, (predictive, draws) in WAYS.items():
            if way == REFERENCE and seed:
                continue
            posterior = Variational(run.posterior.model, predictive=predictive)
            start = time.perf_counter()
            with autocast(run.experiment):
                scores = evaluate(predict(posterior, run.task, rows, draws=draws, seed=seed))
            seconds = time.perf_counter() - start
            ways[way].append({"nll": scores.nll, "ece": scores.ece, "accuracy": scores.accuracy, "seconds": seconds})
    answers = {
        way: lambda predictive=WAYS[way][0], draws=WAYS[way][1]: predict(
            Variational(run.posterior.model, predictive=predictive), run.task, rows, draws=draws
        )
        for way in ("mean", "linearised")
    }
    float32 = timed(answers, pairs=3, warmup=1, device="cpu")
    precision = run.experiment.precision
    return {"run": name, "precision": precision, "rows_sha256": rows_sha256(rows), "ways": ways, "float32": float32}


if __name__ == "__main__":
    main()
