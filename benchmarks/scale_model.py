"""Predict memory and time of BLoB on Llama 7B, 70B and 405B by number of GPUs, from simulated training steps.

    python benchmarks/scale_model.py --json results/scale_model.json     # about 10 minutes on one busy core
    python benchmarks/scale_model.py --page                              # make docs/scale.md from that record

The bytes of weights, moments and noise are exact. Those of the activations are a sum of products of sizes, whose
coefficients are fitted to small models by non-negative least squares. To test the prediction, the peaks of other
models, including real widths and whole 7B and 70B models, are predicted and then simulated (`scale_shapes.py`); with
an error above 10 %, the script exits with 1. Seconds are FLOPs divided by the rate that the record of an H100 implies,
and bytes of FSDP2's traffic divided by --bandwidth.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from options import add_json, parser, publish
from scale_page import DEGREES, page
from scale_shapes import SIZES, TARGETS, Case, Llama, flops, simulate
from scipy.optimize import nnls

from bayestune.files import read_json, write_text

ROOT = Path(__file__).parent.parent
RECORD, H100 = ROOT / "results" / "scale_model.json", ROOT / "results" / "bench" / "train_llama7b-4x300.json"
BATCHES, LIMIT = ((4, 300), (1, 4096)), 0.10
FEATURES = ("hidden", "intermediate", "kv", "adapted", "rank", "noise", "hidden, once", "intermediate, once")
FITTED = (
    # layers, hidden, intermediate, heads, kv heads, rows, tokens, rank, targets
    (1, 256, 704, 4, 4, 4, 128, 8, "qv"),
    (2, 256, 704, 4, 2, 1, 512, 32, "all"),
    (4, 256, 1024, 4, 1, 2, 256, 8, "qv"),
    (6, 256, 512, 4, 4, 8, 64, 8, "all"),
    (1, 512, 1376, 8, 2, 1, 1024, 8, "all"),
    (2, 512, 1024, 8, 8, 4, 256, 64, "qv"),
    (4, 512, 1792, 8, 1, 8, 128, 16, "all"),
    (6, 512, 1376, 8, 4, 4, 300, 8, "qv"),
    (2, 1024, 2752, 8, 2, 2, 512, 8, "qv"),
    (3, 1024, 3584, 8, 8, 1, 256, 32, "all"),
)
OTHER = (
    (3, 384, 1024, 6, 2, 3, 200, 8, "all"),
    (8, 512, 1376, 8, 8, 4, 128, 8, "qv"),
    (5, 768, 2048, 12, 4, 2, 700, 16, "all"),
    (2, 2048, 5632, 16, 4, 1, 1024, 8, "qv"),
)


def small(sizes: Sequence[Any], *, bayesian: bool, checkpointing: bool) -> Case:
    """Return the case of a line of `FITTED` or `OTHER`."""
    layers, hidden, intermediate, heads, kv_heads, rows, tokens, rank, targets = sizes
    size = Llama(
        layers=layers, hidden=hidden, intermediate=intermediate, heads=heads, kv_heads=kv_heads, vocabulary=2000
    )
    return Case(
        size=size,
        rows=rows,
        tokens=tokens,
        rank=rank,
        targets=targets,
        bayesian=bayesian,
        checkpointing=checkpointing,
    )


def held_out(checkpointing: bool) -> list[Case]:
    """Return cases that the fit does not use: other small models, real widths with few layers, and whole models."""
    cases = [small(sizes, bayesian=b, checkpointing=checkpointing) for sizes in OTHER for b in (False, True)]
    for name, (rows, tokens), targets in product(SIZES, BATCHES, ("qv", "all")):
        size = replace(SIZES[name], layers=2)
        cases.append(Case(size=size, rows=rows, tokens=tokens, targets=targets, checkpointing=checkpointing))
    for name in ("7B", "70B") if checkpointing else ("7B",):
        cases.append(Case(size=SIZES[name], rows=4, tokens=300, checkpointing=checkpointing))
    return cases


def states(case: Case, degree: int = 1) -> dict[str, float]:
    """Return the bytes per GPU that need no fit; FSDP2 gathers two layers, and the embedding and head, at a time."""
    size, a, b = case.size, case.a_weights, case.b_weights
    trained = 4 * (a * (2 if case.bayesian else 1) + b)
    gathered = 2 * size.parameters_outside() + 2 * (2 * size.parameters_per_layer() + trained / size.layers)
    return {
        "base": base_bytes(size) / degree,
        "M and B": 4 * (a + b) / degree,
        "G": 4 * a / degree if case.bayesian else 0,
        "moments": case.moments / degree,
        "noise": 4 * case.rows * a if case.bayesian else 0,
        "gathered": gathered if degree > 1 else 0,
    }


def base_bytes(size: Llama) -> int:
    return 2 * (size.layers * size.parameters_per_layer() + size.parameters_outside())


def features(case: Case) -> list[float]:
    """Return the sizes in which the activations' bytes are linear: of all layers, or of one with checkpointing."""
    size, tokens = case.size, case.rows * case.tokens
    held = 1 if case.checkpointing else size.layers
    layer = [size.linear[name] for name in TARGETS[case.targets] if name != "lm_head"]
    inputs = sum(inputs for inputs, _ in layer)
    return [
        held * tokens * size.hidden,
        held * tokens * size.intermediate,
        held * tokens * size.kv,
        held * tokens * inputs,
        held * tokens * case.rank * len(layer),
        held * (case.rows + 1) * case.rank * inputs if case.bayesian else 0,
        tokens * size.hidden,
        tokens * size.intermediate,
    ]


