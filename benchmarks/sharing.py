"""Ten draws with Bayesian adapters in the last blocks only, by ten draws with them in all blocks.

    python benchmarks/sharing.py [--json FILE]

Blocks below the first random layer see each row once (`posteriors/sharing.py`). For each shape and number of blocks:
"ratio", the median over rounds; "operations", the ratio that the operations of matrix products and attention have;
"unshared", the ratio where every block sees every draw.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
from pairs import header, new_file, positive, ratio, seconds
from peft import PeftModel, get_peft_model
from predict import operations
from shapes import ALPHA, RANK, Answers, Shape

from bayestune import BlobConfig
from bayestune.experiment import write_json
from bayestune.sampling.stacked import StackedDraws

DRAWS = 10
BLOCKS = {"llama-1x100": (1, 2, 4), "minilm-1x4x40": (1, 3, 6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=positive, default=20)
    parser.add_argument("--json", type=new_file, help="write the object to this file too")
    options = parser.parse_args()
    shapes = {name: measured(Shape.of(name), blocks, options.pairs) for name, blocks in BLOCKS.items()}
    record = {"draws": DRAWS, "pairs": options.pairs, "shapes": shapes, **header("cpu")}
    print(json.dumps(record))
    if options.json:
        write_json(options.json, record)


def measured(shape: Shape, blocks: tuple[int, ...], pairs: int) -> dict[str, dict[str, float]]:
    task, batch, whole = Answers(shape), shape.batch("cpu"), str(max(blocks))

    def way(sampler: StackedDraws) -> Callable[[], Any]:
        return torch.inference_mode()(lambda: sampler.outputs(task, batch, range(DRAWS)))

    ways, apart = {}, {}
    for count in blocks:
        model = adapted(shape, range(max(blocks) - count, max(blocks)))
        ways[str(count)] = way(StackedDraws.of(model, draws=DRAWS, seed=0))
        unshared = StackedDraws.of(model, draws=DRAWS, seed=0)
        unshared._shared = []
        apart[f"{count} apart"] = way(unshared)
    times = seconds({**ways, **apart}, pairs=pairs, warmup=3, device="cpu")
    return {
        count: {
            "ratio": ratio(times[count], times[whole]),
            "operations": operations(ways[count]) / operations(ways[whole]),
            "unshared": ratio(times[f"{count} apart"], times[whole]),
        }
        for count in ways
    }


def adapted(shape: Shape, blocks: range) -> PeftModel:
    """BLoB on the query and value projections of `blocks`."""
    targets = ["q_proj", "v_proj"] if shape.causal else ["query", "value"]
    config = BlobConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, layers_to_transform=list(blocks))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(shape.base("cpu"), config)
    assert isinstance(model, PeftModel)
    return model.eval()


if __name__ == "__main__":
    main()
