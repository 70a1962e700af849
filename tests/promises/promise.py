"""What a promise is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """A property under its id; its tests are marked ``@pytest.mark.property("<id>")``.

    Attributes:
        id: letter (S statistical, N numerical, P persistence, D data, R runtime, X security, K soak and concurrency)
            and two digits.
        says: what holds.
        note: where it does not hold as one would wish.
    """

    id: str
    says: str
    note: str = ""
