"""The first table of docs/performance.md: targets for speed and quality, and what the records measured."""

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from pairs import ratio, uncertainty

from bayestune.files import read_json

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "results" / "bench"
NONE = "not measured (no GPU)"
TEN_DRAWS = {"llama-1x100": 0.35, "llama-4x100": 0.55, "minilm-1x4x40": 0.9, "minilm-8x4x64": 1.02}
TRAINED = ("llama-4x128", "minilm-8x128")


def record(name: str) -> dict[str, Any] | None:
    path = BENCH / f"{name}.json"
    return read_json(path, "a record of a benchmark") if path.is_file() else None


def claims() -> list[list[str]]:
    """Return claim, target, measurement, and whether the target is met."""
    return [*_training(), *_ten_draws(), *_quality(), *_growth(), *_start()]


def exponent(curve: Mapping[str, Mapping[str, float]], unit: str) -> float:
    """Return the slope of log(unit) over log(size), by least squares."""
    sizes = np.log([float(size) for size in curve])
    return float(np.polyfit(sizes, np.log([max(point[unit], 1.0e-9) for point in curve.values()]), 1)[0])


def _of(one: dict[str, Any] | None, name: str) -> float | None:
    return None if one is None else one[name]


def _claim(
    claim: str, limit: float, found: float | None, digits: int = 3, more: str = "", missing: str = "not measured"
) -> list[str]:
    if found is None:
        return [claim, f"≤ {limit:g}", missing, ""]
    return [claim, f"≤ {limit:g}", f"{found:.{digits}f}{more}", "met" if round(found, digits) <= limit else "missed"]


def _paired(claim: str, limit: float, one: dict[str, Any] | None, missing: str = "not measured") -> list[str]:
    """Return a median of ratios with its standard error; "undecided" within one standard error of the limit."""
    if one is None:
        return [claim, f"≤ {limit:g}", missing, ""]
    found, error = one["ratio"], uncertainty(one["quartiles"], one["pairs"])
    control = f" (control {one['control_ratio']:.3f})" if "control_ratio" in one else ""
    verdict = "undecided" if abs(found - limit) <= error else "met" if found < limit else "missed"
    return [claim, f"≤ {limit:g}", f"{found:.3f} ± {error:.3f}{control}", verdict]


def _training() -> list[list[str]]:
    found = []
    for shape in TRAINED:
        step, whole = record(f"train_{shape}"), record(f"trainer_{shape}")
        for name, one in (("Training step", step), ("Update of the trainer", whole)):
            found.append(_paired(f"{name}, BLoB / LoRA, {shape}", 1.03, one))
        found.append(
            _claim(
                f"Peak memory of a training step, BLoB without G and its gradient / LoRA, {shape}",
                1.01,
                _of(step, "memory_ratio"),
            )
        )
    packed = record("packed_smollm2")
    found.append(
        _paired("Training step by texts, choices packed / separate, SmolLM2, 4 rows (machine not idle)", 0.6, packed)
    )
    for name in ("llama7b-4x300", "llama7b-4x300-checkpointing"):
        step = record(f"train_{name}")
        found.append(_paired(f"Training step, BLoB / LoRA, {name}", 1.02, step, missing=NONE))
        found.append(
            _claim(
                f"Peak memory of a training step, BLoB without G and its gradient / LoRA, {name}",
                1.01,
                _of(step, "memory_ratio"),
                missing=NONE,
            )
        )
    return found


def _ten_draws() -> list[list[str]]:
    found = []
    for shape, limit in TEN_DRAWS.items():
        one = record(f"predict_{shape}")
        found.append(_paired(f"Ten draws / ten forwards, {shape}", limit, one))
    one = record("generate_smollm2")
    found.append(_paired("Text from ten averaged draws / plain decoding, SmolLM2 (machine not idle)", 10, one))
    one = record("predict_llama7b-1x100")
    found.append(_claim("Ten draws / one forward, llama7b-1x100", 3.5, _of(one, "per_forward"), missing=NONE))
    return found


def _quality() -> list[list[str]]:
    draws, free = record("draws"), record("sampling_free")
    found = []
    if draws:
        nll = [run["nll"] for run in draws["runs"]]
        few, many = (
            statistics.mean(statistics.mean(one[kind][count]) for one in nll)
            for kind, count in (("antithetic", "4"), ("independent", "10"))
        )
        found.append(_claim("NLL of 4 antithetic draws / of 10 independent", 1.0, few / many, 4))
    if free:
        means = {way: [_mean(run, way, "nll") for run in free["runs"]] for way in ("linearised", "mc 100")}
        worst = max(abs(a / b - 1) for a, b in zip(*means.values(), strict=True))
        times = [_mean(run, "linearised", "seconds") / _mean(run, "mean", "seconds") for run in free["runs"]]
        float32 = [ratio(run["float32"]["linearised"], run["float32"]["mean"]) for run in free["runs"]]
        found.append(_claim("Linearised predictive, relative NLL difference to 100 draws (worst run)", 0.01, worst, 4))
        found.append(
            _claim("Time of the linearised predictive / a forward, 4 classes, float32", 5, statistics.mean(float32), 1)
        )
        found.append(
            _claim(
                f"Time of the linearised predictive / a forward, 4 classes, {free['runs'][0]['precision']}",
                5,
                statistics.mean(times),
                1,
            )
        )
    return found


def _mean(run: dict[str, Any], way: str, score: str) -> float:
    return statistics.mean(repeat[score] for repeat in run["ways"][way])


def _growth() -> list[list[str]]:
    scaling = record("scaling")
    if scaling is None:
        return []
    slopes = {
        f"{what}, {unit} by {name}": exponent(curve, unit)
        for what, curves in scaling["curves"].items()
        for name, curve in curves.items()
        for unit in ("seconds", "bytes")
    }
    worst = max(slopes, key=lambda name: slopes[name])
    return [_claim("Largest exponent of growth", 1.0, slopes[worst], 2, f" ({worst})")]


def _start() -> list[list[str]]:
    start = record("start")
    return [
        _claim("`bayestune --help`, seconds", 0.5, _of(start, "seconds"), 2),
        _claim("`bayestune --help` without byte code, seconds", 0.5, _of(start, "cold_seconds"), 2),
    ]
