"""What a planted defect is."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Defect:
    """`before`, found exactly once in the file `path` under src/bayestune, becomes `after`; `tests` must then fail.

    A `path` of the command line begins with "bayestune_cli/".

    `tests` are a file under tests/, or such a file and what pytest's -k takes, with a blank between.
    """

    name: str
    path: str
    before: str
    after: str
    tests: str

    @property
    def file(self) -> str:
        """The file under src/."""
        return self.path if self.path.startswith("bayestune_cli/") else f"bayestune/{self.path}"
