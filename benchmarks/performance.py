"""Make docs/performance.md and its plot from results/bench/*.json; no figure in them is typed by hand.

    python benchmarks/performance.py            # write the page and the plot
    python benchmarks/performance.py --check    # exit with 1 if the page differs from what the records give

`benchmarks/bench.sh` makes the records; `claims.py` holds the targets.
"""

import statistics
import sys
from typing import Any

import matplotlib.pyplot as plt
from claims import NONE, ROOT, claims, exponent, record
from options import parser
from pairs import ratio

from bayestune.files import write_text

PAGE, PLOT = ROOT / "docs" / "performance.md", ROOT / "docs" / "images"
TRAIN = ("llama-4x128", "minilm-8x128", "llama7b-4x300", "llama7b-4x300-checkpointing")
PREDICT = ("llama-1x100", "llama-4x100", "minilm-1x4x40", "minilm-8x4x64", "llama7b-1x50", "llama7b-1x100",
           "llama7b-1x300", "llama7b-4x50", "llama7b-4x100", "llama7b-4x300")  # fmt: skip


def main() -> None:
    made = parser(__doc__)
    made.add_argument("--check", action="store_true")
    text = page()
    if made.parse_args().check:
        sys.exit(0 if PAGE.read_text(encoding="utf-8") == text else f"{PAGE}: differs from results/bench")
    write_text(PAGE, text)
    plot(record("scaling"))


