"""Measure how time and memory grow with tokens, rows, rank, adapted layers and draws, one by one, on a 4-layer Llama.

    python benchmarks/scaling.py [--json FILE]

Measures the median seconds, and the peak of resident memory above what was resident before, of a training step of BLoB
and of a prediction with 10 draws, stacked as `predict` stacks them. Several passes go over all points and measure each
in a new process, so that noise of the machine affects all points. "exponents" are the slopes of log(seconds) over
log(size), by least squares; a slope up to 1 is linear or better.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import psutil
import torch
from options import add_json, parser, publish
from pairs import peak_memory
from peft import PeftModel, get_peft_model
from shapes import ALPHA, Answers, Shape
from tqdm.auto import tqdm
from train_step import bayestune_step

from bayestune import BlobConfig
from bayestune.sampling.stacked import StackedDraws

SIZES: dict[str, tuple[int, ...]] = {
    "tokens": (32, 64, 128, 256),
    "rows": (1, 2, 4, 8),
    "rank": (4, 16, 64),
    "layers": (1, 2, 4),
    "draws": (1, 5, 10, 20),
}
BASE = {"tokens": 64, "rows": 2, "rank": 8, "layers": 4, "draws": 10}
REPEATS, PASSES = 9, 3


def main() -> None:
    made = parser(__doc__)
    add_json(made)
    made.add_argument("--point", help="only print one measurement, of these sizes as JSON")
    options = made.parse_args()
    if options.point:
        print(json.dumps(point(**json.loads(options.point))))
        return
    wanted = [("train", name) for name in SIZES if name != "draws"] + [("predict", name) for name in SIZES]
    todo = [(what, name, size) for what, name in wanted for size in SIZES[name]]
    found: dict[tuple[str, str, int], list[dict[str, Any]]] = {one: [] for one in todo}
    for what, name, size in tqdm(todo * PASSES, desc="scaling", unit="point", disable=None):
        sizes = json.dumps({**BASE, name: size, "what": what})
        command = [sys.executable, __file__, "--point", sizes]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[what, name, size].append(json.loads(done.stdout.splitlines()[-1]))
    curves: dict[str, dict[str, dict[str, dict[str, float]]]] = {"train": {}, "predict": {}}
    for (what, name, size), passes in found.items():
        seconds = statistics.median(second for one in passes for second in one["seconds"])
        memory = statistics.median(one["bytes"] for one in passes)
        curves[what].setdefault(name, {})[str(size)] = {"seconds": seconds, "bytes": memory}
    exponents = {what: {name: exponent(curve) for name, curve in one.items()} for what, one in curves.items()}
    record = {"base": BASE, "curves": curves, "exponents": exponents}
    publish(record, options)


def point(*, what: str, tokens: int, rows: int, rank: int, layers: int, draws: int) -> dict[str, Any]:
    """Return the seconds of each repeat, and the peak memory in bytes above what was resident before."""
    shape = Shape(name="", model="llama", rows=rows, choices=None, tokens=tokens)
    model = adapted(shape, rank, layers)
    way = training(model, shape) if what == "train" else prediction(model, shape, draws)
    before = psutil.Process().memory_info().rss
    seconds = []
    for turn in range(REPEATS + 2):
        start = time.perf_counter()
        way()
        if turn >= 2:
            seconds.append(time.perf_counter() - start)
    peak = peak_memory()
    return {"seconds": seconds, "bytes": max(0, peak - before)}


def adapted(shape: Shape, rank: int, layers: int) -> PeftModel:
    """Return BLoB on the query and value projections of the last `layers` layers."""
    config = BlobConfig(
        r=rank,
        lora_alpha=ALPHA,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=list(range(4 - layers, 4)),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(shape.base("cpu"), config)
    assert isinstance(model, PeftModel)
    return model


def training(model: PeftModel, shape: Shape) -> Callable[[], None]:
    task, batch = Answers(shape), shape.batch("cpu")
    return bayestune_step(model.train(), lambda model: task.loss(model, batch).mean())


def prediction(model: PeftModel, shape: Shape, draws: int) -> Callable[[], None]:
    task, batch = Answers(shape), shape.batch("cpu")
    model.eval()

    @torch.inference_mode()
    def answer() -> None:
        sampler = StackedDraws.of(model, draws=draws, seed=0)
        at_once = min(draws, sampler.at_once(batch))
        for start in range(0, draws, at_once):
            sampler.outputs(task, batch, range(start, min(start + at_once, draws)))

    return answer


def exponent(curve: dict[str, Any]) -> float:
    sizes = np.log([float(size) for size in curve])
    return float(np.polyfit(sizes, np.log([found["seconds"] for found in curve.values()]), 1)[0])


if __name__ == "__main__":
    main()
