"""Time ten draws of a posterior against plain forward passes.

    python benchmarks/predict.py [--shape llama-1x100] [--device cpu] [--json FILE]

Prints one JSON object. "ratio" is the median over rounds of the time of ten draws, as `predict` makes them, divided on
a CPU by that of ten plain LoRA forwards in sequence with the logits of every position ("per_loop"), and on a GPU by
that of one such forward ("per_forward"); "claim" says which. "reference_ratio" is the same ratio for the released
code's algorithm (`looped_reference.py`). "per_short_loop" divides by the time of a loop that computes only the logits
of the labels, so it shows the gain of stacking alone. "compute_limit" is what "per_forward" would be if only the
operations of matrix products and attention counted. A call of `predict` makes the matrices of the draws once, whatever
the number of rows; "draw_ms" is the time for that.
"""

from collections.abc import Callable

import torch
from looped_reference import looped, take_over
from options import add_machine, parser, publish
from pairs import ratio, seconds, spread
from shapes import Answers, Shape
from torch.utils.flop_counter import FlopCounterMode

from bayestune.sampling.stacked import StackedDraws

DRAWS = 10


def main() -> None:
    made = parser(__doc__, pairs=20)
    add_machine(made, shape="llama-1x100", gpu_shape="llama7b-1x100", warmup=3)
    options = made.parse_args()
    gpu = options.device.startswith("cuda")
    shape = Shape.of(options.shape or ("llama7b-1x100" if gpu else "llama-1x100"))
    task, batch = Answers(shape), shape.batch(options.device)
    plain = shape.adapted(options.device, bayesian=False).eval()
    bayesian = shape.adapted(options.device, bayesian=True).eval()
    reference = shape.adapted(options.device, bayesian=False).eval()
    take_over(reference)
    sampler = StackedDraws.of(bayesian, draws=DRAWS, seed=0)
    at_once = min(DRAWS, sampler.at_once(batch))

    @torch.inference_mode()
    def stacked() -> None:
        for start in range(0, DRAWS, at_once):
            sampler.outputs(task, batch, range(start, min(start + at_once, DRAWS)))

    ways: dict[str, Callable[[], object]] = {
        "stacked": stacked,
        "plain": lambda: looped(plain, lambda model: task.whole_logits(model, batch), 1),
        "loop": lambda: looped(plain, lambda model: task.whole_logits(model, batch), DRAWS),
        "short_loop": lambda: looped(plain, lambda model: task.outputs(model, batch), DRAWS),
        "reference": lambda: looped(reference, lambda model: task.whole_logits(model, batch), DRAWS),
        "draw": lambda: StackedDraws.of(bayesian, draws=DRAWS, seed=1),
    }
    times = seconds(ways, pairs=options.pairs, warmup=options.warmup, device=options.device)
    against = times["plain"] if gpu else times["loop"]
    found = {
        "ratio": ratio(times["stacked"], against),
        "reference_ratio": ratio(times["reference"], against),
        "pairs": options.pairs,
        "shape": shape.name,
        "claim": "per_forward" if gpu else "per_loop",
        "draws": DRAWS,
        "at_once": at_once,
        "quartiles": spread(times["stacked"], against),
        "per_forward": ratio(times["stacked"], times["plain"]),
        "per_loop": ratio(times["stacked"], times["loop"]),
        "per_short_loop": ratio(times["stacked"], times["short_loop"]),
        "compute_limit": operations(ways["stacked"]) / operations(ways["plain"]),
        "draw_ms": 1000 * torch.tensor(times["draw"]).median().item(),
        "milliseconds": {way: 1000 * torch.tensor(t).median().item() for way, t in times.items()},
    }
    publish(found, options, device=options.device)


def operations(way: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        way()
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