def page() -> str:
    parts = [
        "# Performance",
        "This page compares the time and memory of bayestune with plain LoRA. `python benchmarks/performance.py` "
        "makes it from `results/bench/*.json`, and `benchmarks/bench.sh` makes those records; run it on an idle "
        "machine. A single record takes minutes, for example "
        "`.venv/bin/python benchmarks/train_step.py --shape llama-4x128`.",
        "Variants that are compared take turns in one process. A ratio is the median over these rounds, with its "
        "quartiles in brackets or ± its standard error. Ratios vary more between processes than within one.",
        "- **Control**: a second plain-LoRA run, timed against the first; its distance from 1 is noise.\n"
        "- **Reference**: the algorithm of the released code, rewritten in `benchmarks/looped_reference.py`: noise on "
        "activations with signs per token, the KL by autograd in float64, a second optimizer, draws in a loop.\n"
        "- **`llama-4x128`**: 4 rows of 128 tokens on a 4-layer Llama of width 512 with a vocabulary of 32,000 and "
        "random weights.\n"
        "- **`minilm-8x4x64`**: 8 rows of 4 choices of 64 tokens on MiniLM.\n"
        "- **`llama7b`**: the shape of Llama-2-7B.",
        _machine(),
        "## Targets",
        _table(["claim", "target", "measured", ""], claims()),
        "## Training: BLoB relative to plain LoRA",
        _training(),
        "## Ten draws",
        "Time of ten draws, divided by the time of ten plain-LoRA forward passes one after the other (loop), of ten "
        'that compute the logits of the labels only (short loop), and of one forward pass. "At once" is the number '
        "of draws in one forward pass. If the model is small and the batch full, ten draws cost about ten forward "
        "passes; computing the label's logits only, and filling the machine with several draws, makes them cheaper. "
        'The "ratio of operations" is what ten draws would take, relative to one forward pass, if only floating-point '
        "operations counted.",
        _prediction(),
        "### Draws per forward pass",
        _chunks(),
        "## Predictives without draws of weights",
        _sampling_free(),
        "[draws.md](draws.md) shows how the NLL falls with independent, antithetic and Latin-hypercube draws.",
        "## Growth",
        _scaling(),
        "## Start-up of the command line",
        _start(),
        "## Not measured and not done",
        "- Only the `llama7b` figures with a number above were measured on a GPU; run the scripts with `--device "
        "cuda` for the rest. BLoB's training step starts more kernels than plain LoRA's (for the noise, drawn weights "
        "and KL of 65 layers), all from one host thread; whether that explains the whole difference was not "
        "profiled.\n"
        "- There is no Triton kernel for the product of the stacked [mean | noise] projection, which uses torch's "
        "batched products, and no CUDA graph.\n"
        "- The head is computed at one position per row, but for the whole vocabulary instead of the labels only.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine() -> str:
    found = [r for name in (*TRAIN, *PREDICT) for r in (record(f"train_{name}"), record(f"predict_{name}")) if r]
    gpus = [f" `llama7b`: one {r['hardware']['device']}, torch {r['versions']['torch']}, bfloat16, one host thread."
            for r in found if r["device"] == "cuda"]  # fmt: skip
    hardware, versions = found[0]["hardware"], found[0]["versions"]
    return (
        f"Machine: {hardware['cores']} {hardware['machine']} cores, {hardware['threads']} threads, "
        f"{hardware['device']}; torch {versions['torch']}, "
        f"transformers {versions['transformers']}, peft {versions['peft']}. Float32 unless stated otherwise."
        + "".join(gpus[:1])
    )


def _table(heads: list[str], lines: list[list[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _quartiles(found: dict[str, Any]) -> str:
    low, high = found["quartiles"]
    return f"{found['ratio']:.3f} [{low:.3f}, {high:.3f}]"


def _training() -> str:
    heads = ["shape", "BLoB / LoRA", "control", "reference / LoRA", "LoRA, ms", "peak memory, BLoB / LoRA", "rounds"]
    rows, whole = [], []
    for name in TRAIN:
        found, trainer = record(f"train_{name}"), record(f"trainer_{name}")
        if found is None:
            rows.append([name, NONE, *[""] * 5])
        else:
            rows.append([name, _quartiles(found), f"{found['control_ratio']:.3f}", f"{found['reference_ratio']:.3f}",
                         f"{found['milliseconds']['lora']:.0f}", f"{found['memory_ratio']:.3f}",
                         str(found["pairs"])])  # fmt: skip
        if trainer is not None:
            whole.append([name, _quartiles(trainer), f"{trainer['control_ratio']:.3f}",
                          f"{trainer['checks_ratio']:.3f}", str(trainer["pairs"])])  # fmt: skip
    heads_whole = ["shape", "BLoB / LoRA", "control", "LoRA in `BayesTrainer` / LoRA", "rounds"]
    return (
        f"{_table(heads, rows)}\n\nMemory is the peak of a separate process; for BLoB, G and its gradient are "
        "subtracted.\n\nThe next table times whole updates of the trainers, including batches, clipping and checks: "
        "`BayesTrainer` with BLoB, relative to transformers' Trainer with plain LoRA.\n\n"
        f"{_table(heads_whole, whole)}"
    )


def _prediction() -> str:
    heads = ["shape", "ten draws / loop", "reference / loop", "ten draws / short loop", "ten draws / one forward"]
    heads += ["ratio of operations", "at once", "making the draws, ms"]
    rows = []
    for name in PREDICT:
        found = record(f"predict_{name}")
        if found is None:
            rows.append([name, NONE, *[""] * 6])
            continue
        rows.append([name, f"{found['per_loop']:.3f}", f"{found['reference_ratio']:.3f}",
                     f"{found['per_short_loop']:.3f}", f"{found['per_forward']:.2f}",
                     f"{found['compute_limit']:.2f}", str(found["at_once"]), f"{found['draw_ms']:.1f}"])  # fmt: skip
    return _table(heads, rows)


def _chunks() -> str:
    found = record("chunks")
    if found is None:
        return "Not measured."
    ways = sorted({int(way) for shape in found["shapes"].values() for way in shape["ratios"]})
    heads = ["shape", "tokens per draw", *(str(way) for way in ways), "chosen", "slower than the best"]
    rows = []
    for name, shape in found["shapes"].items():
        ratios = [f"{shape['ratios'][str(way)]:.2f}" if str(way) in shape["ratios"] else "" for way in ways]
        rows.append([name, str(shape["tokens"]), *ratios, str(shape["chosen"]), f"{shape['regret']:.0%}"])
    return (
        "Time of ten draws, divided by that of the loop, for each number of draws in one forward pass. On a CPU, "
        "bayestune stacks as many draws as keep a forward pass "
        f"within {found['cpu_tokens']} tokens.\n\n{_table(heads, rows)}"
    )


def _sampling_free() -> str:
    found = record("sampling_free")
    if found is None:
        return "Not measured."
    ways = list(found["runs"][0]["ways"])
    lines = []
    for way in ways:
        runs = [run["ways"][way] for run in found["runs"]]
        means = {m: [statistics.mean(r[m] for r in repeats) for repeats in runs] for m in ("nll", "ece", "seconds")}
        forward = [statistics.mean(r["seconds"] for r in run["ways"]["mean"]) for run in found["runs"]]
        times = statistics.mean(s / f for s, f in zip(means["seconds"], forward, strict=True))
        scores = [f"{statistics.mean(means[name]):.4f}" for name in ("nll", "ece")]
        lines.append([f"{way}, 1000 of the logits" if way == "linearised" else way, *scores, f"{times:.1f}"])
    float32 = statistics.mean(ratio(run["float32"]["linearised"], run["float32"]["mean"]) for run in found["runs"])
    head = (
        f"The table compares values of `predictive` in `Variational(model, predictive=...)` on {len(found['runs'])} "
        "posterior(s) of `bayestune table`, "
        f"{found['rows']} rows of the evaluation split, averaged over {found['repeats']} seeds of the draws (one seed "
        "for 100 draws). The NLL is in nats. The time is relative to that of the mean alone, in "
        f"{found['runs'][0]['precision']}. In float32 the linearised predictive takes {float32:.1f} times as long as "
        "the mean: the backward pass through torch's attention in bf16 is slow on a CPU."
    )
    return f"{head}\n\n{_table(['predictive, draws', 'NLL', 'ECE', 'time'], lines)}"


def _scaling() -> str:
    found = record("scaling")
    if found is None:
        return "Not measured."
    names = ("tokens", "rows", "rank", "layers", "draws")
    lines = []
    for what, curves in found["curves"].items():
        for unit in ("seconds", "bytes"):
            slopes = [_slopes(curves[name], unit) if name in curves else "" for name in names]
            lines.append([f"{what}, {unit}", *slopes])
    base = ", ".join(f"{name} {value}" for name, value in found["base"].items())
    return (
        f"One size varies at a time on a 4-layer Llama of width 512; the others are {base}. Each cell has two "
        "exponents, over all sizes and between the last two, of the seconds or of the peak memory above that of the "
        "model; 1 is linear. Larger sizes, where the quadratic cost of attention would show, were not measured.\n\n"
        f"{_table(['', *names], lines)}\n\n![Seconds and memory against size](images/scaling.png){_command()}"
    )


def _command() -> str:
    found = record("command")
    if found is None:
        return ""
    lines = [
        [rows, f"{one['seconds'] - found['start']['seconds']:.1f}", f"{one['bytes'] / 2**20:.0f}"]
        for rows, one in found["curve"].items()
    ]
    return (
        "\n\nThe next table times the whole command `bayestune predict` on MiniLM. Its seconds are those beyond the "
        f"{found['start']['seconds']:.1f} seconds that the command takes for one row; they grow with the exponent "
        f"{found['exponent']:.2f}.\n\n"
        f"{_table(['rows', 'seconds', 'MiB'], lines)}"
    )


def _slopes(curve: dict[str, Any], unit: str) -> str:
    last = dict(list(curve.items())[-2:])
    return f"{exponent(curve, unit):.2f}, {exponent(last, unit):.2f}"


def _start() -> str:
    found = record("start")
    if found is None:
        return "Not measured."
    return (
        f"`bayestune --help` takes {found['seconds']:.2f} s, and {found['cold_seconds']:.2f} s without byte code; "
        f"starting Python alone takes {found['python_seconds']:.2f} s (medians of {found['runs']}, "
        f"{found['cold_runs']} and {found['runs']} runs)."
    )


def plot(found: dict[str, Any] | None) -> None:
    """Plot seconds and memory against each size, with a gray line of slope 1 for comparison."""
    if found is None:
        return
    names, colours = ("tokens", "rows", "rank", "layers", "draws"), {"train": "C0", "predict": "C1"}
    rows = (
        ("seconds", "seconds", 1, (0.02, 0.05, 0.1, 0.2, 0.5, 1)),
        ("bytes", "peak, MiB", 2**-20, (10, 20, 50, 100, 200)),
    )
    figure, axes = plt.subplots(2, len(names), figsize=(15, 6), layout="constrained", sharey="row")
    for column, name in enumerate(names):
        for row, (unit, label, scale, ticks) in enumerate(rows):
            axis = axes[row][column]
            curves = {what: one[name] for what, one in found["curves"].items() if name in one}
            for what, curve in curves.items():
                values = [point[unit] * scale for point in curve.values()]
                axis.plot([int(size) for size in curve], values, "o-", label=what, color=colours[what])
            sizes = [int(size) for size in curve]
            axis.plot(sizes, [values[-1] * size / sizes[-1] for size in sizes], ":", color="grey", label="linear")
            axis.set(xscale="log", yscale="log", xlabel=name)
            axis.set_xticks(sizes, [str(size) for size in sizes])
            axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.minorticks_off()
            axis.grid(color="0.92")
            if column == 0:
                axis.set_ylabel(label)
            if column == row == 0:
                axis.legend()
    figure.savefig(PLOT / "scaling.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
