"""Scores over seeds, as the tables of the docs print them."""

import statistics
from collections.abc import Iterable, Mapping


def spread(values: Iterable[float]) -> str:
    """Return "mean ± standard deviation" (n - 1), or a single value alone."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def difference(first: Mapping[int, float], second: Mapping[int, float]) -> tuple[str, str]:
    """Return `first` minus `second` over the seeds of both: "mean ± standard error", and the value of each seed."""
    less = {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}
    if not less:
        return "", ""
    error = f" ± {statistics.stdev(less.values()) / len(less) ** 0.5:.3f}" if len(less) > 1 else ""
    each = ", ".join(f"{seed}: {value:+.3f}" for seed, value in less.items())
    return f"{statistics.mean(less.values()):+.3f}{error}", each
