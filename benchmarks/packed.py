"""Time training steps that score the texts of choices in one packed sequence per row, or in one sequence per choice.

    python benchmarks/packed.py --data DIR [--device cpu] [--rows 4] [--json FILE]

A step is forward and backward of SmolLM2 with plain LoRA on q_proj and v_proj, on the first rows of ARC-Easy's train
split. Prints one JSON object: "ratio" is the median over rounds of the time of a packed step divided by that of one
with separate sequences, and "tokens_ratio" the ratio of their numbers of tokens.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from options import add_machine, parser, positive, publish
from pairs import ratio, seconds, spread
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from bayestune.experiment.backbone import find_backbone
from bayestune.tasks import Prompt, text_choice

BATCHES = 5


def main() -> None:
    made = parser(__doc__, pairs=5)
    add_machine(made, shape="smollm2", gpu_shape="smollm2", warmup=1)
    made.add_argument("--data", required=True, help="folder of the data sets")
    made.add_argument("--rows", type=positive, default=4, help="rows of a step")
    options = made.parse_args()
    backbone = find_backbone("smollm2")
    base = AutoModelForCausalLM.from_pretrained(backbone.source).to(options.device)
    model: Any = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    task = text_choice("arc_easy", backbone.tokenizer, data=options.data, prompt=Prompt(scoring="text"))
    rows = task.rows("train")[: BATCHES * options.rows]
    examples = task.examples(rows, model)
    parts = [examples[start : start + options.rows] for start in range(0, len(rows), options.rows)]
    batches: dict[str, list[dict[str, Tensor]]] = {}
    for way, packed in (("packed", True), ("separate", False)):
        task.packed = packed
        batches[way] = [task.collate(part) for part in parts]

    def steps(several: list[dict[str, Tensor]]) -> Callable[[], None]:
        ring: Iterator[dict[str, Tensor]] = itertools.cycle(several)

        def step() -> None:
            batch = {name: tensor.to(options.device) for name, tensor in next(ring).items()}
            task.loss(model, batch).mean().backward()
            model.zero_grad()

        return step

    ways = {way: steps(several) for way, several in batches.items()}
    times = seconds(ways, pairs=options.pairs, warmup=options.warmup, device=options.device)
    tokens = {way: sum(batch["input_ids"].numel() for batch in several) for way, several in batches.items()}
    found = {
        "ratio": ratio(times["packed"], times["separate"]),
        "quartiles": spread(times["packed"], times["separate"]),
        "tokens_ratio": tokens["packed"] / tokens["separate"],
        "milliseconds": {way: 1000 * torch.tensor(t).median().item() for way, t in times.items()},
        "rows": options.rows,
        "pairs": options.pairs,
        "shape": "smollm2",
    }
    publish(found, options, device=options.device)


if __name__ == "__main__":
    main()