def kept_inputs(case: Case) -> int:
    """Return the bytes of the inputs of all layers, in bfloat16, that checkpointing keeps."""
    return 2 * case.size.layers * case.rows * case.tokens * case.size.hidden if case.checkpointing else 0


def activations(case: Case, coefficients: Sequence[float]) -> float:
    return kept_inputs(case) + float(np.dot(features(case), coefficients))


def fit(cases: Sequence[Case]) -> tuple[list[float], list[dict[str, Any]]]:
    """Fit the bytes per feature to the relative errors of the cases; return them and the compared cases."""
    peaks = [simulate(case) for case in cases]
    pairs = list(zip(cases, peaks, strict=True))
    working = np.array([peak["loss"] - sum(states(case).values()) for case, peak in pairs])
    rest = working - [kept_inputs(case) for case in cases]
    coefficients = nnls(np.array([features(c) for c in cases]) / working[:, None], rest / working)[0].tolist()
    return coefficients, [compared(case, peak, coefficients) for case, peak in zip(cases, peaks, strict=True)]


def compared(case: Case, peaks: dict[str, int], coefficients: Sequence[float]) -> dict[str, Any]:
    """Return a simulated case with the relative errors of the predicted peak and of its activations."""
    exact, working = sum(states(case).values()), activations(case, coefficients)
    return {
        "case": asdict(case),
        "simulated": max(peaks.values()),
        "update": peaks["update"],
        "predicted": exact + working,
        "error": (exact + working) / max(peaks.values()) - 1,
        "activations_error": working / (peaks["loss"] - exact) - 1,
    }


def logits_bytes() -> float:
    """Return the most bytes, per token and entry of the vocabulary, that a loss over every token adds."""
    size = Llama(layers=1, hidden=256, intermediate=256, heads=2, kv_heads=2, vocabulary=128_256)
    case = Case(size=size, rows=1, tokens=2048)
    added = simulate(replace(case, whole_logits=True))["loss"] - simulate(case)["loss"]
    return added / (case.tokens * size.vocabulary)


def gpu(fits: dict[bool, list[float]]) -> dict[str, dict[str, float]]:
    """Return for LoRA and BLoB on an H100: measured and predicted bytes, simulated bytes, and the rate in FLOP/s."""
    measured, found = read_json(H100, "a record"), {}
    for way in ("lora", "blob"):
        case = Case(size=SIZES["7B"], rows=4, tokens=300, targets="qv+head", bayesian=way == "blob")
        predicted = sum(states(case).values()) + activations(case, fits[False])
        work, memory = flops(case), measured["memory"][way][0]
        found[way] = {
            "measured": memory,
            "predicted": predicted,
            "error": predicted / memory - 1,
            "simulated": simulate(case)["loss"],
            "flops": work,
            "milliseconds": measured["milliseconds"][way],
            "flops_per_second": work / measured["milliseconds"][way] * 1000,
        }
    return found


