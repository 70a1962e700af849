"""docs/scale.md: the record of `scale_model.py` as tables."""

from collections.abc import Iterable, Sequence
from typing import Any

DEGREES = (1, 2, 4, 8, 16, 64)
CARD = 80e9
CARDS = (24, 40, 48, 80, 141)
FREE = 0.1
"""Share of a card that is left for what the prediction does not count."""
NAMES = {"qv": "q, v", "all": "all linear"}
PARTS = ("base", "gathered", "M and B", "G", "moments", "noise", "activations")


def page(record: dict[str, Any], ratio: float) -> str:
    """Return the record as Markdown; `ratio` is the median over rounds of BLoB's time by LoRA's on the H100."""
    made = record["predictions"]
    h100 = record["h100"]
    text = [INTRODUCTION, "## How many GPUs\n", GPUS.format(**_whole(made)), *_gpus(made)]
    text += ["\n## Memory per GPU\n", MEMORY, *_memory(made)]
    text += ["\n## Where the memory goes\n", PARTITION.format(logit=record["bytes_per_logit"]), *_partition(made)]
    text += [
        "\n## Seconds per update\n",
        SECONDS.format(bandwidth=record["bandwidth"], ratio=ratio, **_rates(h100)),
    ]
    text += [*_seconds(made), "\n## How far the predictions are off\n", ERRORS.format(**_errors(record)), *_gpu(h100)]
    text += ["\n" + COEFFICIENTS, *_coefficients(record["bytes_per_feature"]), "\n## Assumptions\n", ASSUMPTIONS]
    return "\n".join(text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def _lines(made: list[dict[str, Any]]) -> dict[tuple[str, str, str, bool], dict[tuple[str, int], dict[str, Any]]]:
    """By size, batch, targets and checkpointing: the predictions by way and degree."""
    found: dict[tuple[str, str, str, bool], dict[tuple[str, int], dict[str, Any]]] = {}
    for one in made:
        key = (one["size"], one["batch"], one["targets"], one["checkpointing"])
        found.setdefault(key, {})[one["way"], one["degree"]] = one
    return found


def _label(key: tuple[str, str, str, bool]) -> list[str]:
    size, batch, targets, checkpointing = key
    return [size, batch, NAMES[targets], "yes" if checkpointing else "no"]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:.3f}" if size < 1e9 else f"{size / 1e9:.1f}"


def _memory(made: list[dict[str, Any]]) -> list[str]:
    rows = []
    for key, by in _lines(made).items():
        peaks = [by["blob", degree]["peak"] for degree in DEGREES]
        shown = [f"**{_gigabytes(peak)}**" if peak > CARD else _gigabytes(peak) for peak in peaks]
        more = [by["blob", degree]["peak"] - by["lora", degree]["peak"] for degree in (1, 64)]
        rows.append([*_label(key), *shown, *map(_gigabytes, more)])
    head = ["base", "batch", "adapted", "checkpointing", *map(str, DEGREES), "more than LoRA, 1", "more than LoRA, 64"]
    return _table(head, rows)


def _whole(made: list[dict[str, Any]]) -> dict[str, float]:
    """GB of each whole base."""
    return {one["size"]: one["bytes"]["base"] / 1e9 for one in made if one["degree"] == 1}


def _gpus(made: list[dict[str, Any]]) -> list[str]:
    rows = []
    for (size, batch, targets, checkpointing), by in _lines(made).items():
        if batch == "4x300" and targets == "all":
            peaks = {degree: by["blob", degree]["peak"] for degree in DEGREES}
            fewest = [
                next((str(degree) for degree, peak in peaks.items() if peak <= (1 - FREE) * card * 1e9), "-")
                for card in CARDS
            ]
            rows.append([size, "yes" if checkpointing else "no", *fewest])
    return _table(["base", "checkpointing", *(f"{card} GB" for card in CARDS)], rows)


def _partition(made: list[dict[str, Any]]) -> list[str]:
    rows = []
    for key, by in _lines(made).items():
        if key[1] == "4x300":
            one = by["blob", 8]
            parts = [_gigabytes(one["bytes"][part]) for part in PARTS]
            rows.append([key[0], *_label(key)[2:], *parts, *(_gigabytes(one[n]) for n in ("gradients", "all_logits"))])
    return _table(["base", "adapted", "checkpointing", *PARTS, "gradients", "all logits"], rows)


def _seconds(made: list[dict[str, Any]]) -> list[str]:
    rows = []
    for key, by in _lines(made).items():
        times = [sum(by["blob", degree]["seconds"].values()) for degree in DEGREES]
        lora = by["lora", 1]["seconds"]["compute"]
        blob = by["blob", 1]
        rows.append([*_label(key), f"{blob['flops'] / 1e12:.0f}", f"{lora:.2f}", *(f"{time:.2f}" for time in times)])
    return _table(["base", "batch", "adapted", "checkpointing", "TFLOP", "LoRA, 1", *map(str, DEGREES)], rows)


def _rates(h100: dict[str, dict[str, float]]) -> dict[str, float]:
    return {f"{way}_rate": found["flops_per_second"] / 1e12 for way, found in h100.items()}


def _errors(record: dict[str, Any]) -> dict[str, Any]:
    update = max(made["update"] / made["simulated"] for made in record["held_out"])
    return {
        "fitted": len(record["fitted"]),
        "others": len(record["held_out"]),
        "fitted_error": 100 * record["largest_fitted_error"],
        "error": 100 * record["largest_error"],
        "activations": 100 * record["largest_activations_error"],
        "update": 100 * update,
    }


