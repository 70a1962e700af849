"""What a planted defect is."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Defect:
    """`before`, found exactly once in the file `path` under src/bayestune, becomes `after`; `tests` must then fail.

    `tests` are a file under tests/, or such a file and what pytest's -k takes, with a blank between.
    """

    name: str
    path: str
    before: str
    after: str
    tests: str