def predictions(
    fits: dict[bool, list[float]], rates: dict[str, dict[str, float]], bandwidth: float, per_logit: float
) -> list[dict[str, Any]]:
    found = []
    for name, targets, (rows, tokens), checkpointing in product(SIZES, ("qv", "all"), BATCHES, (False, True)):
        blob = Case(size=SIZES[name], rows=rows, tokens=tokens, targets=targets, checkpointing=checkpointing)
        work = flops(blob)
        for way, degree in product(("lora", "blob"), DEGREES):
            case = replace(blob, bayesian=way == "blob")
            gradients = 4 * (case.a_weights * (2 if case.bayesian else 1) + case.b_weights)
            traffic = (degree - 1) / degree * (2 * (base_bytes(case.size) + gradients) + gradients)
            parts = {**states(case, degree), "activations": activations(case, fits[checkpointing])}
            found.append(
                {
                    "size": name,
                    "targets": targets,
                    "batch": f"{rows}x{tokens}",
                    "checkpointing": checkpointing,
                    "way": way,
                    "degree": degree,
                    "bytes": parts,
                    "peak": sum(parts.values()),
                    "gradients": gradients / degree,
                    "all_logits": per_logit * rows * tokens * case.size.vocabulary,
                    "flops": work,
                    "seconds": {
                        "compute": work / rates[way]["flops_per_second"],
                        "traffic": traffic / bandwidth / 1e9,
                    },
                }
            )
    return found


def record(bandwidth: float) -> dict[str, Any]:
    fits, fitted, other = {}, [], []
    for checkpointing in (False, True):
        cases = [small(sizes, bayesian=b, checkpointing=checkpointing) for sizes in FITTED for b in (False, True)]
        fits[checkpointing], made = fit(cases)
        fitted += made
        for case in held_out(checkpointing):
            other.append(compared(case, simulate(case), fits[checkpointing]))
            print(case, f"{other[-1]['error']:+.3f} {other[-1]['activations_error']:+.3f}", flush=True)
    h100, per_logit = gpu(fits), logits_bytes()
    return {
        "largest_error": max(abs(made["error"]) for made in other),
        "largest_activations_error": max(abs(made["activations_error"]) for made in other),
        "largest_fitted_error": max(abs(made["error"]) for made in fitted),
        "bytes_per_feature": {
            "plain": dict(zip(FEATURES, fits[False], strict=True)),
            "checkpointing": dict(zip(FEATURES, fits[True], strict=True)),
        },
        "bytes_per_logit": per_logit,
        "bandwidth": bandwidth,
        "h100": h100,
        "predictions": predictions(fits, h100, bandwidth, per_logit),
        "fitted": fitted,
        "held_out": other,
    }


def main() -> None:
    made = parser(__doc__)
    add_json(made)
    made.add_argument("--page", action="store_true", help="write docs/scale.md from results/scale_model.json")
    made.add_argument("--bandwidth", type=float, default=50.0, help="of FSDP's traffic, in GB/s per GPU")
    options = made.parse_args()
    if options.page:
        text = page(read_json(RECORD, "a record"), read_json(H100, "a record")["ratio"])
        write_text(ROOT / "docs" / "scale.md", text)
        return
    if not 0 < options.bandwidth < math.inf:
        made.error(f"--bandwidth: found {options.bandwidth}, expected GB/s above 0")
    transformers.logging.set_verbosity_error()
    found = record(options.bandwidth)
    publish(found, options)
    print(f"largest error of a predicted peak: {found['largest_error']:.1%}, expected at most {LIMIT:.0%}")
    raise SystemExit(found["largest_error"] > LIMIT)


if __name__ == "__main__":
    main()
