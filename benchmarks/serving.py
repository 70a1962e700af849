"""Time the client of a server against `predict` on the same machine, and compare their probabilities.

    python benchmarks/serving.py --run RUN --base base.gguf [--data DIR] [--rows 5] [--draws 10] [--json FILE]

RUN is the folder of a run, and base.gguf its base in float32. Prints one JSON object. "difference" is the largest
difference of any averaged probability between llama.cpp's server and `predict`. "client_by_predict" is the median over
rounds of the seconds that the client needs for the rows, divided by those of `predict`. "draw_by_base" is the time for
the log-probabilities of one row under one draw, divided by that under the base without an adapter.
"""

import statistics
import tempfile
from pathlib import Path

from options import parser, positive, publish
from pairs import ratio, seconds, spread

from bayestune.experiment import load_run
from bayestune.experiment.record import rows_sha256
from bayestune.serving import Client, serve
from bayestune.serving.asking import asked_rows


def main() -> None:
    made = parser(__doc__, pairs=3)
    made.add_argument("--run", type=Path, required=True)
    made.add_argument("--base", type=Path, required=True)
    made.add_argument("--data", help="folder of data sets; default: that of the run")
    made.add_argument("--rows", type=positive, default=5)
    made.add_argument("--draws", type=positive, default=10)
    options = made.parse_args()
    run = load_run(options.run, data=options.data)
    assert run.experiment.eval_split is not None
    rows = run.task.rows(run.experiment.eval_split)[: options.rows]
    settings = {"base": options.base, "draws": options.draws, "port": 0}
    with tempfile.TemporaryDirectory() as folder, serve(run.posterior, run.task, Path(folder) / "served", **settings):
        with Client(Path(folder) / "served") as client:
            there, here = client.predict(rows), run.predict(rows, draws=options.draws)
            _, asked = asked_rows(client.task, rows[:1])
            key = client.adapters[0].key
            times = seconds(
                {
                    "client": lambda: client.predict(rows),
                    "predict": lambda: run.predict(rows, draws=options.draws),
                    "draw": lambda: client.log_probs_of(asked, key),
                    "base": lambda: client.log_probs_of(asked, None),
                },
                pairs=options.pairs,
                warmup=0,
                device="cpu",
            )
    found = {
        "difference": float((there.probs - here.probs).abs().max()),
        "client_by_predict": ratio(times["client"], times["predict"]),
        "draw_by_base": ratio(times["draw"], times["base"]),
        "pairs": options.pairs,
        "model": run.experiment.model,
        "task": run.task.name,
        "scoring": run.experiment.scoring,
        "experiment": {**run.experiment.as_dict(), "data": None},
        "rows": len(rows),
        "rows_sha256": rows_sha256(rows),
        "draws": options.draws,
        "quartiles": {
            "client_by_predict": spread(times["client"], times["predict"]),
            "draw_by_base": spread(times["draw"], times["base"]),
        },
        "seconds": {name: statistics.median(values) for name, values in times.items()},
    }
    publish(found, options)


if __name__ == "__main__":
    main()