def _gpu(h100: dict[str, dict[str, float]]) -> list[str]:
    rows = [
        [
            {"lora": "LoRA", "blob": "BLoB"}[way],
            *(f"{found[name] / 1e9:.2f}" for name in ("measured", "simulated", "predicted")),
            f"{100 * (found['simulated'] / found['measured'] - 1):+.1f} %",
            f"{100 * found['error']:+.1f} %",
        ]
        for way, found in h100.items()
    ]
    return _table(["", "measured, GB", "simulated, GB", "predicted, GB", "simulation", "prediction"], rows)


def _coefficients(found: dict[str, dict[str, float]]) -> list[str]:
    rows = [[name, *(f"{found[kind][name]:.2f}" for kind in ("plain", "checkpointing"))] for name in found["plain"]]
    return _table(["feature", "without checkpointing", "with checkpointing"], rows)


INTRODUCTION = """# Memory and time on large models

`python benchmarks/scale_model.py --page` makes this page from `results/scale_model.json`. It predicts the memory and
the time of a BLoB update on Llama 2 7B and Llama 3.1 70B and 405B: rank 8, a base in bfloat16, adapters in float32
(`--precision bf16`), the loss of one answer per row. The batch is that of one GPU. GB are 10^9 bytes. M is the mean of
LoRA's A, G the square root of its standard deviation, and B the other LoRA matrix. Checkpointing computes activations
again in the backward pass.

- **Measured**: memory and milliseconds of a 7B model on one H100 (`results/bench/train_llama7b-4x300.json`).
- **Simulated**: the peaks of small models, of two layers of each real width, of all of 7B, and of all of 70B with
  checkpointing. The step runs on tensors without storage, and every byte that would be alive is counted.
- **Extrapolated**: everything in the tables by number of GPUs. **No step was run on more than one GPU.**
  `BayesTrainer` trains with FSDP2 ([more than one machine](more_than_one_machine.md)), tested with
  two processes on a CPU.
"""
GPUS = f"""The smallest number of GPUs, of {", ".join(map(str, DEGREES[:-1]))} and {DEGREES[-1]}, on which training
fits with {100 * FREE:.0f} % of each card left free: FSDP2, 4 rows of 300 tokens per GPU, all linear layers adapted.
"-" is more than {DEGREES[-1]}. Checkpointing is `--activation-checkpointing`.

This is training alone. `evaluate`, `predict` and `generate` need the whole base on each GPU ({{7B:.0f}} GB for 7B and
{{70B:.0f}} GB for 70B), and each process of FSDP2 keeps the whole base in CPU memory.
"""
MEMORY = """Peak in GB per GPU, for BLoB, by number of GPUs (FSDP2 degree). **Bold** exceeds a card of 80 GB. The last
columns are what BLoB takes more than plain LoRA, on 1 and on 64 GPUs.
"""
PARTITION = """GB per GPU on 8 GPUs, for 4 rows of 300 tokens. FSDP2 shards the base, M and B, G, AdamW's moments and
the gradients; it does not shard the noise and the activations. "gathered" is what each GPU holds whole at a time: two
decoder layers, the embedding and the head. These columns, up to the activations, add up to the peak. The gradients of
M, B and G grow after it, as activations are freed. "all logits" is what a loss over every token adds, at most
({logit:.1f} bytes per token and vocabulary entry); it is not in the peaks.
"""
SECONDS = """FLOPs (counted by `FlopCounterMode`, which leaves elementwise operations out) divided by the rate of the
H100 record, {lora_rate:.0f} TFLOP/s for LoRA and {blob_rate:.0f} TFLOP/s for BLoB, plus FSDP2's traffic at
{bandwidth:.0f} GB/s per GPU (`--bandwidth`): all weights are gathered twice, and the gradients of the trained ones
are reduced once. **Traffic does not overlap with compute here, which is pessimistic**: FSDP2 overlaps most of it where
compute takes longer. An update on n GPUs trains n batches.

The two rates come from median milliseconds, which are about equal in that record. But the median over rounds of the
ratio of BLoB's time to LoRA's is {ratio:.2f} there, so BLoB's times may be too low by up to that factor. With
1 x 4096 tokens the rate is assumed to be the same. 70B and 405B do not fit one GPU: for them, column "1" is compute
alone.
"""
ERRORS = """The coefficients are fitted to {fitted} simulated cases (largest error of a peak: {fitted_error:.1f} %).
For {others} cases that were not used to fit them, the predicted peak is at most {error:.1f} % off, and the activations
alone at most {activations:.1f} %. In these cases AdamW and the KL step reach at most {update:.0f} % of the peak.
Against the H100, with the head adapted too, as in that record:
"""
COEFFICIENTS = """Fitted bytes per feature. Features are products of the number of tokens with the sizes of a layer:
"adapted" sums the inputs of the adapted layers, and "rank" is the rank times their number. Only "noise" is without
tokens: the entries of A times rows + 1. They are summed over all layers, or are those of one with checkpointing, which
also keeps 2 bytes per token, layer and hidden entry (not fitted). "once" features do not grow with the layers.
Features are correlated, so a coefficient by itself means little.
"""
ASSUMPTIONS = """- Every GPU has its own rows. Activations are not sharded: no tensor, sequence or context parallelism.
- FSDP2 wraps each decoder layer, gathers one layer ahead, and keeps the embedding and head gathered.
- The allocator's fragmentation, the CUDA context, cuBLAS workspaces and NCCL buffers are not counted. Leave several GB
  free.
- Kernels are those of a CPU: fused attention that never holds a matrix of tokens by tokens, and no padding.
- On a GPU, AdamW and the KL step join more weights per operation than in the simulation, so they take more memory,
  after the peak.
- The rate in FLOP/s is that of 7B with the batch of the record. Other sizes and batches reach other rates.
"""
