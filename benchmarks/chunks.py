"""Measure how many draws to stack in one forward pass on a CPU; `CPU_TOKENS` rests on this.

    python benchmarks/chunks.py [--json FILE]

For each shape, ten draws are made 1, 2, 3, ... per forward pass; these variants take turns. "ratios" are medians of
the time divided by that of ten looped plain forwards. "chosen" is the number that `StackedDraws.at_once` takes, and
"regret" the relative time by which it is slower than the best number.
"""

from collections.abc import Callable
from typing import Any

import torch
from looped_reference import looped
from options import parser, publish
from pairs import ratio, seconds
from shapes import Answers, Shape

from bayestune.sampling.stacked import CPU_TOKENS, StackedDraws

DRAWS = 10
AT_ONCE = (1, 2, 3, 4, 5, 7, 10)
SHAPES = (
    "llama-1x30",
    "llama-1x100",
    "llama-2x100",
    "llama-1x300",
    "llama-4x100",
    "minilm-1x4x20",
    "minilm-1x4x40",
    "minilm-2x4x40",
    "minilm-4x4x40",
    "minilm-8x4x64",
)


def main() -> None:
    options = parser(__doc__, pairs=8).parse_args()
    shapes = {name: measured(Shape.of(name), options.pairs) for name in SHAPES}
    record = {"cpu_tokens": CPU_TOKENS, "pairs": options.pairs, "draws": DRAWS, "shapes": shapes}
    publish(record, options)


def measured(shape: Shape, pairs: int) -> dict[str, Any]:
    task, batch = Answers(shape), shape.batch("cpu")
    plain = shape.adapted("cpu", bayesian=False).eval()
    sampler = StackedDraws.of(shape.adapted("cpu", bayesian=True).eval(), draws=DRAWS, seed=0)
    chosen = min(DRAWS, sampler.at_once(batch))

    def stacked(at_once: int) -> Callable[[], None]:
        @torch.inference_mode()
        def way() -> None:
            for start in range(0, DRAWS, at_once):
                sampler.outputs(task, batch, range(start, min(start + at_once, DRAWS)))

        return way

    ways: dict[str, Callable[[], object]] = {str(n): stacked(n) for n in sorted({*AT_ONCE, chosen})}
    ways["loop"] = lambda: looped(plain, lambda model: task.whole_logits(model, batch), DRAWS)
    times = seconds(ways, pairs=pairs, warmup=2, device="cpu")
    ratios = {way: ratio(found, times["loop"]) for way, found in times.items() if way != "loop"}
    return {
        "tokens": batch["input_ids"].numel(),
        "ratios": ratios,
        "chosen": chosen,
        "regret": ratios[str(chosen)] / min(ratios.values()) - 1,
    }


if __name__ == "__main__":
    main()
