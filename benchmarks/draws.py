"""NLL against the number of draws: independent draws, antithetic pairs, and Latin hypercubes.

    python benchmarks/draws.py RUN... --data DIR              # make results/bench/draws.json
    python benchmarks/draws.py --page                         # make docs/draws.md from that record; predict nothing

Each RUN is the folder of a BLoB run. For every kind and number N of draws, the mean NLL (nats) over `--rows` rows
of the evaluation split is measured up to 20 times, each time with fresh noise. The draws come from `POOL` noise
matrices, their negatives, and 20 hypercubes for each N in `CUBES`:

independent   N matrices (POOL / N repeats, if that is less than 20)
antithetic    N/2 matrices and their negatives
hypercube     each weight has one value in each of N equal parts of its distribution, in a random order per weight
"""

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from options import parser
from torch import Tensor
from tqdm.auto import tqdm

from bayestune.adapters import RandomLinear, random_layers
from bayestune.experiment import Run, load_run
from bayestune.experiment.fitting import autocast
from bayestune.experiment.record import hardware, rows_sha256, versions
from bayestune.files import read_json, write_json, write_text
from bayestune.functional import derive_seed
from bayestune.inference.draws import evaluation_mode
from bayestune.sampling.stacked import StackedDraws
from bayestune.tasks import AnyRow

ROOT = Path(__file__).parent.parent
RECORD = ROOT / "results" / "bench" / "draws.json"
REPEATS, POOL = 20, 200
NUMBERS = (1, 2, 4, 6, 8, 10, 20)
CUBES = (4, 10)
BATCH = 8


def main() -> None:
    made = parser(__doc__)
    made.add_argument("runs", nargs="*", help="folders of BLoB runs")
    made.add_argument("--data", help="folder of data sets")
    made.add_argument("--rows", type=int, default=250)
    made.add_argument("--page", action="store_true")
    options = made.parse_args()
    if options.page:
        write_text(ROOT / "docs" / "draws.md", page(read_json(RECORD, "the record of this script")))
        return
    if not options.runs:
        made.error("expected runs, or --page")
    found = []
    for folder in options.runs:
        run = load_run(folder, data=options.data)
        assert run.experiment.eval_split is not None
        rows = run.task.rows(run.experiment.eval_split)[: options.rows]
        found.append({"run": Path(folder).name, "rows_sha256": rows_sha256(rows), "nll": curves(run, rows)})
    record = {
        "command": ["python", "benchmarks/draws.py", *sys.argv[1:]],
        "rows": options.rows,
        "repeats": REPEATS,
        "runs": found,
        "versions": versions(),
        "hardware": hardware(),
    }
    RECORD.parent.mkdir(parents=True, exist_ok=True)
    write_json(RECORD, record)


def curves(run: Run, rows: list[AnyRow]) -> dict[str, dict[str, list[float]]]:
    """Return the NLL of each repeat, by kind and by N."""
    labels = torch.tensor([row.target for row in rows])
    pool = answers(run, rows, POOL, lambda layer, k: normal(layer, "pool", k))
    negative = answers(run, rows, POOL, lambda layer, k: -normal(layer, "pool", k))
    found: dict[str, dict[str, list[float]]] = {"independent": {}, "antithetic": {}, "hypercube": {}}
    for number in NUMBERS:
        found["independent"][str(number)] = [nll(pool[part], labels) for part in parts(number)]
        if number % 2 == 0:
            found["antithetic"][str(number)] = [
                nll(torch.cat([pool[part], negative[part]]), labels) for part in parts(number // 2)
            ]
    for number in CUBES:
        found["hypercube"][str(number)] = [
            nll(answers(run, rows, number, cube(number, repeat)), labels) for repeat in range(REPEATS)
        ]
    return found


def parts(size: int) -> list[slice]:
    """Return disjoint slices of the pool, `size` long."""
    return [slice(i * size, (i + 1) * size) for i in range(min(REPEATS, POOL // size))]


def normal(layer: RandomLinear, *key: Any) -> Tensor:
    generator = torch.Generator().manual_seed(derive_seed("benchmark", layer.name, *key))
    return torch.randn(layer.weight.shape, generator=generator)


def cube(number: int, repeat: int) -> Callable[[RandomLinear, int], Tensor]:
    """Return the noise of draw k: Phi^-1((place + u) / N), with a random permutation of places per weight."""

    def noise(layer: RandomLinear, k: int) -> Tensor:
        generator = torch.Generator().manual_seed(derive_seed("cube", layer.name, number, repeat))
        shape = (number, *layer.weight.shape)
        place = torch.rand(shape, generator=generator).argsort(0)
        inside = torch.rand(shape, generator=generator).clamp(1e-6, 1 - 1e-6)
        return torch.special.ndtri((place[k] + inside[k]) / number)

    return noise


def answers(run: Run, rows: list[AnyRow], number: int, noise: Callable[[RandomLinear, int], Tensor]) -> Tensor:
    """Return log p(class | row, draw k) for k < number: [number, rows, classes], float64."""
    task, model = run.task, run.model
    examples = [task.example(row) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: task.tokens(examples[i]))
    found = torch.empty(number, len(rows), task.columns, dtype=torch.float64)
    with torch.inference_mode(), evaluation_mode(model), autocast(run.experiment):
        layers = random_layers(model).values()
        weights = {layer: layer.drawn(torch.stack([noise(layer, k) for k in range(number)])) for layer in layers}
        sampler = StackedDraws(model, weights, number)
        for start in tqdm(range(0, len(rows), BATCH), desc=f"{number} draws", unit="batch"):
            places = order[start : start + BATCH]
            batch = task.collate([examples[i] for i in places])
            at_once = min(number, sampler.at_once(batch))
            parts = [range(k, min(k + at_once, number)) for k in range(0, number, at_once)]
            logits = torch.cat([sampler.outputs(task, batch, part) for part in parts])
            found[:, places] = logits.double().log_softmax(-1)
    return found


def nll(log_probs: Tensor, labels: Tensor) -> float:
    """Return the mean over rows of -log of the average over draws."""
    picked = log_probs.gather(-1, labels.expand(len(log_probs), -1)[..., None])[..., 0]
    return (torch.tensor(float(len(log_probs))).log() - picked.logsumexp(0)).mean().item()


def page(record: dict[str, Any]) -> str:
    """Return the page as Markdown: mean and standard deviation of the NLL over repeats, both averaged over runs."""
    ways = ("independent", "antithetic", "hypercube")
    lines = [
        "# Number of draws",
        "",
        "This page shows how the NLL of a prediction falls with the number of draws, for independent draws, "
        "antithetic pairs (a noise matrix and its negative) and Latin hypercubes. `python benchmarks/draws.py --page` "
        "makes it from `results/bench/draws.json`.",
        "",
        f"Numbers are mean NLLs in nats over {record['rows']} rows, up to {record['repeats']} repeats with "
        f"independent noise, and {len(record['runs'])} posterior(s). ± is the standard deviation over repeats, "
        "averaged over posteriors.",
        "",
        "| draws | " + " | ".join(ways) + " |",
        "|---" * (len(ways) + 1) + "|",
    ]
    for number in NUMBERS:
        cells = []
        for way in ways:
            found = [run["nll"][way][str(number)] for run in record["runs"] if str(number) in run["nll"][way]]
            mean = [statistics.mean(values) for values in found]
            deviation = [statistics.stdev(values) for values in found]
            cells.append(f"{statistics.mean(mean):.4f} ± {statistics.mean(deviation):.4f}" if found else "")
        lines.append(f"| {number} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
